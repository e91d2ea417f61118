"""The race: turns change nothing, settings are searched for, what is told follows from curves."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from experiments.race import __main__ as script
from experiments.race import contestants as own
from experiments.race import memory, results, running
from experiments.race.contestants import Contestant, Training
from experiments.race.courses import COURSES, Course
from experiments.race.field import FIELD
from experiments.race.page import Study, fastest_other
from experiments.race.results import Curve, Record
from experiments.race.running import Runner, points, race
from experiments.race.search import Axis, first_places, neighbours, search, setting

OTHERS_PACKAGES = {name for name, entry in FIELD.items() if entry.package}
MINE = [name for name in FIELD if name not in OTHERS_PACKAGES]


def tiny(seconds: float = 1000.0) -> Course:
    """With dropout, so that random numbers matter, and BatchNorm, which judging could disturb."""
    overrides = ("data=digits", "model=cnn", "model.channels=[4,4]", "data.batch_size=32")
    return Course("", overrides, seconds, "accuracy", True, "categorical", judged=1)


class Dropped(own.Plain):
    """Plain steps with noise from the global generator."""

    make = torch.optim.SGD

    def step(self, batch, done):
        images, labels = batch
        return super().step((images + 0.1 * torch.randn_like(images), labels), done)


ENTRIES = {
    "noisy": (Contestant("", Dropped), {"lr": 0.1}),
    "adamw": (FIELD["adamw"], {"lr": 0.01}),
    "natgrad": (FIELD["natgrad"], {}),
}


# -- running ---------------------------------------------------------------------------------------


def test_turns_change_nobodys_steps(monkeypatch):
    monkeypatch.setattr(running, "TURN", 0.01)
    together = race(tiny(), ENTRIES, seed=3, steps=12)
    for name, (contestant, options) in ENTRIES.items():
        alone = Runner(contestant, tiny(), options, 3, steps=12).run()
        assert together[name].losses[-1] == alone.losses[-1], name
        assert together[name].steps[-1] == alone.steps[-1] == 12


def test_contestants_really_take_turns(monkeypatch):
    monkeypatch.setattr(running, "TURN", 1e-9)
    order = []
    for name in ("noisy", "adamw"):

        def spy(self, batch, done, _name=name, _step=ENTRIES[name][0].training.step):
            order.append(_name)
            return _step(self, batch, done)

        spied = type("Spied", (ENTRIES[name][0].training,), {"step": spy})
        monkeypatch.setitem(ENTRIES, name, (Contestant("", spied), ENTRIES[name][1]))
    race(tiny(), {name: ENTRIES[name] for name in ("noisy", "adamw")}, seed=0, steps=3)
    assert order == ["noisy", "adamw"] * 3


def test_judging_changes_nothing():
    often = Runner(ENTRIES["noisy"][0], tiny(), {"lr": 0.1}, 0, [1e-9] * 40 + [1.0], steps=9)
    once = Runner(ENTRIES["noisy"][0], tiny(), {"lr": 0.1}, 0, [1.0], steps=9)
    curves = often.run(), once.run()
    assert len(curves[0].steps) > len(curves[1].steps) == 2
    assert curves[0].losses[-1] == curves[1].losses[-1]


def test_all_begin_with_the_same_weights_and_batches():
    seen = {}

    class Watching(own.AdamW):
        def step(self, batch, done):
            seen.setdefault(id(self), []).append(batch[1])
            return super().step(batch, done)

    entries = {str(lr): (Contestant("", Watching), {"lr": lr}) for lr in (0.01, 0.1)}
    first, second = race(tiny(), entries, seed=1, steps=3).values()
    assert first.losses[0] == second.losses[0]
    assert first.losses[-1] != second.losses[-1]
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_a_run_ends_when_its_time_is_spent():
    curve = Runner(FIELD["adamw"], tiny(0.3), {"lr": 0.01}, 0).run()
    assert curve.failure is None
    assert 0.2 < curve.seconds[-1] <= 0.3 * running.LATE
    assert curve.seconds == sorted(curve.seconds)
    assert curve.steps[0] == 0 < curve.steps[-1]
    assert curve.step_seconds["mean"] * curve.steps[-1] == pytest.approx(0.3, rel=0.1)


class Slow(own.AdamW):
    """Whose second step takes all the processor's time there is."""

    def step(self, batch, done):
        if done > 0:
            end = running.time.process_time() + 0.4
            while running.time.process_time() < end:
                pass
        return super().step(batch, done)


