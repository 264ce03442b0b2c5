"""Success rates over seeds: estimates, each with an interval or with the reason why it has none.

The unit is the run. One multi-task run yields all of its tasks, so their scores depend on each other, and intervals
resample or count whole runs; resampling each task's runs separately, as the stratified bootstrap of Agarwal et al. 2021
("Deep Reinforcement Learning at the Edge of the Statistical Precipice", https://arxiv.org/abs/2108.13264) does for
single-task agents, gives intervals that are far too narrow. Tasks are fixed, never resampled. Estimates follow Agarwal
et al.; t-intervals are shown below 10 seeds, where percentile bootstraps are far too narrow, bootstraps from 10 on,
where they are a little too narrow. Both are optimistic where success comes close to 0 or 1, as few seeds seldom show
the rare bad run. Paired differences have the t-interval at every number of seeds, as it excludes 0 where the paired
t-test rejects, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import scipy  # its parts load when used, as only reports need them
from jaxtyping import Float

LEVEL = 0.95
BOOTSTRAP_FROM = 10  # seeds: a percentile bootstrap at 95 % covers about 85 % with 5, 90 % with 10, 93 % with 20
RESAMPLES = 10_000

Statistic = Callable[[Float[np.ndarray, "*resamples seeds tasks"]], Float[np.ndarray, "*resamples"]]


@dataclass(frozen=True)
class Scores:
    """One score per run and task; `bounds` is the range of possible scores, to which t-intervals are cut."""

    values: Float[np.ndarray, "seeds tasks"]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.seeds), len(self.tasks)) or self.values.size == 0:
            raise ValueError(f"{len(self.seeds)} seeds and {len(self.tasks)} tasks, scores {self.values.shape}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed occurs twice: {self.seeds}")
        if not np.isfinite(self.values).all():
            raise ValueError("scores must be finite")
        if self.values.min() < self.bounds[0] or self.values.max() > self.bounds[1]:
            raise ValueError(f"scores must lie in {self.bounds}")

    def of_task(self, task: str) -> Scores:
        """The same runs, this task alone."""
        return replace(self, values=self.values[:, [self.tasks.index(task)]], tasks=(task,))


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A number from several runs.

    Attributes:
        value: the estimate.
        runs: how many runs it is from; two counts where A is compared with B run by run.
        interval: the interval to show, or None.
        meaning: what the interval means or why there is none, in words for a page.
        t_interval: by Student's t, whatever the number of seeds.
        bootstrap_interval: by percentile bootstrap over runs, whatever the number of seeds.
    """

    value: float
    runs: tuple[int, ...]
    interval: Interval | None
    meaning: str
    t_interval: Interval | None
    bootstrap_interval: Interval | None


@dataclass(frozen=True)
class PairedDifference:
    """A minus B by seed; seeds that only one of them has are not in it, and are named."""

    by_seed: Mapping[int, float]
    mean: Estimate
    only_in_a: tuple[int, ...]
    only_in_b: tuple[int, ...]


