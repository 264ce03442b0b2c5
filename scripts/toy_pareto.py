"""Every rule on the two-task toy problem of CAGrad (Liu et al. 2021, section 5.1), from five starts.

    python scripts/toy_pareto.py

draws docs/toy_pareto/toy_pareto.png and writes the table of docs/toy_pareto/README.md. Trajectories are kept
in trajectories.npz there: `--rules NAME ...` runs some rules anew and draws all. The functions and three of the starts
are those of the published code (github.com/Cranial-XIX/CAGrad, toy.py); the other two are from Nash-MTL's
(github.com/AvivNavon/nash-mtl, experiments/toy). Adam, step size 1e-3, as both.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from scipy.optimize import minimize

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregation, Aggregator

Array = NDArray[np.float64]
ROOT = Path(__file__).parents[1]
STARTS = np.array([(-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)])
SETTINGS: dict[str, dict[str, object]] = {"cagrad": {"c": 0.5, "rescale": 2}, "famo": {"gamma": 1e-5}}
"""Fields that differ from a rule's defaults: those of CAGrad's published toy code, and of FAMO's supervised code."""
LEARNING_RATE, BETAS, EPSILON = 1e-3, (0.9, 0.999), 1e-8
LOWEST_ARGUMENT = 5e-6
SHIFT = 20.0
"""Added to the losses that a `critic_only` rule sees, which must not be negative: neither function goes below -20."""
KEPT = 50
"""Every n-th point of a trajectory is kept."""
DRAWN = 160
"""Points of a trajectory that are stored and drawn, evenly spaced in time."""
WINDOW, REST = 2_000, 0.02
"""A start is at rest when its mean over a window of steps is within REST of that over the window before."""
REACHED = 0.1
"""Distance within which a point counts as reached."""


