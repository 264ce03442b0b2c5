from __future__ import annotations

import errno
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from scipy import stats
from written_runs import write_run

from mtrl_imgrad import cli
from mtrl_imgrad.report.command import console_text, write_report
from mtrl_imgrad.report.diagnostics import lines
from mtrl_imgrad.report.groups import select
from mtrl_imgrad.report.results import results
from mtrl_imgrad.report.tables import reach_table, verdict
from mtrl_imgrad.run_folder import find_run_folders, read_run_folder

# Goals reached of 10 on reach-v3 and push-v3, by seed: means over tasks 0.7, 0.8, 0.9 and 0.5, 0.7, 0.6
CAGRAD = {1: (8, 6), 2: (9, 7), 3: (10, 8)}
MEAN = {1: (6, 4), 2: (8, 6), 3: (7, 5)}


def _group(folder, aggregator, by_seed, **more):
    for seed, (reach, push) in by_seed.items():
        final = {"reach-v3": reach, "push-v3": push}
        write_run(folder / f"{aggregator}-{seed}", "--aggregator", aggregator, seed=seed, final=final, **more)


def _results(folder):
    return results(select([read_run_folder(path) for path in find_run_folders([folder])]))


def _page(folder: Path) -> ElementTree.Element:
    text = (folder / "index.html").read_text()
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _tables(folder: Path) -> dict[str, list[list[str]]]:
    """Section title -> rows of its first table."""
    found = {}
    for section in _page(folder).iter("section"):
        table = section.find(".//tbody")
        if table is not None:
            rows = [["".join(cell.itertext()).replace("\xa0", " ") for cell in row] for row in table.iter("tr")]
            found[section.findtext("h2")] = rows
    return found


@pytest.fixture
def two_groups(tmp_path):
    runs = tmp_path / "runs"
    _group(runs, "cagrad", CAGRAD, training={500: 2, 1000: 4})
    _group(runs, "mean", MEAN, training={500: 1, 1000: 2})
    write_report([runs], tmp_path / "report")
    return tmp_path / "report"


def test_known_numbers_stand_in_the_tables(two_groups):
    tables = _tables(two_groups)
    # Means 0.8 and 0.6, standard deviation 0.1: 4.303 x 0.1 / sqrt(3) = 0.248 on either side, cut at 1.
    # Interquartile mean: the lowest and the highest of six scores are cut.
    cagrad, mean = tables["Final success"]
    assert cagrad[:3] == ["cagrad", "3 of 3", "0.80 [0.55, 1.00]"]
    assert cagrad[3].startswith("0.80 [")
    assert cagrad[4] == "1: 0.70, 2: 0.80, 3: 0.90"
    assert mean[:3] == ["mean", "3 of 3", "0.60 [0.35, 0.85]"]
    # Differences 0.2, 0.1, 0.3: t = 0.2 sqrt(3) / 0.1 = 3.464 with 2 degrees of freedom
    assert tables["Differences by seed"] == [
        ["cagrad minus mean", "3", "+0.20 [-0.05, +0.45]", "0.074", "1: +0.20, 2: +0.10, 3: +0.30"]
    ]
    assert tables["Tasks"][0] == ["reach-v3", "0.90 (0.80 to 1.00)", "0.70 (0.60 to 0.80)"]
    assert tables["Tasks"][-1] == ["mean over tasks", "0.80 (0.70 to 0.90)", "0.60 (0.50 to 0.70)"]
    # reach: 0.8 0.9 1.0 against 0.6 0.8 0.7 wins 8.5 of 9; push: 0.6 0.7 0.8 against 0.4 0.6 0.5 the same
    assert tables["Probability of improvement"][0][2].startswith("0.94 [")
    assert tables["Probability of improvement"][1][1].startswith("0.06 [")
    assert tables["Probability of improvement"][0][1] == "-"


def test_steps_to_reach_come_from_the_curve_and_may_be_infinite(two_groups, read_csv):
    rows = _tables(two_groups)["Steps to reach a success rate"]
    # 4 of 5 goals at step 1000 is 80 %; 2 of 5 is never 50 %
    assert [row[:5] for row in rows] == [
        ["cagrad", "50 %", "3 of 3", "1,000", "1,000"],
        ["cagrad", "80 %", "3 of 3", "1,000", "1,000"],
        ["mean", "50 %", "0 of 3", "not reached", "1,000"],
        ["mean", "80 %", "0 of 3", "not reached", "1,000"],
    ]
    steps = [row["step"] for row in read_csv(two_groups / "steps_to_reach.csv")]
    assert steps == ["1000"] * 6 + [""] * 6


