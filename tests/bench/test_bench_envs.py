"""`bench envs`: every option does the steps it says, and the table follows from the rounds."""

from __future__ import annotations

import json

import numpy as np
import psutil
import pytest

from mtrl_imgrad.bench.env_option import OPTIONS, Physics
from mtrl_imgrad.bench.envs import BASELINE, LIMIT, Measured, Option, as_json, bench_envs, disturbance, ratio, table
from mtrl_imgrad.cli import main

ROUNDS = {
    BASELINE: Measured(7.0, 0.0, 400.0, [4.0, 6.0, 5.0], [80.0, 90.0, 85.0]),
    "ours, 2 workers": Measured(2.0, 3.0, 500.0, [1.0, 2.0, 1.0], [2.0, 2.0, 1.0]),
    LIMIT: Measured(2.0, 0.0, 300.0, [0.8, 1.0, 0.9]),
    "empty: ours, 2 workers": Measured(0.3, 0.0, 100.0, [0.1, 0.1, 0.2], [0.2, 0.2, 0.2]),
}


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def test_ratios_compare_within_a_round_and_the_fastest_runs():
    assert ratio(ROUNDS, "ours, 2 workers", BASELINE) == (4.0, 4.0)  # 4, 3 and 5 times; 4 / 1
    assert ratio(ROUNDS, "ours, 2 workers", LIMIT) == pytest.approx((0.8, 0.8))  # 0.8, 0.5 and 0.9; 0.8 / 1
    assert ratio(ROUNDS, BASELINE, BASELINE) == (1.0, 1.0)
    assert ratio({"ours, 2 workers": ROUNDS["ours, 2 workers"]}, "ours, 2 workers", BASELINE) is None


def test_the_table_has_a_line_per_option_with_ratios_first():
    titles, units, *lines = table(ROUNDS, rows=10).splitlines()
    assert len({len(line) for line in (titles, units, *lines)}) == 1, "columns are not aligned"
    assert [line[:22].strip() for line in lines] == list(ROUNDS)
    ours = lines[1][22:].split()
    #                  x sync          of limit        ms              longest steps/s   MB     s
    assert ours == ["4.00", "4.00", "0.80", "0.80", "1.000", "1.000", "2.0", "10,000", "500", "2.0"]
    assert lines[2][22:].split()[6] == "-"
    assert lines[3][22:].split()[:4] == ["-"] * 4, "no tasks are no Meta-World"


def test_it_says_how_busy_the_machine_was_with_other_things():
    busy = {
        "a": Measured(1.0, 0.0, others=[0.5, 1.5]),
        "b": Measured(1.0, 0.0, others=[0.25]),
    }
    assert disturbance(busy).startswith("other programs used 0.5 of ")
    assert disturbance(busy).endswith("(median; at most 1.5)")


def test_json_has_every_round_and_what_it_was_measured_on():
    written = json.loads(as_json(ROUNDS, {"benchmark": "mt10"}))
    assert written["settings"] == {"benchmark": "mt10"}
    assert written["options"]["ours, 2 workers"]["milliseconds"] == [1.0, 2.0, 1.0]
    assert written["machine"]["versions"]["metaworld"] == "3.1.1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 750", "steps: 750 is neither between 1 and 500 nor a multiple of 500"),
        ("--repeats 0", "repeats: 0 is not between 1 and 100000"),
        ("--options fastest", "options: there is no 'fastest'; there are 'metaworld sync', "),
        ("--benchmark mt20", "--benchmark"),
        ("--json nowhere/figures.json", "json: there is no folder nowhere"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "envs", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 2


def test_an_option_that_fails_is_named_with_its_last_words():
    option = Option("no such option", "MT10", 5, 5)
    with pytest.raises(ChildProcessError, match="bench: no such option ended with exit code 1: KeyError: 'no such"):
        option.ask("construct")
    option.close()


@pytest.mark.parametrize("in_step", [False, True])
def test_the_limit_is_the_physics_of_the_episode_and_nothing_else(in_step):
    """Played again, the recorded controls lead where Meta-World's own steps led: it raises otherwise."""
    physics = Physics("MT10", seed=1, horizon=3, threads=2, in_step=in_step)
    ends = [episode._data.qpos.copy() for episode in physics._episodes]
    physics.run(2)
    for episode, end in zip(physics._episodes, ends, strict=True):
        np.testing.assert_array_equal(episode._data.qpos, end)
        np.testing.assert_array_equal(end, episode._end)
    physics._episodes[0]._controls[0][0][:] += 0.1
    with pytest.raises(RuntimeError, match="did not come out"):
        physics._episodes[0].timed()
    physics._threads.shutdown()


def test_options_are_measured_in_turn(tmp_path, capsys, monkeypatch):
    asked = []

    def ask_and_note(option: Option, request: str) -> dict[str, float]:
        asked.append((request, option.name))
        return ask(option, request)

    ask = Option.ask
    monkeypatch.setattr(Option, "ask", ask_and_note)
    path = tmp_path / "figures.json"
    names = ["ours, 1 worker", "physics, 1 thread", "empty: ours, 2 workers"]
    assert main(["bench", "envs", "--steps", "3", "--repeats", "2", "--options", *names, "--json", str(path)]) == 0
    assert asked[6:] == [("run", name) for name in names] * 2, "a round has every option once"
    said = capsys.readouterr().out
    assert said.startswith("MT10, runs of 3 vector steps")
    assert "\nother programs used " in said
    options = json.loads(path.read_text())["options"]
    assert list(options) == names
    for option in options.values():
        assert len(option["milliseconds"]) == 2
        assert min(option["milliseconds"]) > 0
        assert option["construction"] > 0
        assert option["memory"] > 20
    ours, limit, _ = options.values()
    assert len(ours["longest"]) == 2
    assert all(longest >= mean for longest, mean in zip(ours["longest"], ours["milliseconds"], strict=True))
    assert limit["longest"] == [], "only what resets has steps of different length"


@pytest.mark.slow
def test_every_option_can_be_measured():
    measured = bench_envs("MT10", steps=3, repeats=1)
    assert list(measured) == list(OPTIONS)
    assert all(one.milliseconds[0] > 0 for one in measured.values())
