"""Per-task gradients against K separate calls of torch.autograd.grad on the untaped network."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtrl_imgrad import task_gradients as module
from mtrl_imgrad.config import NetworkConfig
from mtrl_imgrad.losses import CategoricalLoss, SquaredLoss, actor_losses, tanh_gaussian
from mtrl_imgrad.networks import Actor, Layout, ObservationInput, Tape, TwinCritic
from mtrl_imgrad.task_gradients import (
    ChunkedTaskGradients,
    TaskGradients,
    block_gramian,
    chunked_task_gradients,
    task_gradients,
)

TASKS, ROWS, ENTRIES, ACTIONS = 3, 8, 5, 2
NETWORKS = [
    pytest.param(kind, norm, shared, inputs, id=f"{kind}-{norm}-{'shared_encoder' if shared else 'separate'}-{inputs}")
    for kind, norm, shared, inputs in itertools.product(
        ["mlp", "multi_head"], ["none", "plain", "affine"], [False, True], ["none", "one_hot"]
    )
]
CRITIC_LOSSES = {"squared": SquaredLoss(), "categorical": CategoricalLoss(11, -3.0, 3.0)}


@dataclass
class Problem:
    """Both networks, their parameters and one batch, with the losses as functions of a parameter vector."""

    settings: NetworkConfig
    dtype: torch.dtype
    loss: str = "squared"
    tasks: int = TASKS
    rows: int = ROWS

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        observation = ObservationInput(self.settings, self.tasks, ENTRIES)
        statistics = observation.initial_statistics(ENTRIES, torch.device("cpu"))
        self.inputs = observation(statistics, draw(self.tasks, self.rows, ENTRIES))
        self.actions = draw(self.tasks, self.rows, ACTIONS).tanh()
        self.targets, self.noise = draw(self.tasks, self.rows), draw(self.tasks, self.rows, ACTIONS)
        self.critic_loss = CRITIC_LOSSES[self.loss]
        outputs = self.critic_loss.outputs
        self.critic = TwinCritic(self.settings, self.tasks, observation.size, ACTIONS, outputs, self.dtype)
        self.actor = Actor(self.settings, self.tasks, self.critic.encoding_size, ACTIONS, self.dtype)
        self.critic_vector = draw(self.critic.layout.size) * 0.4
        self.actor_vector = draw(self.actor.layout.size) * 0.4

    def critic_losses(self, vector: Tensor, tape: Tape | None = None) -> Tensor:
        encoding = self.critic.encode(vector, self.inputs, tape)
        return self.critic_loss.losses(self.critic(vector, encoding, self.actions, tape), self.targets)

    def actor_losses(self, vector: Tensor, tape: Tape | None = None) -> Tensor:
        encoding = self.critic.encode(self.critic_vector, self.inputs)
        actions, log_prob = tanh_gaussian(*self.actor(vector, encoding, tape), self.noise)
        values = self.critic_loss.values(self.critic(self.critic_vector, encoding, actions))
        return actor_losses(torch.linspace(0.1, 0.9, self.tasks, dtype=self.dtype), log_prob, values)

    def parts(self, which: str):
        """Loss function, layout and parameter vector of the critics or the actor."""
        return getattr(self, f"{which}_losses"), getattr(self, which).layout, getattr(self, f"{which}_vector")


def _taped(problem: Problem, which: str) -> TaskGradients:
    losses, layout, vector = problem.parts(which)
    tape = Tape()
    return task_gradients(losses(vector, tape), tape, layout)


def _in_pieces(problem: Problem, which: str) -> ChunkedTaskGradients:
    losses, layout, vector = problem.parts(which)
    tape = Tape()
    return chunked_task_gradients(losses(vector, tape), tape, layout)


def _oracle(problem: Problem, which: str) -> Tensor:
    """[K, P]: one backward pass per task through torch's own graph of the parameter vector."""
    losses, _, vector = problem.parts(which)
    vector = vector.clone().requires_grad_()
    per_task = losses(vector)
    return torch.stack([torch.autograd.grad(loss, vector, retain_graph=True)[0] for loss in per_task])


def _assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def _compare(problem: Problem, which: str, tolerance: float) -> None:
    gradients, expected = _taped(problem, which), _oracle(problem, which)
    layout: Layout = problem.parts(which)[1]
    J, own = expected[:, : layout.shared_size], expected[:, layout.shared_size :]
    _assert_close(gradients.dense(), J, tolerance)
    # Every entry of a task's own parameters belongs to one task only, so the sum over tasks gathers them all.
    assert (own != 0).sum(0).le(1).all()
    ones = own.new_ones(problem.tasks)
    if own.numel():
        _assert_close(torch.cat(gradients.own_parts(ones)), own.sum(0), tolerance)
        weights = torch.linspace(-1.0, 2.0, problem.tasks, dtype=torch.float64)
        _assert_close(torch.cat(gradients.own_parts(weights)), weights.to(own.dtype) @ own, tolerance)
    _assert_close(gradients.gramian(), J.double() @ J.double().T, 10 * tolerance)
    assert gradients.gramian().dtype == torch.float64
    chunked = _in_pieces(problem, which)
    _assert_close(chunked.gramian(), gradients.gramian(), 10 * tolerance)
    weights = torch.linspace(-1.0, 2.0, problem.tasks, dtype=torch.float64)
    for own_weights in (None, weights):
        _assert_close(chunked.combine(weights, own_weights), gradients.combine(weights, own_weights), tolerance)


