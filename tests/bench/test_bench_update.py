"""`bench update`: the references make the product's update, every variant makes one, and the table follows from the
rounds."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from small_learner import RULES, draw_noise, random_batch, small_learner
from torch import Tensor

from mtrl_imgrad.aggregators import CAGrad
from mtrl_imgrad.bench.update import Figures, Measured, as_json, bench_update, breakdown, ratios, table
from mtrl_imgrad.bench.update_references import (
    Gradient,
    Size,
    StableBaselines3,
    cagrad_by_slsqp,
    cagrad_by_torchjd,
    mean_gradient,
    updated,
)
from mtrl_imgrad.bench.update_variants import (
    MODES,
    PARTS,
    PLAIN,
    SB3,
    SLSQP,
    TORCHJD,
    ReferenceUpdate,
    Update,
    dissected,
    makers,
)
from mtrl_imgrad.cli import main

TINY = Size(tasks=3, rows=4, transitions=20, width=12, depth=2)
OURS = "ours imgrad"
EAGER = [mode for mode, fields in MODES.items() if not fields.get("compile", True)]
FIGURES = Figures(
    variants={
        (PLAIN, "eager"): Measured([10.0, 20.0, 10.0], memory=100.0),
        (OURS, "eager"): Measured([11.0, 30.0, 12.0], memory=350.0),
        (PLAIN, "eager-bfloat16"): Measured([5.0, 5.0, 5.0], memory=80.0),
        (OURS, "eager-bfloat16"): Measured([6.0, 6.0, 6.0], memory=None),
        (SLSQP, "eager"): Measured([60.0, 60.0, 60.0], memory=None),
    },
    parts={part: [1.0, 2.0, 1.0] for part in PARTS},
    dissected=(OURS, "eager"),
    missing="TorchJD CAGrad is left out: pip install it",
    others=0.25,
    threads=2,
)


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-10), (False, 1e-5)])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"network": {"kind": "multi_head", "layer_norm": "affine"}},
        {"network": {"share_encoder": True}},
        {"critic_loss": "categorical", "critic_bins": 11},
        {"weight_decay": 0.3, "shared_temperature": True, "reward_scale": 3.0},
    ],
    ids=["mlp", "multi_head", "shared_encoder", "categorical", "settings"],
)
def test_the_plain_mean_is_the_products_mean(case, double, tolerance):
    learner = small_learner(double=double, rule=RULES["mean"], **case)
    state = {name: value.clone() for name, value in learner.state.items()}
    for seed in range(3):
        batch, noise = random_batch(seed, dtype=state["actor"].dtype), draw_noise(learner, seed)
        state |= updated(learner.sac, mean_gradient, state, batch, noise)
        learner.update(batch, noise)
    for name, value in state.items():
        torch.testing.assert_close(value, learner.state[name], rtol=tolerance, atol=tolerance, msg=name)


def first_direction(state: dict[str, Tensor], name: str) -> Tensor:
    """After one step Adam's first moment is a tenth of the gradient."""
    return state[f"{name}/m"] / 0.1


def slsqp_gradient() -> tuple[Gradient, float]:
    return cagrad_by_slsqp, 1.0


def torchjd_gradient() -> tuple[Gradient, float]:
    pytest.importorskip("torchjd")
    return cagrad_by_torchjd(), 1 + CAGrad().c ** 2  # TorchJD leaves the direction as long as it is


@pytest.mark.parametrize("reference", [slsqp_gradient, torchjd_gradient], ids=["slsqp", "torchjd"])
@pytest.mark.parametrize("seed", [1, 2])
def test_other_codes_find_the_direction_of_our_cagrad(reference, seed):
    gradient, length = reference()
    learner = small_learner(double=True, rule=CAGrad())
    batch, noise = random_batch(seed, dtype=torch.float64), draw_noise(learner, seed)
    state = updated(learner.sac, gradient, dict(learner.state), batch, noise)
    mean = first_direction(updated(learner.sac, mean_gradient, dict(learner.state), batch, noise), "critic")
    learner.update(batch, noise)
    for name in ("critic", "actor"):
        ours, theirs = first_direction(learner.state, name), first_direction(state, name) / length
        assert float((ours - theirs).norm() / ours.norm()) < 1e-3, name
    ours = first_direction(learner.state, "critic")
    assert float((ours - mean).norm() / mean.norm()) > 0.1, "the mean would do as well"


