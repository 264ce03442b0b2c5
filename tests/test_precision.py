"""A run says that its processor has no instructions for its number format."""

from __future__ import annotations

import time

import pytest
import torch
from tiny_world import make_world, tiny_config

from mtrl_imgrad import precision
from mtrl_imgrad.precision import precision_warning, slowdown
from mtrl_imgrad.trainer import train

CPU = torch.device("cpu")


def test_another_format_that_costs_the_same_is_no_slower(monkeypatch):
    """Both are float32 here, under the mask of another type."""
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda left, right: real(left.float(), right.float()))
    assert 0.1 < slowdown(torch.float64) < 10


def test_a_slow_format_is_measured_as_slow(monkeypatch):
    real = torch.mm

    def emulated(left, right):
        if left.dtype == torch.bfloat16:
            time.sleep(0.05)
        return real(left, right)

    monkeypatch.setattr(torch, "mm", emulated)
    assert slowdown(torch.bfloat16) > 5


@pytest.mark.parametrize(("factor", "told"), [(0.5, False), (1.5, False), (1.6, True), (53.7, True)])
def test_only_a_slow_format_is_warned_of(monkeypatch, factor, told):
    monkeypatch.setattr(precision, "slowdown", lambda dtype: factor)
    warning = precision_warning("bfloat16", CPU)
    assert (warning is not None) == told
    assert warning is None or f"{factor:.0f} times as long" in warning


@pytest.mark.parametrize(("name", "device"), [("auto", "cpu"), ("float32", "cpu"), ("bfloat16", "cuda")])
def test_nothing_is_measured_where_there_is_nothing_to_warn_of(monkeypatch, name, device):
    monkeypatch.setattr(precision, "slowdown", lambda dtype: pytest.fail("measured"))
    assert precision_warning(name, torch.device(device)) is None


def test_a_run_says_it_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 30.0)
    train(tiny_config(tmp_path / "run", precision="bfloat16"), make_world=make_world)
    assert capsys.readouterr().out.count("takes 30 times as long as in float32") == 1