def test_a_step_that_takes_too_long_does_not_count():
    curve = Runner(Contestant("", Slow), tiny(0.3), {"lr": 0.01}, 0, [1e-9, 1.0]).run()
    assert curve.steps == [0, 1]
    assert curve.seconds[-1] < 0.3


@pytest.mark.parametrize("wrong", ["nan", "error"])
def test_a_run_that_fails_ends_at_once_and_says_why(wrong):
    class Failing(own.AdamW):
        def step(self, batch, done):
            loss = super().step(batch, done)
            if self.optimizer.state[next(self.module.parameters())]["step"] < 3:
                return loss
            if wrong == "error":
                raise torch.linalg.LinAlgError("not positive definite")
            return loss * math.nan

    curve = Runner(Contestant("", Failing), tiny(), {"lr": 0.01}, 0, steps=50).run()
    assert {"nan": "not finite", "error": "not positive definite"}[wrong] in curve.failure
    assert curve.final == math.inf
    assert curve.steps[-1] < 3
    assert math.isfinite(curve.best)


def test_points_are_closer_together_at_the_start_and_reach_the_end():
    shares = points(48)
    assert shares[-1] == 1.0
    assert shares[0] == pytest.approx(running.EARLIEST)
    assert 44 <= len(shares) <= 48
    assert sum(share < 0.1 for share in shares) > 12


# -- contestants -----------------------------------------------------------------------------------


#: Natural gradient on every course, each of the others on one or two: enough, and no minutes.
STARTS = [
    (name, course)
    for i, name in enumerate(MINE)
    for j, course in enumerate(COURSES)
    if course not in FIELD[name].unable and (name == "natgrad" or (i + j) % 5 == 0)
]


def test_who_cannot_has_a_reason():
    for contestant in FIELD.values():
        assert all(len(reason) > 20 for reason in contestant.unable.values())


@pytest.mark.parametrize(("name", "course"), STARTS)
def test_everyone_learns(name, course):
    small = {
        "autoencoder": (
            "model.hidden=[40]",
            "data=digits",
            "data.pixels=unit",
            "data.batch_size=50",
        ),
        "mnist5k_cnn": ("data=digits", "data.batch_size=64"),
        "implicit_image": ("data.height=20", "data.width=30", "data.batch_size=128"),
        "char_transformer": ("model.width=32", "data.context=16"),
    }.get(course, ())
    quick = replace(COURSES[course], overrides=(*COURSES[course].overrides, *small), seconds=1000)
    axes = FIELD[name].axes.get(course, {})
    options = setting(axes, (0,) * len(axes))
    curve = Runner(FIELD[name], quick, options, 0, steps=8).run()
    assert curve.failure is None
    assert curve.best < 0.97 * curve.losses[0]


def test_the_courses_are_what_they_say():
    sizes = {"digits_mlp": 85_002, "autoencoder": 2_837_314, "poisson_pinn": 4_417}
    for name, size in sizes.items():
        _, module = COURSES[name].make(0)
        assert sum(p.numel() for p in module.parameters()) == size, name
    assert next(module.parameters()).dtype == torch.float64
    assert all(
        set(COURSES) == {*entry.axes, *entry.unable} for entry in FIELD.values() if entry.axes
    )


def test_a_cosine_falls_with_the_time():
    contestant, course = FIELD["adamw-cosine"], tiny()
    data, module = course.make(0)
    training = contestant.training(course, module, data, {"lr": 0.2})
    batch = next(iter(data.train_dataloader()))
    rates = []
    for done in (0.0, 0.5, 1.0):
        training.step(batch, done)
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.1, 0.0])


