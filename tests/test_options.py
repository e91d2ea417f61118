"""Every bad value is refused where it enters, naming what came and what is allowed."""

import math

import pytest
import torch
from torch import nn

from ngplugin import (
    KlMatching,
    LevenbergMarquardt,
    NaturalGradient,
    NaturalGradientOptimizer,
    NgpluginError,
    OptionError,
)
from ngplugin.options import Options

X = torch.ones(1)

NOT_NUMBERS = ["0.5", True, math.nan, math.inf]
BAD = {
    "nesterov": ["false", 0, 1, None],
    "momentum": [-0.1, 1.0, None, *NOT_NUMBERS],
    "kl_radius": [0.0, -1.0, *NOT_NUMBERS],
    "damping": [-0.1, None, "0.5", True, math.nan, math.inf],
    "sampling_damping": [-0.1, None, *NOT_NUMBERS],
    "decay": [-0.1, 1.0, None, *NOT_NUMBERS],
    "noise_variance": [0.0, -1.0, None, "runing", *NOT_NUMBERS],
    "damping_mode": ["relativ", None, 1],
    "fisher": ["empiric", "sample", None],
    "structure": ["kroneker", "Auto", None],
    "weight_sharing": ["expanded", True, None],
    "max_factor": [0, 2.5, True],
    "overhead": [-0.1, None, *NOT_NUMBERS],
    "rank": [0, 2.5, True],
    "step_size": ["line", None, 1],
    "layer_balance": ["balance", None, 1],
    "products": ["bfloat16", None, 1],
    "draws": [0, -1, 1.0, True, "1", None],
    "measure_every": [0, 2.5, True],
    "statistics_every": [0, 2.5, True],
    "refresh_every": [0, 2.5, True],
    "spectrum_every": [0, 2.5, True],
    "cg_iterations": [0, 2.5, True],
    "burn_in": [-1, 0.5, True],
    "seed": [-1, 0.5, True],
}
ALLOWED = {
    "damping_mode": ["relative", "absolute"],
    "fisher": ["sampled", "propagated", "exact", "empirical", "ggn"],
    "structure": ["auto", "exact", "kronecker", "eigen", "diagonal", "identity", "matrix-free"],
    "weight_sharing": ["expand", "reduce"],
    "step_size": ["bounded", "line-search", "quadratic"],
    "nesterov": ["True", "False"],
    "layer_balance": ["balanced", "natural", "orthogonal", "equal"],
    "products": ["auto", "full"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_option_is_refused_by_name_and_value(name, value):
    for make in (
        lambda: Options(**{name: value}),
        lambda: NaturalGradientOptimizer([nn.Parameter(torch.ones(1))], **{name: value}),
    ):
        with pytest.raises(OptionError) as refusal:
            make()
        message = str(refusal.value)
        assert f"{name}={value!r}" in message
        for word in ALLOWED.get(name, ["expected a"]):
            assert word in message


def test_every_option_has_bad_values_that_are_tried():
    assert set(Options.__dataclass_fields__) == set(BAD)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1"])
def test_a_bad_rate_is_refused(name, value):
    with pytest.raises(OptionError, match=f"{name}="):
        NaturalGradientOptimizer([nn.Parameter(torch.ones(1))], **{name: value})


def test_a_near_miss_is_answered_with_the_nearest_choice():
    with pytest.raises(OptionError, match="did you mean 'propagated'"):
        Options(fisher="propagate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": "line-search", "measure_every": None}, "a line search measures every step"),
        ({"step_size": "quadratic", "structure": "matrix-free"}, "the same quadratic model"),
        ({"step_size": "quadratic", "structure": "identity"}, "use structure='auto'"),
        ({"fisher": "empirical", "structure": "exact"}, "never sees the data's labels"),
        (
            {"damping": KlMatching(), "measure_every": None},
            r"damping=KlMatching\(\) with measure_every=None: .*leave measure_every at a number",
        ),
        (
            {"step_size": "line-search", "structure": "exact"},
            "structure='exact' and damping='auto', .*give damping a number",
        ),
        (
            {"step_size": "line-search", "structure": "exact", "damping": LevenbergMarquardt()},
            "no search is made",
        ),
        ({"damping_mode": "absolute"}, "damping='auto' with damping_mode='absolute'.*in nats"),
        (
            {"damping_mode": "absolute", "damping": 0.1, "sampling_damping": 2.0},
            "sampling_damping=2.0 with damping_mode='absolute'",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Options(**options)


def test_what_does_not_contradict_is_allowed():
    Options(damping_mode="absolute", structure="exact")  # which adapts it
    Options(damping_mode="absolute", damping=0.1, sampling_damping=0)
    Options(step_size="line-search", structure="exact", damping=0.1)
    Options(damping=KlMatching(), kl_radius=None)


@pytest.mark.parametrize(
    "make", [NaturalGradient, lambda **o: NaturalGradientOptimizer([nn.Parameter(X)], **o)]
)
def test_a_wrong_keyword_is_answered_with_the_nearest(make):
    with pytest.raises(TypeError, match="keyword argument 'kl_raduis'; did you mean 'kl_radius'"):
        make(kl_raduis=0.1)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'$"):
        make(zzz=0.1)


@pytest.mark.parametrize("name", ["enabled", "show_coverage", "show_summary", "show_progress"])
def test_the_callback_s_switches_are_true_or_false(name):
    with pytest.raises(OptionError, match=f"{name}='false': expected True or False"):
        NaturalGradient(**{name: "false"})


@pytest.mark.parametrize("places", [[], 0, [0.0], ["0"], [True], "0"])
def test_places_of_optimizers_are_a_list_of_numbers(places):
    with pytest.raises(OptionError, match=r"optimizers=.*for none of them, enabled=False"):
        NaturalGradient(optimizers=places)


def test_boundaries_are_allowed():
    Options(measure_every=None)
    Options(momentum=0, sampling_damping=0, decay=0, burn_in=0, seed=0, damping=0, kl_radius=None)
    Options(noise_variance=1e-9, draws=1)
    for word in ("auto", "running"):
        assert Options(noise_variance=word).noise_variance == word


def test_wrap_refuses_what_it_cannot_wrap():
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(OptionError, match=r"wrap\(list\)"):
        NaturalGradientOptimizer.wrap([p])
    with pytest.raises(OptionError, match="already"):
        NaturalGradientOptimizer.wrap(NaturalGradientOptimizer([p]))
    with pytest.raises(OptionError, match="did you mean 'kl_radius'"):
        NaturalGradientOptimizer.wrap(torch.optim.SGD([p], lr=1.0), kl_raduis=0.1)
    with pytest.raises(OptionError, match="lr=0"):
        NaturalGradientOptimizer.wrap(torch.optim.SGD([p], lr=1.0), lr=0)


def test_option_errors_are_value_errors_too():
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, NgpluginError)


def test_the_optimizer_s_defaults_are_those_of_the_options():
    assert NaturalGradientOptimizer([nn.Parameter(torch.ones(1))]).options == Options()