def test_every_variant_makes_updates():
    ways, missing = makers(TINY, ("imgrad", "graddrop", "adatask", "famo"), EAGER)
    assert not missing
    assert [name for name, mode in ways if mode == "eager"][-3:] == [SLSQP, TORCHJD, SB3]
    assert {name for name, mode in ways if mode == "eager-bfloat16"} == {
        name for name, _ in ways if name == PLAIN or name.startswith("ours ")
    }
    for way, make in ways.items():
        update = make()
        if isinstance(update, Update):
            before = {name: value.clone() for name, value in update.learner.state.items()}
            update()
            update()
            assert float(update.learner.state["updates"]) == 2, way
            for name in ("critic", "actor", "log_alpha", "target_critic"):
                assert not update.learner.state[name].equal(before[name]), (way, name)
                assert update.learner.state[name].isfinite().all(), (way, name)


def test_variants_share_no_memory():
    ways, _ = makers(TINY, ("imgrad",), ("eager",))
    made = [make() for (name, _), make in ways.items() if name != SB3]
    pointers = [value.data_ptr() for update in made for value in update.learner.state.values()]
    assert len(set(pointers)) == len(pointers)
    assert len({update.replay.observations.data_ptr() for update in made}) == len(made)


def test_a_batch_has_the_shapes_of_meta_world():
    update = Update(TINY, RULES["mean"], MODES["eager"])
    batch, noise = update.sample()
    assert batch.observations.shape == (3, 4, 39)
    assert batch.actions.shape == (3, 4, 4)
    assert update.learner.sac.inputs.size == 39 + 3
    assert batch.rewards.std() > 0
    assert (batch.discounts == 0.99).all(), "every transition bootstraps"
    assert noise.actions.shape == (2, 3, 4, 4)
    assert Size(10).rows == 128
    assert (Size(10).depth, Size(10).width) == (3, 400)


def test_stable_baselines3_has_the_same_network_and_total_batch(monkeypatch):
    update = StableBaselines3(TINY)
    sizes = []
    sample = update.sac.replay_buffer.sample
    monkeypatch.setattr(
        update.sac.replay_buffer, "sample", lambda rows, env=None: sizes.append(rows) or sample(rows, env=env)
    )
    shapes = [tuple(layer.weight.shape) for layer in update.sac.critic.q_networks[0] if hasattr(layer, "weight")]
    assert shapes == [(12, 39 + 3 + 4), (12, 12), (1, 12)]
    before = [parameter.clone() for parameter in update.sac.policy.parameters()]
    update()
    assert sizes == [3 * 4]
    assert any(not new.equal(old) for new, old in zip(update.sac.policy.parameters(), before, strict=True))


@pytest.mark.parametrize("rule", ["imgrad", "graddrop"])
def test_the_parts_together_are_the_products_update(rule):
    apart, whole = (Update(TINY, RULES[rule], MODES["eager"]) for _ in range(2))
    parts = [dissected(apart) for _ in range(3)]
    for _ in range(3):
        whole()
    for name in ("critic", "actor", "target_critic", "updates"):
        torch.testing.assert_close(apart.learner.state[name], whole.learner.state[name], msg=name)
    assert all(list(each) == list(PARTS) for each in parts)
    assert all(value > 0 for each in parts for part, value in each.items() if part != "J"), "J is a difference"


def test_a_ratio_compares_within_a_round_and_the_medians():
    assert ratios(FIGURES, (OURS, "eager"), (PLAIN, "eager")) == pytest.approx((1.2, 1.2))  # 1.1, 1.5 and 1.2; 12 / 10
    assert ratios(FIGURES, (SLSQP, "eager"), (OURS, "eager")) == pytest.approx((5.0, 5.0))  # 60 / 11, 2 and 5; 60 / 12
    assert ratios(FIGURES, (SB3, "eager"), (OURS, "eager")) is None


def test_the_table_has_a_line_per_variant_with_ratios_to_the_plain_mean_of_its_mode_first():
    titles, units, *lines, missing = table(FIGURES).splitlines()
    assert len({len(line) for line in (titles, units, *lines)}) == 1, "columns are not aligned"
    assert missing == FIGURES.missing
    cells = {line[:32].strip(): line[32:].split() for line in lines}
    assert list(cells) == [f"{name}, {mode}" for name, mode in FIGURES.variants]
    #                                        x mean          ms                above  times as fast as
    assert cells[f"{OURS}, eager"] == ["1.20", "1.20", "12.00", "11.00", "250", "5.00", "-", "-"]
    assert cells[f"{OURS}, eager-bfloat16"] == ["1.20", "1.20", "6.00", "6.00", "-", "10.00", "-", "-"]
    assert cells[f"{SLSQP}, eager"] == ["6.00", "6.00", "60.00", "60.00", "-", "1.00", "-", "-"]


def test_the_breakdown_has_every_part_and_what_they_leave():
    title, *lines = breakdown(FIGURES).splitlines()
    assert title.startswith(f"parts of {OURS}, eager: 12.00 ms")
    assert [line.split("  ")[1].strip() for line in lines] == [*PARTS, "not covered"]
    assert lines[0].split()[1:] == ["1.00", "ms", "8.3%"]
    assert lines[-1].split()[2:5] == ["4.00", "ms", "33.3%"]
    nothing = Figures({}, {}, (OURS, "eager"), "", 0.0, 1)
    assert breakdown(nothing).startswith("no breakdown: ")