@pytest.mark.parametrize("which", ["critic", "actor"])
@pytest.mark.parametrize(("kind", "layer_norm", "share_encoder", "task_input"), NETWORKS)
def test_equal_to_one_backward_pass_per_task(kind, layer_norm, share_encoder, task_input, which):
    settings = NetworkConfig(
        kind=kind, layer_norm=layer_norm, share_encoder=share_encoder, task_input=task_input, width=9, depth=3
    )
    _compare(Problem(settings, torch.float64), which, 1e-10)
    _compare(Problem(settings, torch.float32), which, 1e-5)


@pytest.mark.parametrize("kind", ["mlp", "multi_head"])
@pytest.mark.parametrize("which", ["critic", "actor"])
def test_equal_with_the_categorical_critic(kind, which):
    settings = NetworkConfig(kind=kind, layer_norm="affine", width=9, depth=2)
    _compare(Problem(settings, torch.float64, "categorical"), which, 1e-10)
    _compare(Problem(settings, torch.float32, "categorical"), which, 1e-5)


@pytest.mark.parametrize("which", ["critic", "actor"])
@pytest.mark.parametrize("kind", ["mlp", "multi_head"])
@pytest.mark.parametrize("share_encoder", [False, True], ids=["separate", "shared_encoder"])
def test_combining_with_equal_weights_is_the_gradient_of_the_mean_loss(kind, share_encoder, which):
    problem = Problem(NetworkConfig(kind=kind, share_encoder=share_encoder, width=9, depth=2), torch.float64)
    losses, _, vector = problem.parts(which)
    vector = vector.clone().requires_grad_()
    (expected,) = torch.autograd.grad(losses(vector).mean(), vector)
    combined = _taped(problem, which).combine(torch.full((TASKS,), 1 / TASKS, dtype=torch.float64))
    _assert_close(combined, expected, 1e-12)


def test_weights_move_the_shared_part_only():
    problem = Problem(NetworkConfig(kind="multi_head", width=9, depth=2), torch.float64)
    gradients, expected = _taped(problem, "critic"), _oracle(problem, "critic")
    shared = problem.critic.layout.shared_size
    weights = torch.tensor([2.0, -0.5, 0.0], dtype=torch.float64)
    combined = gradients.combine(weights)
    _assert_close(combined[:shared], weights @ expected[:, :shared], 1e-10)
    _assert_close(combined[shared:], expected[:, shared:].mean(0), 1e-10)


@pytest.mark.parametrize("which", ["critic", "actor"])
def test_one_call_of_autograd_gives_all_tasks(which, monkeypatch):
    problem = Problem(NetworkConfig(width=9, depth=2), torch.float32, tasks=7)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(args) or grad(*args, **kwargs))
    assert _taped(problem, which).dense().shape[0] == 7
    assert len(calls) == 1


def _backward_flops(problem: Problem, which: str) -> int:
    losses, layout, vector = problem.parts(which)
    tape = Tape()
    per_task = losses(vector, tape)
    with FlopCounterMode(display=False) as counter:
        task_gradients(per_task, tape, layout)
    return counter.get_total_flops()


@pytest.mark.parametrize("which", ["critic", "actor"])
def test_cost_is_that_of_one_backward_pass_for_any_number_of_tasks(which):
    settings = NetworkConfig(task_input="none", width=32, depth=3)
    one, many = (Problem(settings, torch.float32, tasks=k, rows=64 // k) for k in (1, 16))
    losses, _, vector = one.parts(which)
    vector = vector.clone().requires_grad_()
    loss = losses(vector).mean()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss, vector)
    assert 0 < _backward_flops(one, which) <= counter.get_total_flops()
    assert _backward_flops(many, which) == _backward_flops(one, which)


def test_gradients_hold_no_graph():
    gradients = _taped(Problem(NetworkConfig(kind="multi_head", width=9, depth=2), torch.float32), "critic")
    assert not any(x.requires_grad for x in [*gradients.shared, *gradients.own, gradients.gramian()])


def test_no_piece_of_a_chunked_jacobian_is_larger_than_allowed_and_the_gramian_is_the_same(monkeypatch):
    problem = Problem(NetworkConfig(width=9, depth=2, layer_norm="affine"), torch.float64)
    whole, sizes = _taped(problem, "critic").gramian(), []
    limit = 2 * TASKS * 9 * 2  # two input columns of the widest layer
    monkeypatch.setattr(module, "PIECE", limit)
    monkeypatch.setattr(module, "block_gramian", lambda block: sizes.append(block.numel()) or block_gramian(block))
    chunked = _in_pieces(problem, "critic")
    _assert_close(chunked.gramian(), whole, 1e-12)
    assert max(sizes) <= limit
    assert sum(sizes) == TASKS * problem.critic.layout.shared_size


@pytest.mark.parametrize("size", [1, 13, 400, 401, 1031, 401 * 401, 160_000])
def test_the_gramian_of_opposed_float32_gradients_is_close_to_their_float64_products(size):
    block = torch.randn(2, 4, size, generator=torch.Generator().manual_seed(1))
    block[:, 1] = -block[:, 0]
    exact = (block.double() @ block.double().mT).sum(0)
    tolerance = 5e-7 if size < 100_000 else 2e-8  # rounding errors of many pieces cancel
    assert (block_gramian(block) - exact).abs().max() < tolerance * exact.diagonal().mean()