def test_csv_files_have_every_seed_and_task(two_groups, read_csv):
    final = {(r["group"], r["seed"], r["task"]): float(r["success"]) for r in read_csv(two_groups / "final.csv")}
    assert len(final) == 12
    assert final["mean", "2", "push-v3"] == 0.6
    curves = [(r["group"], r["seed"], r["step"], float(r["success"])) for r in read_csv(two_groups / "curves.csv")]
    assert ("cagrad", "3", "1000", 0.8) in curves
    difference = next(r for r in read_csv(two_groups / "pairs.csv") if r["quantity"] == "difference by seed")
    assert float(difference["value"]) == pytest.approx(0.2)
    assert float(difference["low"]) == pytest.approx(0.2 - stats.t.ppf(0.975, 2) * 0.1 / 3**0.5)


def test_the_page_says_what_its_numbers_are_about(two_groups):
    text = " ".join("".join(_page(two_groups).itertext()).split())
    for words in (
        "custom (v2 reward, horizon 100, 10 goals)",
        "1,000 simulator steps per task, 2,000 over all tasks",
        "2: reach-v3, push-v3",
        "3 per group, 6 runs",
        "Meta-World 3.1.1, MuJoCo 3.3.0",
        "visit 5 goals of each task",
        "about 95 % would contain the value of infinitely many seeds",
        "No difference shown",
        "mtrl-imgrad train --seed 2",
    ):
        assert words in text, words


def test_the_page_needs_nothing_from_elsewhere(two_groups):
    root = _page(two_groups)
    targets = [element.get(name, "") for element in root.iter() for name in ("src", "href") if element.get(name)]
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not list(root.iter("script"))
    style = "".join(element.text or "" for element in root.iter("style"))
    assert "url(" not in style
    assert "@import" not in style
    anchors = {element.get("id") for element in root.iter("section")}
    assert {t.removeprefix("#") for t in targets if t.startswith("#")} == anchors
    assert all(image.get("alt") for image in root.iter("img"))
    for svg in (two_groups / "figures").glob("*.svg"):
        links = re.findall(r'(?:href|src)="([^"]*)"', svg.read_text())
        assert all(link.startswith(("#", "data:")) for link in links), svg


