"""What every rule shares: dtypes, batches, bad numbers, validation, names; and how a user adds a rule."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gradient_families import RULES, SOLVED, gradients, noise_for

from mtrl_imgrad.aggregators import (
    AGGREGATORS,
    DWA,
    MGDA,
    Aggregation,
    Aggregator,
    CAGrad,
    CAGradFast,
    ConicGrad,
    Given,
    GradNorm,
    GradVac,
    IMGrad,
    Mean,
    NashMTL,
    PCGrad,
    SDMGrad,
    SDMGradOS,
    UncertaintyWeighting,
    base,
    resolve,
)

REAL_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_any_real_dtype_is_read_exactly(name: str, dtype: torch.dtype) -> None:
    gramian = torch.tensor([[3.0, -1.0, 1.0], [-1.0, 2.0, 0.0], [1.0, 0.0, 5.0]]).to(dtype)
    noise = noise_for(RULES[name], 3)
    weights = RULES[name](gramian, noise).weights
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, RULES[name](gramian.double(), noise).weights)


@pytest.mark.parametrize("name", RULES)
def test_a_batch_is_the_same_as_a_loop(name: str) -> None:
    jacobian = torch.stack([gradients(family, 4) for family in ("conflict", "parallel", "imbalanced", "lowrank")])
    jacobian[1, 2] = 0.0
    gramian, noise = (jacobian @ jacobian.mT).reshape(2, 2, 4, 4), noise_for(RULES[name], 4)
    result = RULES[name](gramian, noise)
    assert result.weights.shape == (2, 2, 4)
    for row in range(2):
        for column in range(2):
            alone = RULES[name](gramian[row, column], noise)
            torch.testing.assert_close(result.weights[row, column], alone.weights, rtol=1e-10, atol=1e-12)
            for key, value in alone.diagnostics.items():
                assert result.diagnostics[key].shape == (2, 2)
                torch.testing.assert_close(result.diagnostics[key][row, column], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", RULES)
def test_a_bad_number_gives_nan_for_its_own_gramian_only(name: str, bad: float) -> None:
    jacobian = gradients("conflict", 4)
    gramian = (jacobian @ jacobian.mT).repeat(3, 1, 1)
    gramian[1, 0, 2] = bad
    noise = noise_for(RULES[name], 4)
    result, alone = RULES[name](gramian, noise), RULES[name](gramian[0], noise)
    assert result.weights[1].isnan().all()
    torch.testing.assert_close(result.weights[0], alone.weights)
    torch.testing.assert_close(result.weights[2], alone.weights)
    for value in result.diagnostics.values():
        assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("rule", [GradVac(), NashMTL(update_weights_every=2)], ids=["gradvac", "nashmtl"])
def test_a_bad_number_leaves_the_state_as_it_was(rule: Aggregator) -> None:
    rule, noise = dataclasses.replace(rule), noise_for(rule, 4)
    gramian = gradients("conflict", 4) @ gradients("conflict", 4).mT
    rule(gramian, noise)
    before = rule.state_dict()
    assert rule(gramian * torch.nan, noise).weights.isnan().all()
    after = rule.state_dict()
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("num_tasks", [1, 2, 50])
@pytest.mark.parametrize("name", RULES)
def test_no_gradient_at_all_gives_weight_0(name: str, num_tasks: int) -> None:
    result = RULES[name](torch.zeros(num_tasks, num_tasks), noise_for(RULES[name], num_tasks))
    assert result.weights.tolist() == [0.0] * num_tasks
    assert all(torch.isfinite(value) for value in result.diagnostics.values())


@pytest.mark.parametrize("scale", [1e-40, 1e40])
def test_which_tasks_have_a_gradient_does_not_depend_on_its_scale(scale: float) -> None:
    gramian = torch.diag(torch.tensor([1.0, 1e-22, 1e-26], dtype=torch.float64))
    assert Mean()(scale * gramian).weights.tolist() == pytest.approx([1 / 3, 1 / 3, 0.0])


@pytest.mark.parametrize("name", RULES)
def test_the_gramian_is_left_as_it_was(name: str) -> None:
    gramian = torch.eye(3).requires_grad_()
    weights = RULES[name](gramian).weights
    assert not weights.requires_grad
    assert torch.equal(gramian, torch.eye(3))


def test_only_the_symmetric_part_counts() -> None:
    jacobian = gradients("conflict", 3)
    gramian = jacobian @ jacobian.mT
    skew = torch.tensor([[0.0, 1.0, -2.0], [-1.0, 0.0, 3.0], [2.0, -3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(CAGrad()(gramian + skew).weights, CAGrad()(gramian).weights)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (0, 0), (2, 3, 1)], ids=str)
def test_a_wrong_shape_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="gramian: got shape"):
        Mean()(torch.zeros(shape))


REMEMBERING = {
    "conicgrad": ConicGrad(mode="single_loop"),
    "gradvac": GradVac(),
    "nashmtl": NashMTL(update_weights_every=2),
    "uw": UncertaintyWeighting(),
    "gradnorm": GradNorm(),
    "dwa": DWA(),
}


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_state_of_another_shape_is_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    rule = dataclasses.replace(REMEMBERING[name])
    rule(torch.eye(3), losses=torch.ones(3))
    other = torch.eye(shape[-1]).expand(shape)
    with pytest.raises(ValueError, match=r"state: got \{.*\}, need \{.*\}; `reset` forgets"):
        rule(other, losses=torch.ones(shape[:-1]))
    fresh = dataclasses.replace(rule)
    fresh.load_state_dict(rule.state_dict())
    with pytest.raises(ValueError, match="state: got"):
        fresh(other, losses=torch.ones(shape[:-1]))
    rule.reset()
    assert rule(other, losses=torch.ones(shape[:-1])).weights.shape == shape[:-1]


@pytest.mark.parametrize("name", ["mean", "uw", "dwa", "gradnorm", "famo"])
def test_losses_of_another_shape_are_refused_by_name(name: str) -> None:
    for shape in ((), (1,), (4,), (1, 3)):
        with pytest.raises(ValueError, match=r"losses: got \(.*\), \w+ needs one per task"):
            AGGREGATORS[name]()(torch.eye(3), losses=torch.ones(shape))


@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["uw", "dwa", "gradnorm", "famo"])
def test_a_loss_that_is_not_finite_is_told_by_its_weight_and_not_remembered(name: str, loss: float) -> None:
    rule = AGGREGATORS[name]()
    rule(torch.eye(3), losses=torch.ones(3))
    before = rule.state_dict()
    assert rule(torch.eye(3), losses=torch.tensor([1.0, loss, 1.0])).weights[1].isnan()
    assert all(torch.equal(value, before[key]) for key, value in rule.state_dict().items())


def test_a_complex_gramian_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"gramian: got dtype torch\.complex64"):
        Mean()(torch.zeros(2, 2, dtype=torch.complex64))


def test_pcgrad_draws_from_the_default_generator_when_called_by_hand() -> None:
    jacobian = gradients("conflict", 6)
    gramian = jacobian @ jacobian.mT
    torch.manual_seed(4)
    first, second = PCGrad()(gramian).weights, PCGrad()(gramian).weights
    torch.manual_seed(4)
    assert torch.equal(PCGrad()(gramian).weights, first)
    assert not torch.equal(first, second)


def test_pcgrad_refuses_noise_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"noise: got \(2, 2\), need \[..., 3, 3\]"):
        PCGrad()(torch.eye(3), torch.rand(2, 2))


@pytest.mark.parametrize("name", RULES)
def test_only_random_rules_draw_noise_and_from_the_generator_given(name: str) -> None:
    one, other = noise_for(RULES[name], 4, seed=1), noise_for(RULES[name], 4, seed=1)
    if type(RULES[name]).draw_noise is not Aggregator.draw_noise:
        assert one.shape[-1] == 4
        assert torch.equal(one, other)
        assert not torch.equal(one, noise_for(RULES[name], 4, seed=2))
    else:
        assert one is None


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        (CAGrad, {"c": -0.1}, r"CAGrad.c: got -0.1, allowed: 0"),
        (CAGrad, {"c": float("inf")}, r"CAGrad.c: got inf"),
        (CAGrad, {"rescale": 3}, r"CAGrad.rescale: got 3, allowed: 0, 1, 2"),
        (IMGrad, {"c": float("nan")}, r"IMGrad.c: got nan"),
        (IMGrad, {"variant": "eq10"}, r"IMGrad.variant: got 'eq10', allowed: 'official', 'eq9', 'eq11'"),
        (ConicGrad, {"c": 1.5}, r"ConicGrad.c: got 1.5, allowed: 0.0 to 1.0"),
        (ConicGrad, {"on_infeasible": "stop"}, r"ConicGrad.on_infeasible: got 'stop', allowed: 'boundary'"),
        (ConicGrad, {"mode": "two_loops"}, r"ConicGrad.mode: got 'two_loops', allowed: 'exact', 'single_loop'"),
        (ConicGrad, {"lr": 0.0}, r"ConicGrad.lr: got 0.0"),
        (ConicGrad, {"gamma": -1.0}, r"ConicGrad.gamma: got -1.0, allowed: 0.0"),
        (GradVac, {"beta": 1.5}, r"GradVac.beta: got 1.5, allowed: 0.0 to 1.0"),
        (CAGradFast, {"n": 0}, r"CAGradFast.n: got 0, allowed: 1"),
        (CAGradFast, {"c": -1.0}, r"CAGradFast.c: got -1.0"),
        (CAGradFast, {"rescale": 4}, r"CAGradFast.rescale: got 4, allowed: 0, 1, 2"),
        (CAGradFast, {"solver": "gpu"}, r"CAGradFast.solver: got 'gpu'"),
        (SDMGrad, {"lam": -0.1}, r"SDMGrad.lam: got -0.1, allowed: 0.0"),
        (SDMGrad, {"solver": "gpu"}, r"SDMGrad.solver: got 'gpu'"),
        (SDMGradOS, {"n": 0}, r"SDMGradOS.n: got 0, allowed: 1"),
        (SDMGradOS, {"lam": -0.1}, r"SDMGradOS.lam: got -0.1"),
        (MGDA, {"solver": "gpu"}, r"MGDA.solver: got 'gpu', allowed: 'auto', 'device', 'host'"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_wrong_field_is_refused_by_name(rule: type[Aggregator], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**fields)


@pytest.mark.parametrize("rule", AGGREGATORS.values(), ids=AGGREGATORS)
def test_every_rule_is_a_dataclass_that_needs_no_argument(rule: type[Aggregator]) -> None:
    assert dataclasses.is_dataclass(rule)
    assert rule() == rule()


@pytest.mark.parametrize("name", SOLVED)
def test_solved_rules_report_their_gaps(name: str) -> None:
    jacobian = gradients("gauss", 5)
    diagnostics = RULES[name](jacobian @ jacobian.mT, noise_for(RULES[name], 5)).diagnostics
    assert 0 <= diagnostics["gap"] < 1e-9
    if name not in ("upgrad", "dualproj"):
        assert 0 <= diagnostics["relative_gap"] < 1e-9


@dataclass(frozen=True)
class Shortest(Aggregator):
    """A user's rule: all the weight on the task with the smallest gradient."""

    def solve(self, given: Given) -> Aggregation:
        norms = torch.where(given.active, given.gramian.diagonal(dim1=-2, dim2=-1), torch.inf)
        weights = (norms == norms.amin(-1, keepdim=True)).to(given.gramian.dtype)
        return Aggregation(weights, {"smallest": norms.amin(-1)})


