"""The networks against torch.nn modules that hold the same weights, one module per critic and task."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from mtrl_imgrad.config import NetworkConfig
from mtrl_imgrad.networks import Actor, TwinCritic

TASKS, ROWS, SIZE, ACTIONS = 3, 5, 6, 2
NETWORKS = list(itertools.product(["mlp", "multi_head"], ["none", "plain", "affine"], [False, True]))
IDS = [f"{kind}-{norm}-{'shared_encoder' if shared else 'separate'}" for kind, norm, shared in NETWORKS]


def _settings(kind: str, layer_norm: str, share_encoder: bool) -> NetworkConfig:
    return NetworkConfig(kind=kind, layer_norm=layer_norm, share_encoder=share_encoder, width=7, depth=3)


def _random(layout) -> Tensor:
    """Parameters in which LayerNorm's scale and shift are not the identity."""
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5


def _hidden(views: dict[str, Tensor], name: str, depth: int, layer_norm: str, member: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for i in range(depth):
        weight = views[f"{name}.{i}.weight"][member]
        modules.append(_linear(weight, views[f"{name}.{i}.bias"][member]))
        if layer_norm != "none":
            norm = nn.LayerNorm(weight.shape[1], elementwise_affine=layer_norm == "affine").double()
            if layer_norm == "affine":
                norm.weight.data = views[f"{name}.{i}.norm.weight"][member]
                norm.bias.data = views[f"{name}.{i}.norm.bias"][member]
            modules.append(norm)
        modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape).double()
    layer.weight.data, layer.bias.data = weight.T, bias
    return layer


def _head(views: dict[str, Tensor], kind: str, member: int, task: int) -> nn.Linear:
    index = (member, task) if kind == "multi_head" else member
    return _linear(views["head.weight"][index], views["head.bias"][index])


@pytest.mark.parametrize(("kind", "layer_norm", "share_encoder"), NETWORKS, ids=IDS)
def test_critics_equal_torch_modules_with_the_same_weights(kind, layer_norm, share_encoder):
    critic = TwinCritic(_settings(kind, layer_norm, share_encoder), TASKS, SIZE, ACTIONS, 4, torch.float64)
    vector = _random(critic.layout)
    views = critic.layout.views(vector)
    inputs = torch.randn(TASKS, ROWS, SIZE, dtype=torch.float64)
    actions = torch.rand(TASKS, ROWS, ACTIONS, dtype=torch.float64)
    outputs = critic(vector, critic.encode(vector, inputs), actions)
    assert outputs.shape == (2, TASKS, ROWS, 4)
    encoder = _hidden(views, "encoder", 2, layer_norm, 0) if share_encoder else nn.Identity()
    for member, task in itertools.product(range(2), range(TASKS)):
        x = torch.cat([encoder(inputs[task]), actions[task]], dim=-1)
        trunk = _hidden(views, "trunk", 1 if share_encoder else 3, layer_norm, member)
        torch.testing.assert_close(outputs[member, task], _head(views, kind, member, task)(trunk(x)))


@pytest.mark.parametrize(("kind", "layer_norm", "share_encoder"), NETWORKS, ids=IDS)
def test_actor_equals_torch_modules_with_the_same_weights(kind, layer_norm, share_encoder):
    actor = Actor(_settings(kind, layer_norm, share_encoder), TASKS, SIZE, ACTIONS, torch.float64)
    vector = _random(actor.layout)
    views = actor.layout.views(vector)
    encoding = torch.randn(TASKS, ROWS, SIZE, dtype=torch.float64)
    mean, log_std = actor(vector, encoding)
    for task in range(TASKS):
        trunk = _hidden(views, "trunk", 1 if share_encoder else 3, layer_norm, 0)
        expected = _head(views, kind, 0, task)(trunk(encoding[task]))
        torch.testing.assert_close(mean[task], expected[:, :ACTIONS])
        torch.testing.assert_close(log_std[task], expected[:, ACTIONS:].clamp(-20, 2))


def test_log_standard_deviation_stays_in_the_configured_range():
    config = NetworkConfig(width=7, depth=1, log_std_min=-1.5, log_std_max=0.25)
    actor = Actor(config, TASKS, SIZE, ACTIONS, torch.float64)
    encoding = 100 * torch.randn(TASKS, 50, SIZE, dtype=torch.float64)
    _, log_std = actor(_random(actor.layout), encoding)
    assert (log_std.min(), log_std.max()) == (-1.5, 0.25)


@pytest.mark.parametrize(("kind", "own"), [("mlp", 0), ("multi_head", TASKS * (7 * 4 + 4))], ids=["mlp", "multi_head"])
def test_only_heads_belong_to_one_task(kind, own):
    config = NetworkConfig(kind=kind, width=7, depth=2)
    critic = TwinCritic(config, TASKS, SIZE, ACTIONS, 4, torch.float32)
    actor = Actor(config, TASKS, SIZE, ACTIONS, torch.float32)
    assert critic.layout.size - critic.layout.shared_size == 2 * own
    assert actor.layout.size - actor.layout.shared_size == own
    assert {slot.name for slot in critic.layout.slots if not slot.shared} <= {"head.weight", "head.bias"}


def test_shared_encoder_reads_observations_only_and_shortens_both_trunks():
    config = NetworkConfig(share_encoder=True, width=7, depth=3)
    critic = TwinCritic(config, TASKS, SIZE, ACTIONS, 1, torch.float32)
    actor = Actor(config, TASKS, critic.encoding_size, ACTIONS, torch.float32)
    shapes = {slot.name: slot.shape for slot in critic.layout.slots if slot.name.endswith("weight")}
    assert shapes["encoder.0.weight"] == (1, SIZE, 7)
    assert shapes["encoder.1.weight"] == (1, 7, 7)
    assert shapes["trunk.0.weight"] == (2, 7 + ACTIONS, 7)
    assert "trunk.1.weight" not in shapes
    assert [slot.shape for slot in actor.layout.slots if slot.name == "trunk.0.weight"] == [(1, 7, 7)]


def test_bfloat16_products_return_to_the_inputs_dtype_and_stay_close():
    config = NetworkConfig(width=32, depth=3)
    exact = Actor(config, TASKS, SIZE, ACTIONS, torch.float32)
    rough = Actor(config, TASKS, SIZE, ACTIONS, torch.bfloat16)
    vector = exact.layout.initial(torch.Generator().manual_seed(1))
    encoding = torch.randn(TASKS, ROWS, SIZE, generator=torch.Generator().manual_seed(2))
    mean, rough_mean = exact(vector, encoding)[0], rough(vector, encoding)[0]
    assert rough_mean.dtype == torch.float32
    assert not rough_mean.equal(mean)
    torch.testing.assert_close(rough_mean, mean, rtol=0.05, atol=0.01)