def mean_success(scores: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean over tasks, then over seeds."""
    return _over_seeds(scores.values.mean(1, keepdims=True), _mean, scores.bounds, seed, resamples)


def interquartile_mean(scores: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of the middle half of all seed-task scores (Agarwal et al. 2021, section 4.3).

    A quarter of the scores, rounded down, is cut from each end, as in their code; below 4 scores it is the mean. Where
    tasks differ more than seeds do, what is cut is mostly the easiest and the hardest tasks: read it beside the mean.
    """
    return _over_seeds(scores.values, _interquartile_mean, scores.bounds, seed, resamples)


def probability_of_improvement(a: Scores, b: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Probability that a run of A beats a run of B on a task, mean over tasks; a tie counts half.

    `1/K sum_k 1/(N M) sum_i sum_j S(a_ik, b_jk)` of Agarwal et al. 2021 (section 4.3): within each task, every run of
    A against every run of B, whatever their seeds and numbers. Intervals take the runs of A and of B as independent;
    for runs that share seeds, and so rise and fall together, that is too wide, never too narrow. With one task and 3
    runs they hold about 86 %, as the comparisons take few values. The t-interval has the standard error of
    DeLong et al. 1988 with whole runs as subjects, and the degrees of freedom of Brunner and Munzel 2000.
    """
    _same_tasks(a, b)
    n, m = len(a.seeds), len(b.seeds)
    wins = ((np.sign(a.values[:, None] - b.values) + 1) / 2).mean(2)
    value = float(wins.mean())
    if min(n, m) == 1:
        return _estimate(value, (n, m), None, None)
    of_a, of_b = wins.mean(1).var(ddof=1) / n, wins.mean(0).var(ddof=1) / m
    # Degrees of freedom by Welch and Satterthwaite; without variance the interval is left out anyway.
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (n - 1) + of_b**2 / (m - 1)) if of_a + of_b > 0 else n + m - 2
    generator = np.random.default_rng(seed)
    weights_a, weights_b = (generator.multinomial(k, np.full(k, 1 / k), resamples) / k for k in (n, m))
    draws = ((weights_a @ wins) * weights_b).sum(1)
    t_interval = _t_interval(value, math.sqrt(of_a + of_b), freedom, (0.0, 1.0))
    return _estimate(value, (n, m), t_interval, _percentiles(draws))


def paired_difference(a: Scores, b: Scores, seed: int = 0, resamples: int = RESAMPLES) -> PairedDifference | None:
    """Mean success of A minus that of B, by seed; None if they share no seed.

    A seed fixes goals and, for one algorithm and network, the initial parameters, so what it makes easier or harder for
    both cancels in the difference. The interval is the t-interval whatever the number of seeds: the differences at
    which a paired t-test at 5 % would not reject.
    """
    _same_tasks(a, b)
    shared = sorted(set(a.seeds) & set(b.seeds))
    if not shared:
        return None
    rows_a, rows_b = ([scores.seeds.index(run) for run in shared] for scores in (a, b))
    differences = a.values[rows_a].mean(1) - b.values[rows_b].mean(1)
    bounds = (a.bounds[0] - b.bounds[1], a.bounds[1] - b.bounds[0])
    estimate = _over_seeds(differences[:, None], _mean, bounds, seed, resamples, paired=True)
    only_in_a, only_in_b = (tuple(sorted(set(scores.seeds) - set(shared))) for scores in (a, b))
    by_seed = dict(zip(shared, differences.tolist(), strict=True))
    return PairedDifference(by_seed, estimate, only_in_a, only_in_b)


def _same_tasks(a: Scores, b: Scores) -> None:
    if a.tasks != b.tasks:
        raise ValueError(f"different tasks or another order: {a.tasks} and {b.tasks}")


def _mean(values: Float[np.ndarray, "*resamples seeds tasks"]) -> Float[np.ndarray, "*resamples"]:
    return values.mean((-2, -1))


def _interquartile_mean(values: Float[np.ndarray, "*resamples seeds tasks"]) -> Float[np.ndarray, "*resamples"]:
    return np.asarray(scipy.stats.trim_mean(values.reshape(*values.shape[:-2], -1), 0.25, axis=-1))


def _over_seeds(
    values: Float[np.ndarray, "seeds tasks"],
    statistic: Statistic,
    bounds: tuple[float, float],
    seed: int,
    resamples: int,
    paired: bool = False,
) -> Estimate:
    """A statistic of whole runs. The standard error of the t-interval is the jackknife's (Tukey 1958) over runs, which
    for a mean is the usual one and serves the interquartile mean too."""
    n, value = len(values), float(statistic(values))
    if n == 1:
        return _estimate(value, (n,), None, None)
    without = statistic(np.stack([np.delete(values, run, axis=0) for run in range(n)]))
    error = (n - 1) / math.sqrt(n) * without.std(ddof=1)
    draws = statistic(values[np.random.default_rng(seed).integers(n, size=(resamples, n))])
    return _estimate(value, (n,), _t_interval(value, error, n - 1, bounds), _percentiles(draws), paired)


def _t_interval(value: float, error: float, freedom: float, bounds: tuple[float, float]) -> Interval | None:
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return _wide(max(value - reach, bounds[0]), min(value + reach, bounds[1]))


def _percentiles(draws: Float[np.ndarray, " resamples"]) -> Interval | None:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return _wide(low, high)


def _wide(low: float, high: float) -> Interval | None:
    """No interval rather than one without width, which would claim certainty."""
    return Interval(float(low), float(high)) if high - low > 1e-12 * max(1.0, abs(low)) else None


def _estimate(
    value: float,
    runs: tuple[int, ...],
    t_interval: Interval | None,
    bootstrap_interval: Interval | None,
    paired: bool = False,
) -> Estimate:
    by_t = paired or min(runs) < BOOTSTRAP_FROM
    interval = t_interval if by_t else bootstrap_interval
    counted = " against ".join(f"{n} run{'s' * (n > 1)}" for n in runs)
    if min(runs) == 1:
        meaning = f"{counted}: no interval, as one run says nothing about how runs differ."
    elif interval is None:
        meaning = f"{counted}: no interval, as the runs do not differ in this number, which does not make it certain."
    else:
        method = (
            "that of the paired t-test" if paired else "t-interval" if by_t else "percentile bootstrap of whole runs"
        )
        level = LEVEL if by_t else _bootstrap_level(min(runs))
        meaning = (
            f"Nominal 95 % interval over seeds from {counted} ({method}): of such intervals, each from new seeds, "
            f"about {100 * level:.0f} % would contain the value of infinitely many seeds; fewer where success is near "
            "0 or 1. It holds for these tasks, and for one number at a time."
        )
    return Estimate(value, runs, interval, meaning, t_interval, bootstrap_interval)


def _bootstrap_level(runs: int) -> float:
    """How often a nominal 95 % percentile bootstrap of a mean of normal values contains the truth: it takes the normal
    quantile for Student's and the variance over n for that over n - 1."""
    quantile = float(scipy.stats.norm.ppf((1 + LEVEL) / 2))
    return float(2 * scipy.stats.t.cdf(quantile * math.sqrt((runs - 1) / runs), runs - 1) - 1)
