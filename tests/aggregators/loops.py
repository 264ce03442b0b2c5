"""The rules that remember, as plain loops over their calls, with autograd and torch's own Adam for what they learn.

`jacobians` are the gradients of every call. `course` has the losses [calls + 1, tasks] before every step and after the
last. All are float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional

from mtrl_imgrad.aggregators import DBMTL, DWA, FAMO, AdaTask, ConicGrad, GradNorm, MoCo, UncertaintyWeighting


def nearest_on_simplex(vector: np.ndarray) -> np.ndarray:
    """The threshold by root finding."""
    threshold = brentq(lambda t: np.maximum(vector - t, 0).sum() - 1, vector.min() - 2, vector.max(), xtol=1e-15)
    return np.maximum(vector - threshold, 0)


def by_moco(jacobians: Sequence[Tensor], rule: MoCo) -> Tensor:
    """The directions of the paper's loop."""
    num_tasks = len(jacobians[0])
    tracked, weights, found = np.zeros(jacobians[0].shape), np.full(num_tasks, 1 / num_tasks), []
    for t, jacobian in enumerate(jacobians, start=1):
        rows = jacobian.numpy()
        tracked = tracked - rule.beta / t**rule.beta_decay * (tracked - rows)
        products = tracked @ tracked.T
        if rule.normalization == "gramian":
            products = products / np.trace(products) * num_tasks
        moved = weights - rule.gamma / t**rule.gamma_decay * (products + rule.rho * np.eye(num_tasks)) @ weights
        exponents = np.exp(moved - moved.max())
        weights = nearest_on_simplex(moved) if rule.projection == "simplex" else exponents / exponents.sum()
        found.append(weights @ tracked)
    return torch.from_numpy(np.stack(found))


def by_dbmtl(jacobians: Sequence[Tensor], course: Tensor, rule: DBMTL) -> Tensor:
    """The directions of the paper's loop."""
    average, found = np.zeros(jacobians[0].shape), []
    for t, (jacobian, losses) in enumerate(zip(jacobians, course, strict=False), start=1):
        rows = jacobian.numpy() / (losses.numpy() + 1e-8)[:, None]
        average = rows + rule.beta / t**rule.sigma * (average - rows)
        norms = [np.linalg.norm(row) for row in average]
        found.append(sum(max(norms) / norm * row for norm, row in zip(norms, average, strict=True)) / len(norms))
    return torch.from_numpy(np.stack(found))