def test_lbfgs_does_not_evaluate_the_same_place_twice():
    data, module = tiny().make(0)
    training = own.LBFGS(tiny(), module, data, {"lr": 1.0, "history_size": 5})
    places, loss = [], module.loss

    def spy(batch):
        places.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone())
        return loss(batch)

    module.loss = spy
    for _ in range(4):
        training.step(None, 0.0)
    same = [torch.equal(a, b) for i, a in enumerate(places) for b in places[:i]]
    assert len(places) > 4
    assert not any(same)
    assert training.optimizer.state[training.optimizer._params[0]]["n_iter"] == 4


def test_natural_gradient_tells_the_share_of_its_curvature():
    curve = Runner(FIELD["natgrad"], tiny(), {}, 0, steps=5).run()
    assert 0.05 < curve.overhead < 1
    assert Runner(FIELD["sgd"], tiny(), {"lr": 0.1}, 0, steps=2).run().overhead is None


def test_momentum_is_tuned_by_the_steps_it_sums_up():
    _, module = tiny().make(0)
    optimizer = own.NaturalGradient.make(module.parameters(), memory=20.0, kl_radius=0.1)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95)
    defaults = own.NaturalGradient.make(module.parameters())
    middle = setting(FIELD["natgrad-tuned"].axes["digits_mlp"], (0, 0))
    same = own.NaturalGradient.make(module.parameters(), **middle)
    assert same.param_groups[0]["momentum"] == pytest.approx(defaults.param_groups[0]["momentum"])
    assert replace(same.options, momentum=0.9) == defaults.options


# -- tuning ----------------------------------------------------------------------------------------


def test_the_first_places_are_five_around_the_middle():
    assert sorted(first_places(1)) == [(-2,), (-1,), (0,), (1,), (2,)]
    assert sorted(first_places(2)) == [(-1, 0), (0, -1), (0, 0), (0, 1), (1, 0)]
    assert sorted(neighbours((3,))) == [(2,), (4,)]


@pytest.mark.parametrize(("best", "tried", "found"), [(0, 5, 0), (3, 7, 3), (4, 8, 4), (9, 8, 5)])
def test_a_search_goes_on_at_the_edge_but_not_forever(best, tried, found):
    losses = search(1, lambda place: abs(place[0] - best))
    assert len(losses) == tried
    assert min(losses, key=losses.__getitem__) == (found,)


def test_a_search_goes_on_along_both_axes():
    losses = search(2, lambda place: abs(place[0] - 2) + abs(place[1] - 1))
    assert len(losses) == 8
    assert min(losses.values()) <= 1


def test_tuning_takes_the_setting_that_ends_lowest_and_keeps_all_trials(tmp_path):
    class Pretending(Training):
        def prepare(self, lr):
            self.lr = lr

        def step(self, batch, done):
            with torch.no_grad():  # the further from 0.32, the worse the module
                for p in self.module.parameters():
                    p.add_(torch.randn_like(p), alpha=abs(math.log10(self.lr / 0.316)))
            return torch.tensor(math.nan if self.lr > 5 else 1.0)

    contestant = Contestant("", Pretending, {"here": {"lr": Axis(0.01)}})
    trials = running.tune(contestant, tiny(0.02), "here")
    assert [s["lr"] for s, _ in trials] == [0.01, 0.00316, 0.0316, 0.001, 0.1, 0.316, 1.0]
    results.store_tuned("here", "pretending", trials, tmp_path)
    results.store_tuned("here", "other", [({"lr": 5.0}, math.inf), ({"lr": 1.0}, 2.0)], tmp_path)
    found = results.tuned_of("here", tmp_path)
    assert found["pretending"]["setting"] == {"lr": 0.316}
    assert len(found["pretending"]["trials"]) == 7
    assert found["other"] == {
        "setting": {"lr": 1.0},
        "trials": [[{"lr": 5.0}, None], [{"lr": 1.0}, 2.0]],
    }


