"""Other people's Lightning projects, as they are on PyPI, with one callback added."""