def toy(points: Array) -> tuple[Array, Array]:
    """Losses [n, 2] and Jacobians [n, task, coordinate] of both tasks at points [n, 2], in closed form."""
    x, y = points[:, :1], points[:, 1:]
    sign, bend, above = np.array([1.0, -1.0]), np.tanh(y), np.tanh(y / 2)
    # Above the x-axis: logarithmic valleys, one per task
    argument = np.concatenate([-0.5 * (x + 7) + bend, 0.5 * (7 - x) - bend], axis=1)
    size = np.abs(argument)
    valley = np.log(np.maximum(size, LOWEST_ARGUMENT)) + 6
    slope = np.where(size > LOWEST_ARGUMENT, 1 / np.where(argument == 0, 1, argument), 0)
    # Below it: bowls with their minima near (7, -8) and (-7, -8)
    bowl = ((x - 7 * sign) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
    upper, lower = np.maximum(above, 0), np.maximum(-above, 0)
    change = (1 - above**2) / 2
    by_x = upper * -0.5 * slope + lower * (x - 7 * sign) / 5
    by_y = upper * slope * sign * (1 - bend**2) + lower * 0.02 * (y + 8)
    by_y = by_y + np.where(y > 0, change * valley, -change * bowl)
    return upper * valley + lower * bowl, np.stack([by_x, by_y], axis=-1)


def front(points: int = 141) -> Array:
    """The Pareto front: minimisers of (1 - a) L1 + a L2 for a from 0 to 1; the middle one minimises the mean loss."""
    found = []
    for share in np.linspace(0, 1, points):
        weights = np.array([1 - share, share])

        def mixed(point: Array, weights: Array = weights) -> tuple[float, Array]:
            losses, jacobian = toy(point[None])
            return float(weights @ losses[0]), weights @ jacobian[0]

        found.append(minimize(mixed, (7 - 14 * share, -8.0), jac=True, tol=1e-10).x)
    return np.array(found)


def step_of(rule: Aggregator, result: Aggregation, jacobian: torch.Tensor) -> torch.Tensor:
    """d = J^T weights, or what the rule returned as the direction."""
    if result.direction is not None:
        return result.direction
    return (result.weights[..., None, :] @ jacobian).squeeze(-2)


def descend(rule: Aggregator, starts: Array, steps: int) -> list[Array]:
    """Trajectories [time, 2] from all starts at once, each until it rests; starts share the random numbers."""
    one_by_one = rule.needs == "jacobian"  # a Jacobian is never batched
    if one_by_one and len(starts) > 1:
        return [descend(rule, start[None], steps)[0] for start in starts]
    generator = torch.Generator().manual_seed(0)
    state = {key: value.double() if value.is_floating_point() else value
             for key, value in rule.initial_state((2,) if one_by_one else (len(starts), 2), 2).items()}  # fmt: skip
    kept: list[list[Array]] = [[] for _ in starts]
    moving = np.arange(len(starts))
    x, m, v = starts.copy(), np.zeros_like(starts), np.zeros_like(starts)
    window, before = np.zeros_like(starts), np.full_like(starts, np.inf)
    losses, jacobian = toy(x)
    for step in range(1, steps + 1):
        if step % KEPT == 1:
            for index, point in zip(moving, x, strict=True):
                kept[index].append(point.copy())
        rows, seen = torch.from_numpy(jacobian), torch.from_numpy(losses + SHIFT * rule.critic_only)
        noise = rule.draw_noise(2, generator, 2 if one_by_one else 0)
        if one_by_one:
            rows, seen = rows[0], seen[0]
        result = rule.aggregate(rows @ rows.mT, noise, seen, rows if one_by_one else None, state)
        state = result.state
        gradient = step_of(rule, result, rows).numpy().reshape(x.shape)
        if rule.preconditioned:
            x = x - LEARNING_RATE * gradient
        else:
            m = BETAS[0] * m + (1 - BETAS[0]) * gradient
            v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
            root = np.sqrt(v / (1 - BETAS[1] ** step)) + EPSILON
            x = x - LEARNING_RATE / (1 - BETAS[0] ** step) * m / root
        losses, jacobian = toy(x)
        if rule.sees_new_losses:
            new = torch.from_numpy(losses + SHIFT * rule.critic_only)
            state = rule.after_step(state, seen, new[0] if one_by_one else new)
        window += x / WINDOW
        if step % WINDOW == 0:
            resting = np.linalg.norm(window - before, axis=1) < REST
            before, window = window, np.zeros_like(window)
            if resting.all():
                break
            if resting.any() and not state:  # states are not cut apart
                on = ~resting
                moving, x, m, v = moving[on], x[on], m[on], v[on]
                window, before, losses, jacobian = window[on], before[on], losses[on], jacobian[on]
    for index, point in zip(moving, x, strict=True):
        kept[index].append(point.copy())
    return [np.array(points) for points in kept]


@dataclass(frozen=True)
class Outcome:
    """What one rule did.

    Attributes:
        trajectories: one per start.
        steps: until all starts were at rest, or the most that were allowed.
        seconds: that it took.
    """

    name: str
    trajectories: list[Array]
    steps: int
    seconds: float = 0.0

    def reached(self, pareto: Array) -> list[str]:
        """Of each start: `optimum`, `front` or `neither`."""
        optimum = pareto[len(pareto) // 2]
        labels = []
        for trajectory in self.trajectories:
            end = trajectory[-1]
            if np.linalg.norm(end - optimum) < REACHED:
                labels.append("optimum")
            else:
                labels.append("front" if distance(end, pareto) < REACHED else "neither")
        return labels


def distance(point: Array, curve: Array) -> float:
    """From a point to a polyline."""
    begins, along = curve[:-1], np.diff(curve, axis=0)
    shares = np.clip(((point - begins) * along).sum(1) / (along**2).sum(1), 0, 1)
    return float(np.linalg.norm(begins + shares[:, None] * along - point, axis=1).min())


def run(name: str, steps: int) -> Outcome:
    """One rule from all starts."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with torch.no_grad():
        trajectories = descend(AGGREGATORS[name](**SETTINGS.get(name, {})), STARTS, steps)
    taken = min(steps, KEPT * max(len(trajectory) - 1 for trajectory in trajectories))
    drawn = [trajectory[np.linspace(0, len(trajectory) - 1, DRAWN).astype(int)] for trajectory in trajectories]
    return Outcome(name, drawn, taken, time.perf_counter() - started)


MARKS = {"optimum": "★", "front": "●", "neither": "-"}


def table(outcomes: list[Outcome], pareto: Array) -> str:
    """In Markdown, one line per rule."""
    starts = [f"({x:g}, {y:g})" for x, y in STARTS]
    lines = [f"| rule | {' | '.join(starts)} | front | optimum | steps | mean losses at the ends |"]
    lines.append("|---" + "|:-:" * (len(STARTS) + 3) + "|---|")
    for outcome in outcomes:
        reached = outcome.reached(pareto)
        ends = toy(np.array([trajectory[-1] for trajectory in outcome.trajectories]))[0].mean(1)
        counts = f"{len(STARTS) - reached.count('neither')}/{len(STARTS)} | {reached.count('optimum')}/{len(STARTS)}"
        marks, means = " | ".join(MARKS[label] for label in reached), ", ".join(f"{end:.2f}" for end in ends)
        lines.append(f"| `{outcome.name}` | {marks} | {counts} | {outcome.steps:,} | {means} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------------------

INK, PAPER, FRONT = "#22252b", "#ffffff", "#5b6270"
COLOURS = {"optimum": "#0b7a75", "front": "#d98e04", "neither": "#b3261e"}
SYMBOLS = {"optimum": "*", "front": "o", "neither": "X"}
LABELS = {"optimum": "global optimum", "front": "Pareto front", "neither": "neither"}


def draw(outcomes: list[Outcome], pareto: Array, columns: int) -> plt.Figure:
    """Small multiples, a panel a rule: the mean loss as contours, the front, and trajectories that grow darker."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK, "axes.linewidth": 0.6})
    columns = min(columns, len(outcomes))
    rows = math.ceil(len(outcomes) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.35 * columns, 2.55 * rows + 0.75), squeeze=False, sharex=True, sharey=True
    )
    axis = np.linspace(-11, 11, 331)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    mean = toy(grid.reshape(-1, 2))[0].mean(1).reshape(len(axis), -1)
    levels = np.arange(-16, 9, 2.0)
    for panel, outcome in zip(panels.flat, outcomes, strict=False):
        filled = panel.contourf(axis, axis, mean, levels=levels, cmap="Blues_r", alpha=0.55, extend="both", zorder=0)
        filled.set_rasterized(True)
        panel.contour(axis, axis, mean, levels=levels, colors="white", linewidths=0.35, linestyles="solid", zorder=1)
        panel.plot(*pareto.T, color=FRONT, linewidth=4.5, alpha=0.55, solid_capstyle="round", zorder=2)
        panel.plot(*pareto[len(pareto) // 2], marker="*", color="white", markersize=9, zorder=3, markeredgecolor=INK,
                   markeredgewidth=0.6)  # fmt: skip
        reached = outcome.reached(pareto)
        for trajectory, label in zip(outcome.trajectories, reached, strict=True):
            segments = np.stack([trajectory[:-1], trajectory[1:]], axis=1)
            shades = np.zeros((len(segments), 4))
            shades[:, :3] = mpl.colors.to_rgb(COLOURS[label])
            shades[:, 3] = np.linspace(0.25, 1.0, len(segments))
            widths = np.linspace(0.9, 2.0, len(segments))
            panel.add_collection(LineCollection(list(segments), colors=shades, linewidths=widths, zorder=4))
            panel.plot(*trajectory[0], marker="o", markersize=4.2, color=PAPER, markeredgecolor=INK,
                       markeredgewidth=0.8, zorder=5)  # fmt: skip
            panel.plot(*trajectory[-1], marker=SYMBOLS[label], color=COLOURS[label], markeredgecolor="white",
                       markersize=10 if label == "optimum" else 6.5, markeredgewidth=0.7, zorder=6)  # fmt: skip
        on_front, at_optimum = 5 - reached.count("neither"), reached.count("optimum")
        panel.set_title(outcome.name, fontsize=10, fontweight="bold", pad=14)
        panel.text(0.5, 1.025, f"front {on_front}/5 · optimum {at_optimum}/5", transform=panel.transAxes, fontsize=7.5,
                   ha="center", color=FRONT)  # fmt: skip
        panel.set(xlim=(-11, 11), ylim=(-11, 11), xticks=(-10, 0, 10), yticks=(-10, 0, 10), aspect="equal")
        panel.tick_params(length=2, width=0.6, labelsize=7, colors=FRONT)
        panel.spines[:].set_color("#c9ced6")
    for panel in panels.flat[len(outcomes) :]:
        panel.set_visible(False)
    handles = []
    for key, colour in COLOURS.items():
        look = {"marker": SYMBOLS[key], "markersize": 11 if key == "optimum" else 7, "markeredgecolor": "white"}
        handles.append(mpl.lines.Line2D([], [], color=colour, linewidth=2, label=f"ends at: {LABELS[key]}", **look))
    handles.append(mpl.lines.Line2D([], [], color=FRONT, linewidth=4.5, alpha=0.55, label="Pareto front"))
    handles.append(mpl.lines.Line2D([], [], color=PAPER, marker="o", markeredgecolor=INK, linewidth=0, label="start"))
    figure.tight_layout(rect=(0, 0.45 / figure.get_figheight(), 1, 1), w_pad=0.6, h_pad=1.0)
    figure.legend(handles=handles, loc="lower center", ncols=len(handles) if columns > 3 else 3, frameon=False,
                  fontsize=8, handlelength=2.2)  # fmt: skip
    return figure


def save(path: Path, outcomes: dict[str, Outcome]) -> None:
    """One array a rule, in single precision: [start, point, coordinate], where point 0 has the steps taken."""
    arrays = {}
    for name, outcome in outcomes.items():
        points = np.array(outcome.trajectories)
        steps = np.full_like(points[:, :1], outcome.steps)
        arrays[name] = np.concatenate([steps, points], axis=1).astype(np.float32)
    np.savez_compressed(path, **arrays)


MARKER = "<!-- made by scripts/toy_pareto.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=list(AGGREGATORS), default=list(AGGREGATORS), metavar="NAME")
    parser.add_argument(
        "--steps", type=int, default=100_000, help="at most, from each start; 100,000 is what CAGrad's code takes"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--columns", type=int, default=6, help="panels side by side")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/toy_pareto")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    kept = arguments.out / "trajectories.npz"
    found: dict[str, Outcome] = {}
    if kept.exists():
        with np.load(kept) as file:
            for name in file.files:
                trajectories = file[name].astype(np.float64)
                found[name] = Outcome(name, list(trajectories[:, 1:]), int(trajectories[0, 0, 0]))
    with ProcessPoolExecutor(arguments.processes) as pool:
        for outcome in pool.map(run, arguments.rules, [arguments.steps] * len(arguments.rules)):
            print(f"{outcome.name}: {outcome.seconds:.0f} s, {outcome.steps:,} steps", flush=True)
            found[outcome.name] = outcome
            save(kept, found)
    outcomes = [found[name] for name in AGGREGATORS if name in found]
    pareto = front()
    figures = table(outcomes, pareto)
    print(figures)
    figure = draw(outcomes, pareto, arguments.columns)
    figure.savefig(arguments.out / "toy_pareto.png", dpi=115)
    page = arguments.out / "README.md"
    above, _, rest = (page.read_text() if page.exists() else f"# The toy problem\n\n{MARKER}{MARKER}").partition(MARKER)
    below = rest.partition(MARKER)[2]
    page.write_text(f"{above}{MARKER}\n\n{figures}\n\n{MARKER}{below}")


if __name__ == "__main__":
    main()