def test_a_users_rule_needs_one_method() -> None:
    result = Shortest()(torch.diag(torch.tensor([4.0, 0.0, 2.0])).repeat(2, 1, 1))
    assert result.weights.tolist() == [[0.0, 0.0, 1.0]] * 2
    assert result.diagnostics["smallest"].tolist() == [1.0, 1.0]  # 2 over the mean of 4, 0, 2


def test_the_rule_shown_in_the_documentation_works() -> None:
    _, _, snippet = (base.__doc__ or "").partition(":\n\n")
    names = {"dataclass": dataclass, "Aggregator": Aggregator, "Aggregation": Aggregation, "torch": torch}
    exec(textwrap.dedent(snippet), names)
    weights = names["InverseNorm"]()(torch.diag(torch.tensor([4.0, 0.0, 1.0]))).weights
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 0, 2 / 3], dtype=torch.float64))


def test_registry_names_resolve() -> None:
    assert {name: resolve(name) for name in AGGREGATORS} == AGGREGATORS


def test_a_class_in_the_current_directory_resolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
    from dataclasses import dataclass
    from mtrl_imgrad.aggregators import Aggregation, Aggregator

    @dataclass(frozen=True)
    class First(Aggregator):
        def solve(self, given):
            weights = given.gramian.new_zeros(given.active.shape)
            return Aggregation(weights.index_fill_(-1, given.active.long()[..., :1] * 0, 1.0))

    class NotARule:
        pass
    """
    (tmp_path / "users_rule_in_cwd.py").write_text(textwrap.dedent(source))
    monkeypatch.chdir(tmp_path)
    assert resolve("users_rule_in_cwd:First")()(torch.eye(3)).weights.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="'users_rule_in_cwd:NotARule' is not a dataclass derived"):
        resolve("users_rule_in_cwd:NotARule")
    with pytest.raises(ValueError, match="has no class 'Firts'; did you mean 'First'"):
        resolve("users_rule_in_cwd:Firts")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imgard", "got 'imgard'; did you mean 'imgrad'"),
        ("IMGrad", "did you mean 'imgrad'"),
        ("zzz", rf"got 'zzz'; allowed: {', '.join(AGGREGATORS)}, torchjd:Name, or module:Class"),
        ("no_such_module:Rule", "cannot import 'no_such_module'"),
        ("math:sqrt", "is not a dataclass derived"),
        (":Rule", "cannot import ''"),
    ],
    ids=lambda text: text.split()[0],
)
def test_an_unknown_name_is_one_line_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