def test_every_figure_is_there_as_png_and_svg(two_groups):
    names = {path.stem for path in (two_groups / "figures").iterdir()}
    assert names == {"final", "curves", "curves_by_seed", "tasks", "differences", "improvement"}
    for name in names:
        assert (two_groups / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.fromstring((two_groups / "figures" / f"{name}.svg").read_text())


def test_the_same_runs_give_the_same_bytes(tmp_path, two_groups):
    write_report([tmp_path / "runs"], tmp_path / "again")
    files = sorted(path.relative_to(two_groups) for path in two_groups.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    for file in files:
        assert (two_groups / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_an_unfinished_run_counts_in_the_curve_and_its_final_success_is_missing(tmp_path):
    _group(tmp_path / "runs", "mean", {1: (6, 4), 2: (8, 6)}, training={250: 1, 500: 2, 1000: 4})
    going = {"training": {250: 3, 500: 4}, "progress": [{"step": 600, "time/elapsed": 60.0}]}
    write_run(tmp_path / "runs" / "going", "--aggregator", "mean", seed=3, **going)
    report = write_report([tmp_path / "runs"], tmp_path / "report")
    assert report.final.rows[0][:2] == ("mean", "2 of 3")
    assert "No final success yet: mean seed 3 (at step 600 of 1,000)." in report.final.notes
    assert any("Not finished: 1 of 3 runs" in notice for notice in report.notices)
    curve = _results(tmp_path / "runs").curves["mean"]
    assert curve.steps.tolist() == [250, 500]
    assert [estimate.value for estimate in curve.estimates] == pytest.approx([1 / 3, 1.6 / 3])


def test_a_run_that_was_trained_beyond_its_plan_has_no_final_success(tmp_path):
    """Otherwise a success after 1500 steps would stand among those after 1000."""
    _group(tmp_path / "runs", "mean", {1: (6, 4)}, training={500: 2, 1000: 4})
    write_run(
        tmp_path / "runs" / "longer", "--aggregator", "mean", seed=2, steps=1500, final={"reach-v3": 9, "push-v3": 9}
    )
    config = tmp_path / "runs" / "longer" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 1500", "steps: 1000"))
    report = write_report([tmp_path / "runs"], tmp_path / "report")
    assert report.final.rows[0][1:3] == ("1 of 2", "0.50")
    assert any("mean seed 2 (trained to step 1,500, beyond the 1,000 of" in note for note in report.final.notes)


def test_a_run_without_a_shared_evaluation_is_named_and_the_others_have_their_curve(tmp_path):
    _group(tmp_path / "runs", "mean", {1: (6, 4), 2: (8, 6)}, training={500: 1, 1000: 4})
    write_run(tmp_path / "runs" / "odd", "--aggregator", "mean", seed=3, training={333: 5})
    report = write_report([tmp_path / "runs"], tmp_path / "report")
    curve = _results(tmp_path / "runs").curves["mean"]
    assert (list(curve.by_seed), curve.steps.tolist(), curve.left_out) == ([1, 2], [500, 1000], (3,))
    assert any("Not in the curves: mean seed 3" in notice for notice in report.notices)


def test_runs_that_have_only_begun_make_a_report(tmp_path):
    write_run(tmp_path / "runs" / "a")
    report = write_report([tmp_path / "runs"], tmp_path / "report")
    assert report.final.rows == (("imgrad", "0 of 1", "-", "-", "-"),)
    assert "No run was evaluated during training" in (tmp_path / "report" / "report.md").read_text()


def test_one_seed_has_no_interval_and_the_page_says_why(tmp_path):
    _group(tmp_path / "runs", "mean", {1: (6, 4)}, training={1000: 4})
    _group(tmp_path / "runs", "cagrad", {1: (8, 4)}, training={1000: 4})
    report = write_report([tmp_path / "runs"], tmp_path / "report")
    assert [row[2] for row in report.final.rows] == ["0.60", "0.50"]
    assert any("one run says nothing about how runs differ" in note for note in report.final.notes)
    assert report.verdict[0] == "Of 1 difference, 0 have an interval, and none excludes 0."


def test_only_runs_with_equal_goals_are_paired(tmp_path):
    _group(tmp_path / "runs", "cagrad", {1: (8, 6), 2: (9, 7)})
    _group(tmp_path / "runs", "mean", {1: (6, 4)})
    write_run(
        tmp_path / "runs" / "x", "--aggregator", "mean", seed=2, final={"reach-v3": 1, "push-v3": 1}, goals={"a": 1}
    )
    (pair,) = _results(tmp_path / "runs").pairs
    assert pair.other_goals == (2,)
    assert pair.difference is not None
    assert pair.difference.by_seed == pytest.approx({1: 0.2})
    assert "not compared by seed" not in " ".join(verdict([pair]))


@pytest.mark.parametrize(
    ("pcgrad", "remain"),
    [
        # p = 0.0004, 0.035, 0.24: the second is below 0.05, and above 0.05 / 2
        ({1: (8, 7), 2: (8, 7), 3: (8, 8), 4: (5, 5)}, {("cagrad", "mean")}),
        # p = 0.0004, 0.022, 0.64: the second is above 0.05 / 3, and below 0.05 / 2
        ({1: (6, 6), 2: (8, 7), 3: (10, 9), 4: (7, 6)}, {("cagrad", "mean"), ("mean", "pcgrad")}),
    ],
)
def test_holm_s_correction(tmp_path, pcgrad, remain):
    _group(tmp_path / "runs", "mean", {1: (5, 5), 2: (6, 6), 3: (7, 6), 4: (5, 4)})
    _group(tmp_path / "runs", "cagrad", {1: (7, 7), 2: (9, 8), 3: (9, 8), 4: (7, 6)})
    _group(tmp_path / "runs", "pcgrad", pcgrad)
    pairs = _results(tmp_path / "runs").pairs
    assert {(pair.a, pair.b) for pair in pairs if pair.holm} == remain
    assert sum(pair.excludes_zero for pair in pairs) == 2
    text = " ".join(verdict(pairs))
    assert "These are 3 comparisons at once" in text
    assert "these remain: cagrad above mean" in text


def test_gradients_and_cost_are_reported(tmp_path):
    tags = ("cosine_mean", "norm_ratio", "weight/reach-v3", "weight/push-v3")
    rows = [
        {"step": step, "time/elapsed": elapsed, "time/update_ms": 4.0, "time/stepping_ms": 2.0}
        | {f"gradients/{side}/{tag}": 0.5 for side in ("critic", "actor") for tag in tags}
        for step, elapsed in ((200, 60.0), (400, 120.0), (600, 150.0), (1000, 390.0))
    ]
    # Resumed twice from 400 and once from 600: 120 s, nothing, 150 s and 390 s, though the clock never falls.
    _group(tmp_path / "runs", "mean", {1: (6, 4)}, progress=rows, starts=(0, 400, 400, 600))
    write_report([tmp_path / "runs"], tmp_path / "report")
    assert _tables(tmp_path / "report")["Cost"] == [["mean", "1 of 1", "11.0", "4.00", "2.00"]]
    figures = {path.stem for path in (tmp_path / "report" / "figures").iterdir()}
    assert {"diagnostics", "weights"} <= figures


def test_a_run_without_rows_leaves_the_gradients_of_the_others(tmp_path):
    tags = ("cosine_mean", "weight/reach-v3", "weight/push-v3")
    rows = [
        {"step": step} | {f"gradients/{side}/{tag}": value for side in ("critic", "actor") for tag in tags}
        for step, value in ((500, 0.25), (1000, 0.5))
    ]
    _group(tmp_path / "runs", "mean", {1: (6, 4), 2: (8, 6)}, progress=rows)
    write_run(tmp_path / "runs" / "begun", "--aggregator", "mean", seed=3, progress=[{"step": 100}])
    write_report([tmp_path / "runs"], tmp_path / "report")
    (group,) = _results(tmp_path / "runs").groups
    line = lines(group.group, "gradients/critic/cosine_mean")
    assert line is not None
    assert (line.seeds, line.mean.tolist()) == ((1, 2), [0.25, 0.5])
    captions = [caption.text or "" for caption in _page(tmp_path / "report").iter("figcaption")]
    assert sum("Runs with these rows: mean 2 of 3." in caption for caption in captions) == 2


def test_fifty_tasks_are_all_in_table_and_heat_map(tmp_path):
    tasks = [f"task-number-{i}-v3" for i in range(50)]
    final = {task: i % 11 for i, task in enumerate(tasks)}
    write_run(tmp_path / "runs" / "a", tasks=tasks, final=final)
    write_report([tmp_path / "runs"], tmp_path / "report")
    rows = _tables(tmp_path / "report")["Tasks"]
    assert [row[0] for row in rows] == [*tasks, "mean over tasks"]
    assert [row[1] for row in rows[:3]] == ["0.00", "0.10", "0.20"]


HOSTILE = '<script>alert("$x_1$")</script>|`a`\x1b[31m&amp;'


def test_text_from_files_stays_text(tmp_path):
    runs = [
        write_run(tmp_path / "runs" / f"s{s}", tasks=[HOSTILE, "b"], final={HOSTILE: 3 + s, "b": 4}, seed=s)
        for s in (1, 2)
    ]
    (runs[0] / "command.txt").write_text(f"mtrl-imgrad train {HOSTILE}\n")
    report = write_report([tmp_path / "runs"], tmp_path / "report")
    root = _page(tmp_path / "report")
    assert not list(root.iter("script"))
    shown = HOSTILE.replace("\x1b", " ")
    assert _tables(tmp_path / "report")["Tasks"][0][0] == shown
    assert f"mtrl-imgrad train {shown}" in [line for pre in root.iter("pre") for line in (pre.text or "").splitlines()]
    markdown = (tmp_path / "report" / "report.md").read_text()
    row = next(line for line in markdown.splitlines() if line.startswith("| &lt;script"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "<script>" not in markdown.split("commands:")[0]
    assert "\x1b" not in console_text(report) + markdown


def test_a_folder_that_cannot_be_read_is_left_out_and_named(tmp_path):
    _group(tmp_path / "runs", "mean", {1: (6, 4)})
    broken = write_run(tmp_path / "runs" / "broken", seed=2)
    (broken / "config.yaml").write_text("seed: [")
    report = write_report([tmp_path / "runs"], tmp_path / "report")
    assert any("broken" in notice and "Left out" in notice for notice in report.notices)
    with pytest.raises(ValueError, match="none can be read"):
        write_report([broken], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path, two_groups):
    (two_groups / "index.html").write_text("old")
    write_report([tmp_path / "runs"], two_groups)
    assert (two_groups / "index.html").read_text() != "old"
    (two_groups / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        write_report([tmp_path / "runs"], two_groups)
    with pytest.raises(ValueError, match="is no report"):
        write_report([tmp_path / "runs"], tmp_path / "runs")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report"}


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, two_groups, monkeypatch):
    before = (two_groups / "index.html").read_bytes()
    write = Path.write_bytes

    def full(path, content):
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "disk full")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_report([tmp_path / "runs"], two_groups)
    assert (two_groups / "index.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report"}


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "mtrl-imgrad: runs: runs does not exist; give run folders.\n"
    _group(tmp_path / "runs", "cagrad", CAGRAD)
    assert cli.main(["report", "runs", "--out", "page"]) == 0
    printed = capsys.readouterr().out
    assert "0.80 [0.55, 1.00]" in printed
    assert printed.endswith("page/index.html\n")
    manifest = json.loads((tmp_path / "page" / "report.json").read_text())
    assert "index.html" in manifest["files"]


def test_median_of_six_runs_has_an_interval(tmp_path):
    runs = dict.fromkeys(range(1, 7), (5, 5))
    _group(tmp_path / "runs", "mean", runs, training={500: 2, 1000: 3})
    table = reach_table(_results(tmp_path / "runs"))
    assert table.rows[0][3] == "1,000 [500, 1,000]"
    assert table.rows[1][3] == "not reached [1,000, not reached]"
