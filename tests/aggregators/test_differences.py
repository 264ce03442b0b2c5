"""No two rules are the same, and no option is without effect: every rule of the registry, on several calls in a row."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from gradient_families import gradients, relative_error
from torch import Tensor

from mtrl_imgrad.aggregators import (
    AGGREGATORS,
    DBMTL,
    DWA,
    FAMO,
    AdaTask,
    Aggregator,
    AlignedMTL,
    CAGrad,
    CAGradFast,
    ConicGrad,
    FairGrad,
    GradDrop,
    GradNorm,
    GradVac,
    IMGrad,
    IMGradNash,
    MoCo,
    NashMTL,
    SDMGrad,
    SDMGradOS,
    UncertaintyWeighting,
)

TASKS, CALLS = 6, 6

# The defaults, but where six calls on six tasks ask for smaller samples, shorter windows or longer steps.
RULES: dict[str, Aggregator] = {name: rule() for name, rule in AGGREGATORS.items()} | {
    "cagrad_fast": CAGradFast(n=2),
    "sdmgrad_os": SDMGradOS(n=2),
    "dwa": DWA(window=2),
    "uw": UncertaintyWeighting(w_lr=0.1),
    "gradnorm": GradNorm(w_lr=0.1),
}
VARIANTS: dict[str, Aggregator] = {
    "imgrad eq9": IMGrad(variant="eq9"),
    "imgrad eq11": IMGrad(variant="eq11"),
    "conicgrad single_loop": ConicGrad(mode="single_loop", lr=1.0),
    "alignedmtl median": AlignedMTL(scale_mode="median"),
    "alignedmtl rmse": AlignedMTL(scale_mode="rmse"),
    "moco softmax": MoCo(projection="softmax"),
    "famo official_rl": FAMO(variant="official_rl"),
    "adatask sum": AdaTask(combine="sum"),
}


@cache
def conflicting(seed: int = 0) -> Tensor:
    """Gradients whose norms differ by up to 100 and of which several pairs conflict."""
    rows = gradients("gauss", TASKS, seed) * torch.logspace(-1, 1, TASKS, dtype=torch.float64)[:, None]
    return rows / rows.square().sum(1).mean().sqrt()


def losses() -> Tensor:
    """[CALLS + 1, TASKS], falling at different rates, with noise."""
    noise = 0.5 + torch.rand(CALLS + 1, TASKS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rates = torch.linspace(0.0, 0.3, TASKS, dtype=torch.float64)
    return noise * torch.exp(-rates * torch.arange(CALLS + 1)[:, None])


def directions(rule: Aggregator, jacobians: list[Tensor]) -> Tensor:
    """Of every call of a fresh object."""
    rule, course, found = replace(rule), losses(), []
    for call, jacobian in enumerate(jacobians):
        noise = rule.draw_noise(TASKS, torch.Generator().manual_seed(call), jacobian.shape[1])
        rows = jacobian if rule.needs == "jacobian" else None
        result = rule(jacobian @ jacobian.mT, noise, course[call], rows)
        if rule.sees_new_losses:
            rule.load_state_dict(rule.after_step(rule.state_dict(), course[call], course[call + 1]))
        found.append(result.weights @ jacobian if result.direction is None else result.direction)
    return torch.stack(found)


def test_any_two_rules_differ_where_tasks_conflict() -> None:
    found = {name: directions(rule, [conflicting()] * CALLS)[-1] for name, rule in (RULES | VARIANTS).items()}
    for one, other in itertools.combinations(found, 2):
        assert relative_error(found[one], found[other]) > 1e-3, (one, other)


# Rules that differ in one field; of a field with a few choices, one rule for each.
CHANGES: dict[str, tuple[Aggregator, ...]] = {
    "gradvac.beta": (GradVac(), GradVac(beta=0.9)),
    "cagrad.c": (CAGrad(), CAGrad(c=0.8)),
    "cagrad.rescale": (CAGrad(rescale=0), CAGrad(rescale=1), CAGrad(rescale=2)),
    "cagrad_fast.c": (CAGradFast(), CAGradFast(c=0.8)),
    "cagrad_fast.n": (CAGradFast(), CAGradFast(n=2)),
    "cagrad_fast.rescale": (CAGradFast(rescale=0), CAGradFast(rescale=1), CAGradFast(rescale=2)),
    "nashmtl.norm": (NashMTL(norm="mean"), NashMTL(norm="own")),
    "nashmtl.max_norm": (NashMTL(), NashMTL(max_norm=0.1)),
    "nashmtl.update_weights_every": (NashMTL(), NashMTL(update_weights_every=2)),
    "fairgrad.alpha": (FairGrad(), FairGrad(alpha=1.0)),
    "fairgrad.norm": (FairGrad(norm="mean"), FairGrad(norm="own")),
    "sdmgrad.lam": (SDMGrad(), SDMGrad(lam=0.1)),
    "sdmgrad_os.n": (SDMGradOS(), SDMGradOS(n=2)),
    "sdmgrad_os.lam": (SDMGradOS(), SDMGradOS(lam=0.1)),
    "alignedmtl.scale_mode": (
        AlignedMTL(scale_mode="min"), AlignedMTL(scale_mode="median"), AlignedMTL(scale_mode="rmse"),
    ),
    "imgrad.c": (IMGrad(), IMGrad(c=0.8)),
    "imgrad.variant": (IMGrad(variant="official"), IMGrad(variant="eq9"), IMGrad(variant="eq11")),
    "imgrad.rescale": (IMGrad(rescale=0), IMGrad(rescale=1), IMGrad(rescale=2)),
    "imgrad_nash.norm": (IMGradNash(norm="mean"), IMGradNash(norm="own")),
    "conicgrad.c": (ConicGrad(), ConicGrad(c=0.8)),
    "conicgrad.on_infeasible": (
        ConicGrad(c=0.95, on_infeasible="boundary"), ConicGrad(c=0.95, on_infeasible="mean"),
        ConicGrad(c=0.95, on_infeasible="zero"),
    ),
    "conicgrad.mode": (ConicGrad(mode="exact"), ConicGrad(mode="single_loop")),
    "conicgrad.lr": (ConicGrad(mode="single_loop"), ConicGrad(mode="single_loop", lr=0.5)),
    "conicgrad.gamma": (ConicGrad(mode="single_loop", lr=0.5), ConicGrad(mode="single_loop", lr=0.5, gamma=1.0)),
    "graddrop.leak": (GradDrop(), GradDrop(leak=0.5)),
    "moco.beta": (MoCo(), MoCo(beta=0.9)),
    "moco.beta_decay": (MoCo(), MoCo(beta_decay=0.0)),
    "moco.gamma": (MoCo(), MoCo(gamma=0.9)),
    "moco.gamma_decay": (MoCo(), MoCo(gamma_decay=0.0)),
    "moco.rho": (MoCo(), MoCo(rho=3.0)),
    "moco.projection": (MoCo(projection="simplex"), MoCo(projection="softmax")),
    "moco.normalization": (
        MoCo(normalization="gramian"), MoCo(normalization="none"),
    ),
    "dbmtl.beta": (DBMTL(), DBMTL(beta=0.5)),
    "dbmtl.sigma": (DBMTL(), DBMTL(sigma=1.0)),
    "uw.w_lr": (UncertaintyWeighting(), UncertaintyWeighting(w_lr=0.1)),
    "dwa.temperature": (DWA(window=2), DWA(window=2, temperature=1.0)),
    "dwa.window": (DWA(window=2), DWA(window=3)),
    "gradnorm.alpha": (GradNorm(w_lr=0.1), GradNorm(w_lr=0.1, alpha=1.5)),
    "gradnorm.w_lr": (GradNorm(), GradNorm(w_lr=0.1)),
    "famo.variant": (FAMO(variant="paper"), FAMO(variant="official_rl")),
    "famo.gamma": (FAMO(w_lr=0.1), FAMO(w_lr=0.1, gamma=1.0)),
    "famo.w_lr": (FAMO(), FAMO(w_lr=0.1)),
    "adatask.combine": (AdaTask(combine="mean"), AdaTask(combine="sum")),
    "adatask.beta1": (AdaTask(), AdaTask(beta1=0.5)),
    "adatask.beta2": (AdaTask(), AdaTask(beta2=0.9)),
    "adatask.eps": (AdaTask(), AdaTask(eps=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_every_option_changes_something(field: str) -> None:
    course = [conflicting(seed) for seed in range(CALLS)]
    for one, other in itertools.combinations(CHANGES[field], 2):
        found = directions(one, course)
        assert relative_error(directions(other, course), found) > 1e-3, (one, other)


def test_the_options_above_are_all_there_are() -> None:
    """But for the solver's route, which is to change nothing."""
    every = {f"{name}.{field.name}" for name, rule in AGGREGATORS.items() for field in fields(rule)}  # pyright: ignore
    assert {option for option in every if not option.endswith(".solver")} == set(CHANGES)
    for option, rules in CHANGES.items():
        name, field = option.split(".")
        assert all(type(rule) is AGGREGATORS[name] for rule in rules)
        hint = get_type_hints(AGGREGATORS[name])[field]
        if get_origin(hint) is Literal:
            assert [getattr(rule, field) for rule in rules] == list(get_args(hint))
