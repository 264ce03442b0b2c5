from __future__ import annotations

import os

import pytest
from written_runs import VERSIONS, write_run

from mtrl_imgrad.report.groups import select
from mtrl_imgrad.run_folder import read_run_folder

DONE = {"reach-v3": 7, "push-v3": 4}


def _select(*folders):
    return select([read_run_folder(folder) for folder in folders])


def _labels(selection):
    return {group.label: sorted(group.runs) for group in selection.groups}


def test_runs_of_one_configuration_are_seeds_of_one_group(tmp_path):
    neutral = ["--threads", "1", "--log.every", "7", "--eval.every", "50", "--checkpoint.every", "9"]
    more = ["--envs.workers", "0", "--envs.fast", "False", "--envs.self-check", "off", "--compile", "False"]
    selection = _select(
        write_run(tmp_path / "a", seed=2),
        write_run(tmp_path / "b", *neutral, *more, "--jacobian", "chunked", "--run-dir", "elsewhere", seed=1),
    )
    assert _labels(selection) == {"imgrad": [1, 2]}
    assert not selection.left_out


def test_groups_are_named_by_their_aggregator_in_alphabetical_order(tmp_path):
    names = ("pcgrad", "cagrad", "mean")
    selection = _select(*(write_run(tmp_path / name, "--aggregator", name) for name in names))
    assert list(_labels(selection)) == ["cagrad", "mean", "pcgrad"]


def test_groups_of_one_name_are_told_apart_by_the_fields_that_differ(tmp_path):
    selection = _select(
        write_run(tmp_path / "a", "--aggregator.variant", "eq9"),
        write_run(tmp_path / "b", "--sac.gamma", "0.9"),
        write_run(tmp_path / "c", "--aggregator", "mean"),
    )
    assert list(_labels(selection)) == [
        "imgrad variant=eq9 sac.gamma=0.99",
        "imgrad variant=official sac.gamma=0.9",
        "mean",
    ]
    assert list(selection.other_differences) == ["sac.gamma"]


def test_a_baseline_is_named_by_its_algorithm_and_what_it_does_not_read_does_not_matter(tmp_path):
    """Overlays say what the baseline ignores; only what it reads can make another group."""
    (tmp_path / "other.yaml").write_text("sac: {gamma: 0.5}\nnetwork: {width: 8}\naggregator: {name: mean}\n")
    ours = write_run(tmp_path / "ours")
    plain = write_run(tmp_path / "a", "--algorithm", "sb3-sac", seed=1)
    other = write_run(tmp_path / "b", "--config", str(tmp_path / "other.yaml"), "--algorithm", "sb3-sac", seed=2)
    slower = write_run(tmp_path / "c", "--algorithm", "sb3-sac", "--sb3.gamma", "0.9", seed=1)
    selection = _select(ours, plain, other)
    assert _labels(selection) == {"imgrad": [1], "sb3-sac": [1, 2]}
    assert selection.other_differences == {}
    assert list(_labels(_select(plain, slower))) == ["sb3-sac sb3.gamma=0.9", "sb3-sac sb3.gamma=0.99"]


@pytest.mark.parametrize(
    ("name", "different"),
    [
        ("protocol", {"flags": ["--eval.horizon", "50"]}),
        ("protocol", {"flags": ["--benchmark.goals", "3"]}),
        ("reward", {"flags": ["--benchmark.reward", "v1"]}),
        ("tasks", {"tasks": ("reach-v3", "door-open-v3")}),
        ("budget", {"steps": 2000}),
        ("Meta-World version", {"versions": VERSIONS | {"metaworld": "3.0.0"}}),
        ("MuJoCo version", {"versions": VERSIONS | {"mujoco": "3.2.0"}}),
    ],
)
def test_what_must_not_be_mixed_is_left_out_and_named(tmp_path, name, different):
    kept = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in (1, 2)]
    other = write_run(tmp_path / "other", *different.pop("flags", ()), seed=3, **different)
    selection = _select(other, *kept)
    assert _labels(selection) == {"imgrad": [1, 2]}
    (left_out,) = selection.left_out
    assert left_out.path == other
    assert name in left_out.reason
    assert "instead of" in left_out.reason


def test_of_two_equally_large_sets_the_newest_is_kept(tmp_path):
    old, new = write_run(tmp_path / "a", steps=1000), write_run(tmp_path / "b", steps=2000)
    for folder, time in ((old, 1_000), (new, 2_000)):
        for file in folder.iterdir():
            os.utime(file, (time, time))
    for order in ((old, new), (new, old)):
        selection = _select(*order)
        assert [run.path for run in selection.runs] == [new]


def test_of_two_runs_of_one_seed_the_one_that_is_further_is_kept(tmp_path):
    going = write_run(tmp_path / "a", progress=[{"step": 900}])
    behind = write_run(tmp_path / "b", progress=[{"step": 100}])
    assert [run.path for run in _select(behind, going).runs] == [going]
    done = write_run(tmp_path / "c", final=DONE)
    selection = _select(behind, done, going)
    assert [run.path for run in selection.runs] == [done]
    assert {item.path for item in selection.left_out} == {going, behind}
    assert all("same settings and seed" in item.reason for item in selection.left_out)