def by_adatask(jacobians: Sequence[Tensor], rule: AdaTask) -> Tensor:
    """torch's Adam for every task on its own: the difference of its parameters with lr = 1."""
    found = torch.zeros(len(jacobians), jacobians[0].shape[1], dtype=torch.float64)
    num_tasks = len(jacobians[0])
    for task in range(num_tasks):
        parameters = torch.zeros(jacobians[0].shape[1], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([parameters], lr=1.0, betas=(rule.beta1, rule.beta2), eps=rule.eps)
        for index, jacobian in enumerate(jacobians):
            parameters.data.zero_()
            parameters.grad = jacobian[task].clone()
            optimiser.step()
            found[index] -= parameters.detach() / (num_tasks if rule.combine == "mean" else 1)
    return found


def by_uncertainty(course: Tensor, rule: UncertaintyWeighting) -> Tensor:
    """The weights of Kendall's objective, s by torch.optim.Adam, times 2 / K."""
    s = torch.zeros(course.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser, found = torch.optim.Adam([s], lr=rule.w_lr), []
    for losses in course[:-1]:
        leaf = losses.clone().requires_grad_()
        optimiser.zero_grad()
        (0.5 * (torch.exp(-s) * leaf + s)).sum().backward()
        found.append(leaf.grad * 2 / len(losses))
        optimiser.step()
    return torch.stack(found)


def by_famo(course: Tensor, rule: FAMO) -> Tensor:
    """The weights of Algorithm 1 with autograd for them and for the step of xi."""
    xi = torch.zeros(course.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser, found = torch.optim.Adam([xi], lr=rule.w_lr, weight_decay=rule.gamma), []
    for old, new in itertools.pairwise(course):
        leaf = old.clone().requires_grad_()
        z = functional.softmax(xi, -1).detach()
        c = (z / (old + 1e-8)).sum()
        objective = (z * (leaf + 1e-8).log()).sum()
        (objective / c if rule.variant == "paper" else objective * c).backward()
        found.append(leaf.grad)
        fall = (old + 1e-8).log() - (new + 1e-8).log()
        optimiser.zero_grad()
        xi.grad = torch.autograd.grad(functional.softmax(xi, -1), xi, grad_outputs=fall)[0]
        optimiser.step()
    return torch.stack(found)


def by_gradnorm(gramians: Sequence[Tensor] | Tensor, course: Tensor, rule: GradNorm) -> Tensor:
    """The weights of Eq. 2 by autograd, with the mean norm and the rates taken as constants; xi by torch.optim.Adam."""
    num_tasks = course.shape[1]
    xi = torch.zeros(num_tasks, dtype=torch.float64, requires_grad=True)
    optimiser, found = torch.optim.Adam([xi], lr=rule.w_lr), []
    for losses, gramian in zip(course[:-1], gramians, strict=True):
        norms = (gramian.diagonal() / gramian.diagonal().mean()).sqrt()
        w = num_tasks * functional.softmax(xi, -1)
        found.append(w.detach() / num_tasks)
        ratios = losses / course[0]
        targets = ((w * norms).mean() * (ratios / ratios.mean()) ** rule.alpha).detach()
        optimiser.zero_grad()
        if num_tasks > 1:
            (w * norms - targets).abs().sum().backward()
            optimiser.step()
    return torch.stack(found)


def by_dwa(course: Tensor, rule: DWA) -> Tensor:
    """The weights, window means by numpy."""
    history, found = course.numpy(), []
    for call in range(1, len(course)):
        weights = np.full(course.shape[1], 1 / course.shape[1])
        if call >= 2 * rule.window:
            newer = history[call - rule.window : call].mean(0)
            older = history[call - 2 * rule.window : call - rule.window].mean(0)
            exponents = np.exp(newer / older / rule.temperature)
            weights = exponents / exponents.sum()
        found.append(weights)
    return torch.from_numpy(np.stack(found))


def best_in_the_cone(jacobian: Tensor, tasks: Tensor, c: float) -> Tensor:
    """argmax of <gw, d> over cos(d, g0) >= c, ||d|| <= ||g0||, on explicit vectors; the surface's where that is 0."""
    mean, combined = jacobian.mean(0), tasks @ jacobian
    axis = mean / mean.norm()
    along = combined @ axis
    if along >= c * combined.norm():
        return mean.norm() * combined / combined.norm()
    across = combined - along * axis
    return mean.norm() * (c * axis + math.sqrt(1 - c * c) * across / across.norm())


def by_single_loop(jacobians: Sequence[Tensor], rule: ConicGrad) -> tuple[Tensor, Tensor]:
    """ConicGrad's directions, and the logits after each call. torch's Adam moves these along the gradient of
    <J d, softmax(logits)> at fixed d, by autograd, for gradients of mean squared norm 1."""
    logits = torch.zeros(len(jacobians[0]), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=rule.lr, weight_decay=rule.gamma)
    found, moved = [], []
    for jacobian in jacobians:
        size = jacobian.square().sum(1).mean().sqrt()
        best = best_in_the_cone(jacobian / size, logits.detach().softmax(0), rule.c)
        found.append(size * best)
        optimiser.zero_grad()
        (logits.softmax(0) @ (jacobian / size @ best)).backward()
        optimiser.step()
        moved.append(logits.detach().clone())
    return torch.stack(found), torch.stack(moved)