def test_json_has_every_round_and_what_it_was_measured_on():
    written = json.loads(as_json(FIGURES, {"benchmark": "mt10"}))
    assert written["settings"] == {"benchmark": "mt10"}
    assert written["variants"][1] == {
        "name": OURS, "mode": "eager", "milliseconds": [11.0, 30.0, 12.0], "memory": 350.0
    }  # fmt: skip
    assert written["parts"]["of"] == [OURS, "eager"]
    assert written["parts"]["milliseconds"]["J"] == [1.0, 2.0, 1.0]
    assert written["threads"] == 2
    assert written["machine"]["versions"]["torch"] == torch.__version__


def test_torchjd_is_left_out_with_a_line_where_it_is_not_installed(monkeypatch):
    import_module = importlib.import_module

    def absent(name: str, package: str | None = None):
        if name.startswith("torchjd"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    figures = bench_update(TINY, ("cagrad",), ("eager",), 1)
    assert [name for name, _ in figures.variants] == [PLAIN, "ours mean", "ours cagrad", SLSQP, SB3]
    assert table(figures).splitlines()[-1].startswith("TorchJD CAGrad is left out: pip install 'mtrl_imgrad[torchjd]'")
    with pytest.raises(ValueError, match="options: TorchJD CAGrad is left out"):
        bench_update(TINY, ("cagrad",), ("eager",), 1, names=(TORCHJD,))


def test_variants_take_turns_after_a_warm_up(monkeypatch):
    order = []
    count = ReferenceUpdate.__call__
    monkeypatch.setattr(ReferenceUpdate, "__call__", lambda self: order.append("reference") or count(self))
    monkeypatch.setattr(StableBaselines3, "__call__", lambda self: order.append("sb3"))
    before = torch.get_num_threads()
    figures = bench_update(TINY, ("imgrad",), ("eager",), 3, names=(PLAIN, SB3), threads=2)
    assert order == ["reference", "sb3"] * 5
    assert all(len(one.milliseconds) == 3 for one in figures.variants.values())
    assert figures.parts == {}, "our update was not asked for"
    assert (figures.threads, torch.get_num_threads()) == (2, before)


def test_the_command_measures_and_writes(tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = ["--aggregator", "cagrad", "--batch-per-task", "2", "--repeats", "2", "--options", PLAIN, "ours cagrad"]
    flags += ["--mode", "eager"]
    assert main(["bench", "update", *flags, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("MT10, 2 transitions of each task, networks 3 x 400, 1 threads, 2 rounds\n")
    assert "\nparts of ours cagrad, eager: " in said
    assert "\nother programs used " in said
    written = json.loads(path.read_text())
    plain, ours = written["variants"]
    assert (plain["name"], ours["name"]) == (PLAIN, "ours cagrad")
    assert all(len(one["milliseconds"]) == 2 and min(one["milliseconds"]) > 0 for one in (plain, ours))
    assert min(plain["memory"], ours["memory"]) > 0
    assert ours["memory"] - plain["memory"] > 10, "ten rows of J alone are 40 MB"
    assert {len(rounds) for rounds in written["parts"]["milliseconds"].values()} == {2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--repeats 0", "repeats: 0 is not between 1 and 100000"),
        ("--batch-per-task 0", "batch_per_task: 0 is not between 1 and 1048576"),
        ("--threads -1", "threads: -1 is not between 0 and 1024"),
        ("--aggregator", "aggregator: at least one is needed"),
        ("--mode", "mode: at least one is needed"),
        ("--aggregator imgard", "aggregator: got 'imgard'; did you mean 'imgrad'?"),
        ("--options fastest", "options: there is no 'fastest'; there are 'plain mean', 'ours mean', 'ours imgrad', "),
        ("--benchmark mt20", "--benchmark"),
        ("--mode fast", "--mode"),
        ("--steps 3", "--steps"),
        ("--json nowhere/figures.json", "json: there is no folder nowhere"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "update", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 2


def test_compiled_variants_make_the_eager_ones_updates():
    ways, _ = makers(TINY, ("imgrad",), ("eager", "compiled"))
    for name in (PLAIN, OURS):
        eager, compiled = ways[name, "eager"](), ways[name, "compiled"]()
        compiled.random.set_state(eager.random.get_state())
        eager()
        compiled()
        for entry in ("critic/m", "actor/m", "log_alpha"):
            found, expected = compiled.learner.state[entry], eager.learner.state[entry]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=f"{name}: {entry}")
