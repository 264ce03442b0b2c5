from __future__ import annotations

import pytest
import torch

from mtrl_imgrad.networks import Layout
from mtrl_imgrad.networks.layers import LayerNorm, Linear
from mtrl_imgrad.networks.layout import Slot

SLOTS = [
    Slot("first", (2, 3), True, 1.0),
    Slot("head", (4,), False, 1.0),
    Slot("second", (5,), True, 1.0),
    Slot("tail", (1, 2), False, 1.0),
]


def test_shared_parameters_come_first_and_each_group_keeps_its_order():
    layout = Layout(SLOTS)
    assert [slot.name for slot in layout.slots] == ["first", "second", "head", "tail"]
    assert (layout.shared_size, layout.size) == (11, 17)


def test_views_cover_the_vector_once_and_share_its_memory():
    layout = Layout(SLOTS)
    vector = torch.arange(17.0)
    views = layout.views(vector)
    assert torch.cat([views[slot.name].flatten() for slot in layout.slots]).equal(vector)
    for view in views.values():
        view += 100
    assert vector.equal(torch.arange(17.0) + 100)


@pytest.mark.parametrize("tasks", [None, 3], ids=["shared", "per_task"])
def test_linear_layers_start_as_torchs_do(tasks):
    inputs, outputs = 64, 200
    layout = Layout(Linear("layer", 2, inputs, outputs, tasks, torch.float32).slots())
    views = layout.views(layout.initial(torch.Generator().manual_seed(1)))
    oracle = torch.nn.Linear(inputs, outputs)
    for name in ("weight", "bias"):
        ours, theirs = views[f"layer.{name}"], getattr(oracle, name)
        assert ours.dtype == torch.float32
        # Both are uniform with bound 1 / sqrt(inputs), hence this standard deviation.
        assert ours.abs().max() <= inputs**-0.5
        assert theirs.abs().max() <= inputs**-0.5
        assert ours.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.15)
        assert ours.mean() == pytest.approx(0, abs=0.15 * inputs**-0.5)


def test_affine_layer_norm_starts_as_the_identity_and_plain_has_no_parameters():
    layout = Layout(LayerNorm("norm", 2, 7, affine=True).slots())
    views = layout.views(layout.initial(torch.Generator().manual_seed(1)))
    assert views["norm.weight"].equal(torch.ones(2, 7))
    assert views["norm.bias"].equal(torch.zeros(2, 7))
    assert LayerNorm("norm", 2, 7, affine=False).slots() == []


def test_initial_parameters_come_from_the_given_generator_alone():
    layout = Layout(SLOTS)
    before = torch.get_rng_state()
    first = layout.initial(torch.Generator().manual_seed(3))
    assert torch.get_rng_state().equal(before)
    assert layout.initial(torch.Generator().manual_seed(3)).equal(first)
    assert not layout.initial(torch.Generator().manual_seed(4)).equal(first)
