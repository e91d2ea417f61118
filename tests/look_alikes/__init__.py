"""Small modules in the shape of other people's projects, each point of what these demand."""

import pytest

pytest.register_assert_rewrite("tests.look_alikes.look_alike")
