"""DWA: more weight to the tasks whose loss falls more slowly (dynamic weight average; Liu, Johns and Davison 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, State, check_range


@dataclass(frozen=True)
class DWA(Aggregator):
    """w = softmax(r / T), r_i = (mean of L_i over the last `window` calls) / (mean over the `window` calls before).

    The paper's Eq. 7 has w_i = K softmax_i and r_i the ratio of the mean losses of the last two epochs; K is left out
    (mean scale). There are no epochs in RL: the windows are those of the nash-mtl and FAMO codes, the present loss
    being the last of the newer one.

    Differences: those codes fill the history with ones and use it half-filled; here w = 1/K until 2 `window` losses
    have been seen. Where the older mean is 0 the ratio counts as 1. An actor's loss changes its sign, so its ratio
    means nothing: the rule is for the critics, whose losses are not stationary either, targets being moving ones.

    The supervised codes use T = 2 and windows of 25; no use in RL is known. State: 2 `window` losses per task. Cost
    O(K window).

    Identities: equal ratios give 1/K; a factor on a task's loss changes nothing; T -> inf gives 1/K; K identical
    gradients g give g.
    """

    needs: ClassVar[Needs] = "losses"
    paper: ClassVar[str] = "Liu et al. 2019, arXiv 1803.10704"
    critic_only: ClassVar[bool] = True

    temperature: float = 2.0
    """T of the softmax (> 0); larger is more uniform."""

    window: int = 25
    """Calls over which a loss is averaged (>= 1)."""

    def __post_init__(self) -> None:
        check_range("DWA.temperature", self.temperature, 1e-6, 1e6)
        check_range("DWA.window", self.window, 1, 100_000)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        history = torch.zeros((*shape[:-1], 2 * self.window, shape[-1]), dtype=torch.float64)
        return {"history": history, "calls": torch.zeros((), dtype=torch.float64)}

    def solve(self, given: Given) -> Aggregation:
        losses, calls = given.losses, given.state["calls"] + 1
        assert losses is not None
        history = torch.cat([given.state["history"][..., 1:, :], losses[..., None, :]], dim=-2)
        older, newer = history[..., : self.window, :].mean(-2), history[..., self.window :, :].mean(-2)
        ratio = torch.where(older > 0, newer / torch.where(older > 0, older, 1.0), 1.0)
        weights = (ratio / self.temperature).softmax(-1)
        weights = torch.where(calls < 2 * self.window, 1.0 / losses.shape[-1], weights)
        return Aggregation(weights, state={"history": history, "calls": calls}, own_weights=weights)