def test_tuning_has_a_seed_of_its_own():
    assert running.TUNING_SEED not in script.SEEDS


# -- what is told ----------------------------------------------------------------------------------


def curve(seed, losses, seconds=None, **more):
    seconds = [float(i) for i in range(len(losses))] if seconds is None else seconds
    steps = [10 * i for i in range(len(losses))]
    kept = {"step_seconds": {"median": 0.1, "mean": 0.2, "longest": 0.5}, **more}
    metrics = [0.5 if i % 2 == 0 else None for i in range(len(losses))]
    return Curve(seed, {"lr": 0.1}, steps, seconds, losses, metrics, **kept)


def a_record(course="digits_mlp"):
    curves = {
        "sgd": [curve(s, [9.0, 8.0, 7.0, 6.0]) for s in range(3)],
        "adamw": [curve(s, [9.0, 5.0, 3.0, 1.0 + s * s, 7.0]) for s in range(3)],  # target 2
        "muon": [curve(s, [9.0, 2.5, 1.5, 1.2]) for s in range(3)],
        "lbfgs": [curve(0, [9.0, 0.5]), *(curve(s, [9.0], failure="lost") for s in (1, 2))],
        "natgrad": [curve(s, [9.0, 2.0 + s / 2, 0.5, 0.1], overhead=0.25) for s in range(3)],
    }
    return Record(course, 3.0, curves, bytes={"sgd": 100, "natgrad": 250})


def test_a_loss_is_reached_at_the_first_point_below():
    found = curve(0, [2.0, 0.4, 0.6, 0.1], [0.0, 1.5, 2.0, 3.0])
    assert found.reach(0.5) == (10, 1.5)
    assert found.reach(0.4) == (10, 1.5)
    assert found.reach(0.05) == (math.inf, math.inf)
    assert found.reach(0.5, metric=True) == (0, 0.0)
    assert found.best == 0.1


def test_the_target_is_the_median_of_adamws_least_losses_and_times_are_medians():
    record = a_record()
    assert record.target == 2.0
    assert record.reached("adamw") == (30, 3.0)
    assert record.reached("muon") == (20, 2.0)
    assert record.reached("natgrad") == (20, 2.0)  # of 1, 2 and 2
    assert record.reached("lbfgs")[1] == math.inf  # one seed of three is not enough
    assert fastest_other(record) == ("muon", 2.0)


def test_step_seconds_are_told_of_settled_steps():
    found = curve(0, [1.0], step_seconds={})
    found.summarize([9.0, *[1.0] * 60, 3.0, 1.0])
    assert found.step_seconds == {"median": 1.0, "mean": pytest.approx(73 / 63), "longest": 3.0}
    found.summarize([9.0, 1.0])
    assert "longest" not in found.step_seconds


def test_tables_of_a_small_record():
    study = Study({"digits_mlp": a_record()}, {"digits_mlp": {"muon": {
        "setting": {"lr": 0.1}, "trials": [[{"lr": 0.1}, 0.2], [{"lr": 1.0}, None]]}}})  # fmt: skip
    tables = study.tables()
    row, count = tables["summary"].rows
    assert row == ("digits_mlp", "2", "3", "2", "0.67", "Muon", "0.67", "0.1", "1.2", "Muon")
    assert count[5] == count[9] == "on 1 of 1"
    rows = {r[0]: r for r in tables["digits_mlp"].rows}
    assert rows["natural gradient"][2:] == (
        "2 (1–2)", "20", "0.67", "0.1 (0.1–0.1)", "0.5", "30", "1.00", "1.00", "25 %", "5.00",
        "2.50",
    )  # fmt: skip
    assert rows["L-BFGS (failed: lost)"][2] == "never (1 of 3 seeds)"
    assert tables["trials"].rows == [("digits_mlp", "Muon", "lr 0.1: 0.2; lr 1: failed")]
    slower = replace(a_record(), curves={**a_record().curves, "soap": [curve(0, [9.0, 0.01])]})
    _, count = Study({"digits_mlp": slower}, {}).tables()["summary"].rows
    assert count[5] == count[9] == "on 0 of 1"


