"""Rules on the gradients themselves: each equals a plain loop, call after call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import oracles
import pytest
import torch
from gradient_families import FAMILIES, gradients, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import by_adatask, by_dbmtl, by_moco
from torch import Tensor

from mtrl_imgrad.aggregators import DBMTL, AdaTask, Aggregation, Aggregator, GradDrop, MoCo

TASKS = (1, 2, 3, 10, 50)
SCALES = (1e-4, 1.0, 1e4)
RULES: dict[str, Aggregator] = {
    "graddrop": GradDrop(),
    "graddrop-leak": GradDrop(leak=0.3),
    "moco": MoCo(),
    "moco-softmax": MoCo(projection="softmax"),
    "moco-none": MoCo(normalization="none"),
    "dbmtl": DBMTL(),
    "adatask": AdaTask(),
    "adatask-sum": AdaTask(combine="sum"),
}
REMEMBERING = tuple(name for name in RULES if "graddrop" not in name)
few = settings(max_examples=15, deadline=None, derandomize=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def course(family: str, num_tasks: int, calls: int = 4, seed: int = 0) -> list[Tensor]:
    return [gradients(family, num_tasks, seed + call) for call in range(calls)]


def some_losses(num_tasks: int) -> Tensor:
    return torch.linspace(0.3, 2.0, num_tasks, dtype=torch.float64)


def call(rule: Aggregator, jacobian: Tensor, losses: Tensor | None = None, seed: int = 0) -> Aggregation:
    losses = some_losses(len(jacobian)) if losses is None else losses
    noise = rule.draw_noise(len(jacobian), generator(seed), jacobian.shape[1])
    return rule(jacobian @ jacobian.mT, noise, losses, jacobian)


def directions(rule: Aggregator, jacobians: list[Tensor]) -> Tensor:
    rule.reset()
    return torch.stack([call(rule, jacobian, seed=seed).direction for seed, jacobian in enumerate(jacobians)])


def assert_close_per_call(given_directions: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    size = expected.abs().amax(-1, keepdim=True)
    assert ((given_directions - expected).abs() <= tolerance * size).all()


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graddrop_is_the_papers_loop(family: str, num_tasks: int) -> None:
    jacobian = gradients(family, num_tasks)
    noise = GradDrop().draw_noise(num_tasks, generator(), jacobian.shape[1])
    for leak in (0.0, 0.3):
        expected = torch.from_numpy(oracles.graddrop_direction(jacobian.numpy(), noise.double().numpy(), leak))
        for scale in SCALES:
            rows = jacobian * scale
            found = GradDrop(leak=leak)(rows @ rows.mT, noise, jacobian=rows).direction / scale
            assert_close_per_call(found[None], expected[None])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_moco_is_the_papers_loop(family: str, scale: float) -> None:
    rules = [
        MoCo(gamma=2.0),
        MoCo(gamma=2.0, projection="softmax", rho=0.1),
        MoCo(beta=1.0, beta_decay=0.0, gamma=0.3, gamma_decay=0.0),
        MoCo(gamma=0.1 / scale**2, normalization="none"),
    ]
    for num_tasks, rule in itertools.product(TASKS, rules):
        jacobians = [scale * jacobian for jacobian in course(family, num_tasks)]
        expected = by_moco(jacobians, rule)
        # `imbalanced` has products of 1e4 in its raw Gramian, so that rounding of w is that much larger.
        tolerance = 1e-8 if rule.normalization == "none" and family == "imbalanced" else 1e-11
        assert_close_per_call(directions(rule, jacobians), expected, tolerance)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dbmtl_is_the_papers_loop(family: str, scale: float) -> None:
    for num_tasks, rule in itertools.product(TASKS, (DBMTL(), DBMTL(beta=0.5, sigma=0.5), DBMTL(beta=0.0))):
        jacobians = [scale * jacobian for jacobian in course(family, num_tasks)]
        expected = by_dbmtl(jacobians, some_losses(num_tasks).expand(len(jacobians), -1), rule)
        assert_close_per_call(directions(rule, jacobians), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_adatask_is_one_adam_of_torchs_per_task(family: str, scale: float) -> None:
    for num_tasks, combine in itertools.product((1, 2, 3, 10), ("mean", "sum")):
        rule = AdaTask(combine=combine, beta1=0.8, beta2=0.99)
        jacobians = [scale * jacobian for jacobian in course(family, num_tasks)]
        assert_close_per_call(directions(rule, jacobians), by_adatask(jacobians, rule))


# Identities


@pytest.mark.parametrize("name", RULES)
@few
@given(family=st.sampled_from(FAMILIES), num_tasks=st.integers(1, 8), seed=st.integers(0, 1000), data=st.data())
def test_permuting_the_tasks_leaves_the_direction(name: str, family: str, num_tasks: int, seed: int, data) -> None:
    order = torch.tensor(data.draw(st.permutations(range(num_tasks))))
    rule, losses, jacobians = RULES[name], some_losses(num_tasks), course(family, num_tasks, 3, seed)
    rule.reset()
    expected = torch.stack([call(rule, jacobian, losses).direction for jacobian in jacobians])
    rule.reset()
    permuted = torch.stack([call(rule, jacobian[order], losses[order]).direction for jacobian in jacobians])
    assert_close_per_call(permuted, expected, 1e-7)


# How the direction scales with the gradients, for given losses.
DEGREES = dict.fromkeys(("graddrop", "graddrop-leak", "moco", "moco-softmax", "dbmtl"), 1)
DEGREES |= dict.fromkeys(("adatask", "adatask-sum"), 0)


@pytest.mark.parametrize("name", DEGREES)
@few
@given(family=st.sampled_from(FAMILIES), num_tasks=st.integers(1, 8), seed=st.integers(0, 1000), data=st.data())
def test_the_direction_is_homogeneous(name: str, family: str, num_tasks: int, seed: int, data) -> None:
    scale = 10.0 ** data.draw(st.integers(-4, 4))
    rule, jacobians = RULES[name], course(family, num_tasks, 3, seed)
    if isinstance(rule, AdaTask):
        rule = replace(rule, eps=1e-30)
    expected = directions(rule, jacobians) * scale ** DEGREES[name]
    assert_close_per_call(directions(rule, [scale * jacobian for jacobian in jacobians]), expected, 1e-7)


@pytest.mark.parametrize("num_tasks", [1, 3, 10])
@pytest.mark.parametrize(
    ("rule", "constant"),
    [
        (GradDrop(), 1.0),
        (GradDrop(leak=0.5), 1.0),
        (MoCo(beta=1.0), 1.0),
        (DBMTL(beta=0.0), 1 / 0.5),
        (DBMTL(beta=0.9), 0.1 / 0.5),
    ],
    ids=repr,
)
def test_identical_gradients_keep_their_direction(rule: Aggregator, constant: float, num_tasks: int) -> None:
    gradient, losses = gradients("gauss", 4)[0], torch.full((num_tasks,), 0.5)
    rule.reset()
    found = call(rule, gradient.expand(num_tasks, -1).contiguous(), losses).direction
    assert relative_error(found, constant * gradient) < 1e-7


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_adatask_with_identical_gradients_is_adam(num_tasks: int) -> None:
    jacobians = course("gauss", 1, 5)
    repeated = [jacobian.expand(num_tasks, -1).contiguous() for jacobian in jacobians]
    expected = by_adatask(jacobians, AdaTask())
    assert_close_per_call(directions(AdaTask(), repeated), expected)
    assert_close_per_call(directions(AdaTask(combine="sum"), repeated), num_tasks * expected)


def test_adatask_does_not_see_the_scale_of_a_tasks_loss() -> None:
    jacobians, factors = course("gauss", 3, 4), torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)
    rule = AdaTask(eps=1e-30)
    expected = directions(rule, jacobians)
    assert_close_per_call(directions(rule, [factors[:, None] * jacobian for jacobian in jacobians]), expected, 1e-10)


def test_dbmtl_does_not_see_the_scale_of_a_tasks_loss() -> None:
    jacobians, factors = course("gauss", 3, 4), torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)
    rule, losses = DBMTL(), some_losses(3)
    expected = directions(rule, jacobians)
    rule.reset()
    scaled = [call(rule, factors[:, None] * jacobian, factors * losses).direction for jacobian in jacobians]
    assert_close_per_call(torch.stack(scaled), expected, 1e-4)  # the 1e-8 on a loss of 1e-3


def test_dbmtl_gives_every_task_the_same_length() -> None:
    jacobian = torch.diag(torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64))
    found = DBMTL()(jacobian @ jacobian.mT, losses=some_losses(3), jacobian=jacobian).direction
    torch.testing.assert_close(found, found[:1].expand(3), rtol=1e-10, atol=0)


def test_an_opposed_pair() -> None:
    gradient, losses = gradients("gauss", 4)[0], torch.ones(2)
    pair = torch.stack([gradient, -gradient])
    for name in ("moco", "moco-softmax", "moco-none", "dbmtl", "adatask", "adatask-sum"):
        RULES[name].reset()
        assert call(RULES[name], pair, losses).direction.norm() < 1e-7 * gradient.norm()
    kept = call(GradDrop(), pair).direction
    torch.testing.assert_close(kept.abs(), gradient.abs() / 2)  # one of the two at each coordinate


def test_graddrop_keeps_one_sign_and_is_the_mean_on_average() -> None:
    jacobian = gradients("conflict", 5)
    draws = [call(GradDrop(), jacobian, seed=seed).direction for seed in range(3000)]
    positive, negative = jacobian.clamp_min(0).mean(0), jacobian.clamp_max(0).mean(0)
    for found in draws[:50]:
        assert (torch.isclose(found, positive) | torch.isclose(found, negative)).all()
    assert (torch.stack(draws).mean(0) - jacobian.mean(0)).abs().max() < 0.1


def test_graddrop_is_the_mean_where_all_signs_agree_and_for_a_full_leak() -> None:
    jacobian = gradients("gauss", 5)
    torch.testing.assert_close(call(GradDrop(), jacobian.abs()).direction, jacobian.abs().mean(0))
    torch.testing.assert_close(call(GradDrop(leak=1.0), jacobian).direction, jacobian.mean(0))
    result = call(GradDrop(leak=1.0), jacobian)
    torch.testing.assert_close(result.weights, torch.full((5,), 0.2, dtype=torch.float64))


def test_a_coordinate_without_gradient_stays_0() -> None:
    jacobian = gradients("gauss", 3)
    jacobian[:, 4] = 0
    assert call(GradDrop(), jacobian).direction[4] == 0


def test_moco_with_full_steps_is_the_gradient_itself_and_without_weight_steps_the_mean() -> None:
    rule, jacobian = MoCo(beta=1.0, beta_decay=0.0, gamma=0.0), gradients("gauss", 4)
    for _ in range(3):
        result = call(rule, jacobian)
    torch.testing.assert_close(result.direction, jacobian.mean(0))
    assert torch.equal(result.state["tracked"], jacobian)


def test_moco_gives_a_task_without_gradient_no_weight() -> None:
    jacobian = gradients("shared", 4)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    for name in ("moco", "moco-none"):
        rule = replace(RULES[name], gamma=1e-3 if name == "moco-none" else 0.1 * 4 / 5)
        for _ in range(30):
            result = call(rule, extended)
        assert result.weights[4] == 0
        assert result.weights.sum().item() == pytest.approx(1.0)
        assert (jacobian @ result.direction > 0).all()


def test_a_task_that_has_lost_its_gradient_has_no_part_in_mocos_direction() -> None:
    rule, jacobian = MoCo(), torch.eye(3, dtype=torch.float64)
    call(rule, jacobian)
    jacobian[1] = 0
    assert call(rule, jacobian).direction[1] == 0


def test_moco_comes_to_rest_at_the_shortest_vector_of_the_hull() -> None:
    from mtrl_imgrad.aggregators import MGDA

    jacobian = gradients("conflict", 4)
    rule = MoCo(beta=1.0, beta_decay=0.0, gamma=0.5, gamma_decay=0.0)
    for _ in range(800):
        found = call(rule, jacobian).direction
    shortest = MGDA()(jacobian @ jacobian.mT).weights @ jacobian
    assert relative_error(found, shortest) < 1e-6


@pytest.mark.parametrize("name", RULES)
def test_hard_gradients_have_finite_directions(name: str) -> None:
    rows = gradients("shared", 3)
    cases = {
        "one row is zero": rows * torch.tensor([1.0, 0.0, 1.0])[:, None],
        "one is a million times larger": rows * torch.tensor([1.0, 1e6, 1.0])[:, None],
        "rank one": rows[:1] * torch.tensor([1.0, -2.0, 0.5])[:, None],
        "all zero": 0 * rows,
    }
    for label, jacobian in cases.items():
        RULES[name].reset()
        for _ in range(3):
            result = call(RULES[name], jacobian)
            assert result.direction.isfinite().all(), label
            assert result.weights.isfinite().all(), label
            assert all(value.isfinite().all() for value in result.state.values()), label
        if label == "all zero":
            assert (result.direction == 0).all()
        if label == "one row is zero":
            assert result.weights[1] == 0
            others = jacobian[[0, 2]]
            assert (others @ result.direction > 0).all()


# The interface


@pytest.mark.parametrize("name", RULES)
def test_a_bad_number_gives_nan_and_leaves_the_objects_state(name: str) -> None:
    rule, jacobian = RULES[name], gradients("gauss", 3)
    rule.reset()
    call(rule, jacobian)
    before, spoiled = rule.state_dict(), jacobian.clone()
    spoiled[1, 2] = math.nan
    result = call(rule, spoiled)
    assert result.direction.isnan().all()
    assert result.weights.isnan().all()
    assert all(torch.equal(value, before[key]) for key, value in rule.state_dict().items())


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_saved_state_continues_bit_for_bit(name: str) -> None:
    rule, jacobians = RULES[name], course("imbalanced", 4, 9)
    expected = directions(rule, jacobians)
    directions(rule, jacobians[:5])
    fresh = replace(rule)
    assert fresh.state_dict() == {}
    fresh.load_state_dict(rule.state_dict())
    continued = [call(fresh, jacobian, seed=5 + index).direction for index, jacobian in enumerate(jacobians[5:])]
    assert torch.equal(torch.stack(continued), expected[5:])
    with pytest.raises(ValueError, match=rf"state: got \['other'\], {type(rule).__name__} has"):
        fresh.load_state_dict({"other": torch.zeros(1)})


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_call_leaves_the_given_state_as_it_was(name: str) -> None:
    rule, jacobian = RULES[name], gradients("gauss", 3)
    state = {key: value + 0.25 for key, value in rule.initial_state((3,), jacobian.shape[1]).items()}
    before = {key: value.clone() for key, value in state.items()}
    result = rule.aggregate(jacobian @ jacobian.mT, None, some_losses(3), jacobian, state)
    assert set(result.state) == set(before)
    assert all(torch.equal(state[key], before[key]) for key in state)


@pytest.mark.parametrize("name", RULES)
def test_single_precision_stays_close_to_double(name: str) -> None:
    jacobians = course("gauss", 3, 3)
    expected = directions(RULES[name], jacobians)
    found = directions(RULES[name], [jacobian.float() for jacobian in jacobians])
    assert found.dtype == torch.float32
    assert_close_per_call(found.double(), expected, 1e-5)


def test_what_a_rule_needs_is_asked_for_by_name() -> None:
    gramian, jacobian = torch.eye(3), torch.eye(3)
    for rule in (GradDrop(), MoCo(), DBMTL(), AdaTask()):
        with pytest.raises(ValueError, match=rf"jacobian: got None, {type(rule).__name__} needs \[tasks, parameters\]"):
            rule(gramian)
    with pytest.raises(ValueError, match="losses: got None, DBMTL needs one per task"):
        DBMTL()(gramian, jacobian=jacobian)
    with pytest.raises(ValueError, match=r"jacobian: got \(3, 0\), MoCo needs \[tasks, parameters\]"):
        MoCo()(gramian, jacobian=torch.zeros(3, 0))
    for shape in ((), (1,), (4,)):
        for rule in (DBMTL(), MoCo()):
            with pytest.raises(ValueError, match=r"losses: got \(.*\), \w+ needs one per task"):
                rule(gramian, losses=torch.ones(shape), jacobian=jacobian)
    with pytest.raises(ValueError, match=r"noise: got \(2,\), need \(3,\) as drawn by GradDrop.draw_noise"):
        GradDrop()(gramian, torch.zeros(2), jacobian=jacobian)
    with pytest.raises(ValueError, match="losses: DBMTL needs losses >= 0, that of task 1 is -1"):
        DBMTL()(gramian, losses=torch.tensor([1.0, -1.0, 1.0]), jacobian=jacobian)


def test_graddrop_draws_from_the_generator_given() -> None:
    one, other = (GradDrop().draw_noise(3, generator(1), 7) for _ in range(2))
    assert one.shape == (7,)
    assert torch.equal(one, other)
    assert not torch.equal(one, GradDrop().draw_noise(3, generator(2), 7))


def test_dbmtl_gives_own_parameters_the_gradient_of_the_logarithm() -> None:
    losses = some_losses(3)
    torch.testing.assert_close(call(DBMTL(), gradients("gauss", 3), losses).own_weights, 1 / (3 * (losses + 1e-8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradDrop(leak=1.5), "GradDrop.leak: got 1.5, allowed: 0.0 to 1.0"),
        (lambda: MoCo(beta=1.5), "MoCo.beta: got 1.5, allowed: 0.0 to 1.0"),
        (lambda: MoCo(gamma=-1.0), "MoCo.gamma: got -1.0"),
        (lambda: MoCo(beta_decay=-1.0), "MoCo.beta_decay: got -1.0"),
        (lambda: MoCo(gamma_decay=math.nan), "MoCo.gamma_decay: got nan"),
        (lambda: MoCo(rho=-1.0), "MoCo.rho: got -1.0"),
        (lambda: MoCo(projection="ball"), "MoCo.projection: got 'ball', allowed: 'simplex', 'softmax'"),
        (lambda: MoCo(normalization="l2"), "MoCo.normalization: got 'l2', allowed: 'gramian', 'none'"),
        (lambda: DBMTL(beta=-0.1), "DBMTL.beta: got -0.1"),
        (lambda: DBMTL(sigma=-0.1), "DBMTL.sigma: got -0.1"),
        (lambda: AdaTask(combine="max"), "AdaTask.combine: got 'max', allowed: 'mean', 'sum'"),
        (lambda: AdaTask(beta1=1.0), "AdaTask.beta1: got 1.0"),
        (lambda: AdaTask(beta2=-0.5), "AdaTask.beta2: got -0.5"),
        (lambda: AdaTask(eps=0.0), "AdaTask.eps: got 0.0"),
    ],
)
def test_a_wrong_field_is_refused_by_name(make: Callable[[], Aggregator], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", RULES)
def test_compiles_as_one_graph(name: str) -> None:
    rule, jacobian = RULES[name], gradients("gauss", 3)
    noise = rule.draw_noise(3, generator(), jacobian.shape[1])
    state = {key: value + 0.1 for key, value in rule.initial_state((3,), jacobian.shape[1]).items()}

    def run(jacobian: Tensor, losses: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        result = rule.aggregate(jacobian @ jacobian.mT, noise, losses, jacobian, state)
        return result.weights, result.direction, result.state

    inputs = jacobian, some_losses(3), state
    torch._dynamo.reset()  # it counts the rules as recompilations of one function
    compiled = torch.compile(run, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(compiled, run(*inputs), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", RULES)
def test_never_looks_at_a_value_on_the_device(name: str) -> None:
    """Tensors on `meta` have no values, so any look raises."""
    noise = torch.empty(30, device="meta") if "graddrop" in name else None
    losses, jacobian = torch.empty(5, device="meta"), torch.empty(5, 30, device="meta")
    result = RULES[name].aggregate(torch.empty(5, 5, device="meta"), noise, losses, jacobian)
    assert result.direction.shape == (30,)
