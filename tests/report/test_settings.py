from __future__ import annotations

from written_runs import write_run

from mtrl_imgrad.report.document import document
from mtrl_imgrad.report.groups import select
from mtrl_imgrad.report.results import results
from mtrl_imgrad.report.settings import settings_table
from mtrl_imgrad.run_folder import read_run_folder

DONE = {"reach-v3": 7, "push-v3": 4}


def _results(*folders):
    return results(select([read_run_folder(folder) for folder in folders]))


def _settings(*folders):
    """Group -> field -> value."""
    rows = settings_table(_results(*folders)).rows
    return {label: dict(pair.split("=") for pair in cells.split(", ")) for label, cells in rows}


def _section(text, title):
    return next(" ".join(str(part) for part in section.parts) for section in text.sections if section.title == title)


def test_every_field_of_a_groups_aggregator_is_told(tmp_path):
    """With one group per name no label says them."""
    given = ("--aggregator", "imgrad", "--aggregator.c", "0.25", "--aggregator.variant", "eq9")
    found = _settings(write_run(tmp_path / "a", *given), write_run(tmp_path / "b", "--aggregator", "mean"))
    assert found["mean"] == {"aggregator": "mean"}
    assert found["imgrad"]["aggregator"] == "imgrad"
    assert (found["imgrad"]["aggregator.c"], found["imgrad"]["aggregator.variant"]) == ("0.25", "eq9")


def test_fields_in_which_groups_differ_are_told_of_those_that_read_them(tmp_path):
    found = _settings(
        write_run(tmp_path / "a", "--aggregator", "mean", "--sac.gamma", "0.9"),
        write_run(tmp_path / "b", "--aggregator", "sum"),
        write_run(tmp_path / "c", "--algorithm", "sb3-sac", "--sb3.batch-size", "64"),
    )
    assert found["mean"] == {"aggregator": "mean", "sac.gamma": "0.9"}
    assert found["sum"] == {"aggregator": "sum", "sac.gamma": "0.99"}
    assert found["sb3-sac"].keys() >= {"algorithm", "sb3.gamma", "sb3.learning_rate", "sb3.net_arch"}
    assert found["sb3-sac"]["sb3.batch_size"] == "64"
    assert "sac.gamma" not in found["sb3-sac"]


def test_a_baseline_is_announced_with_its_own_settings(tmp_path):
    ours = write_run(tmp_path / "a", final=DONE)
    baseline = write_run(tmp_path / "b", "--algorithm", "sb3-sac", "--sb3.gamma", "0.9", final=DONE)
    (notice,) = [told for told in document(_results(ours, baseline), []).notices if "stable-baselines3" in told]
    assert all(words in notice for words in ("sb3-sac: ", "gamma 0.9", "batch_size 256", "net_arch 256 256"))
    assert not any("stable-baselines3" in told for told in document(_results(ours), []).notices)


def test_a_seed_fixes_initial_networks_only_for_the_same_algorithm_and_network(tmp_path):
    mean, summed, wide, baseline = (
        write_run(tmp_path / name, *flags, final=DONE)
        for name, flags in {
            "mean": ("--aggregator", "mean"),
            "sum": ("--aggregator", "sum"),
            "wide": ("--aggregator", "mgda", "--network.width", "64"),
            "baseline": ("--algorithm", "sb3-sac"),
        }.items()
    )
    for runs, words in {
        (mean, summed): "A seed fixes goals and initial networks.",
        (mean, baseline): "A seed fixes goals, but not initial networks",
        (mean, wide): "A seed fixes goals, but not initial networks",
        (mean, summed, baseline): "A seed fixes goals, and initial networks where both groups",
    }.items():
        assert words in _section(document(_results(*runs), []), "Differences by seed")


def test_what_computed_the_runs_is_told_where_it_varies(tmp_path):
    one = write_run(tmp_path / "a", "--threads", "1", "--device", "cpu", "--compile", "False", seed=1)
    two = write_run(tmp_path / "b", "--threads", "2", "--device", "cpu", seed=2)
    baseline = write_run(tmp_path / "c", "--algorithm", "sb3-sac", "--threads", "2", "--device", "cpu")
    assert document(_results(one, two), []).facts["Computing"] == "compile: False and True; threads: 1 and 2"
    assert "Computing" not in document(_results(two), []).facts
    # A baseline compiles nothing, whatever its configuration says.
    assert "Computing" not in document(_results(two, baseline), []).facts