def test_the_long_run_is_timed_to_its_error():
    long = [dataclasses.replace(curve(s, [1.0, 1e-7]), metrics=[1.0, 1e-7]) for s in range(3)]
    record = dataclasses.replace(a_record("poisson_pinn"), long=long)
    (row,) = Study({"poisson_pinn": record}, {}).long().rows
    assert row[:3] == ("poisson_pinn", "60", "1 (1–1)")


def test_memory_has_what_an_optimizer_keeps_in_it():
    _, module = tiny().make(0)
    size = sum(p.nbytes for p in module.parameters())
    before = memory.peak(FIELD["sgd"], tiny(), {"lr": 0.1}, steps=0)
    assert before == size + sum(b.nbytes for b in module.buffers())
    sgd, adamw = (
        memory.peak(FIELD[name], tiny(), {"lr": 0.1}, steps=3) for name in ("sgd", "adamw")
    )
    assert sgd > 3 * size  # parameters, gradients, momentum
    assert 0.5 * size < adamw - sgd < 2 * size  # one average more


def test_a_record_is_read_as_it_was_stored(tmp_path):
    record = a_record()
    results.store(record, tmp_path)
    assert results.record_of("digits_mlp", tmp_path) == record
    assert results.record_of("autoencoder", tmp_path) is None


# -- the script ------------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_what_is_stored():
    page = script.PAGE.read_text()
    for name, table in script.study(results.FOLDER).tables().items():
        (text,) = re.findall(f"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", page, re.DOTALL)
        assert text == table.markdown(), f"{name}: run python -m experiments.race table"


def test_a_race_in_stages_that_go_on_where_they_stopped(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"(?m)^\|.*\n", "", script.PAGE.read_text()))
    common = ["--folder", str(tmp_path), "--workload", "digits_mlp", "--quick", "--page", str(page)]
    few = [*common, "--contestant", "sgd", "adamw", "natgrad"]
    with pytest.raises(SystemExit, match="has no setting; run the stage tune first"):
        script.main(["run", *few])
    with pytest.raises(SystemExit, match="nothing was raced yet"):
        script.main(["memory", *few])
    for stage in ("tune", "run", "memory", "table"):
        assert script.main([stage, *few]) == 0
    tuned = json.loads((tmp_path / "tuned-digits_mlp.json").read_text())
    assert tuned.keys() == {"sgd", "adamw"}  # natural gradient is not
    record = results.record_of("digits_mlp", tmp_path)
    assert record.curves.keys() == record.bytes.keys() == {"sgd", "adamw", "natgrad"}
    assert all(len(curves) == 1 for curves in record.curves.values())
    assert record.curves["adamw"][0].setting == tuned["adamw"]["setting"]
    assert "| AdamW | lr" in page.read_text()
    assert (tmp_path / "race.png").stat().st_size > 10_000
    capsys.readouterr()
    assert script.main(["tune", *few]) == script.main(["run", *few, "--seeds", "0", "1"]) == 0
    assert "sgd" not in capsys.readouterr().out  # is tuned already
    seeds = [curve.seed for curve in results.record_of("digits_mlp", tmp_path).curves["natgrad"]]
    assert seeds == [0, 1]


def test_what_is_tried_out_leaves_the_page_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "TRIED_OUT", tmp_path)
    monkeypatch.setattr(script, "rewritten", lambda *_: pytest.fail("the page was rewritten"))
    assert script.main(["table", "--quick"]) == 0


def test_whoever_is_not_installed_is_named_and_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(FIELD, "soap", replace(FIELD["soap"], package="no_such_package"))
    options = ["tune", "--workload", "digits_mlp", "--contestant", "soap", "--quick"]
    assert script.main([*options, "--folder", str(tmp_path)]) == 0
    assert "soap is not installed; see experiments/race/requirements.txt" in capsys.readouterr().out
    assert results.tuned_of("digits_mlp", tmp_path) == {}
