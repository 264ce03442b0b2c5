"""Rules of this package in TorchJD, and TorchJD's here."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from importlib.util import find_spec

import pytest
import torch
from gradient_families import gradients, noise_for
from torch import Tensor, nn

from mtrl_imgrad.aggregators import (
    AGGREGATORS,
    DBMTL,
    FAMO,
    MGDA,
    RLW,
    AdaTask,
    Aggregator,
    CAGrad,
    GradDrop,
    IMGrad,
    Mean,
    MoCo,
    PCGrad,
    resolve,
)
from mtrl_imgrad.config import Config, aggregator_name, from_dict, to_dict

aggregation = pytest.importorskip("torchjd.aggregation", reason="the extra torchjd is not installed")

from torchjd.autojac import backward, jac_to_grad, mtl_backward  # noqa: E402

from mtrl_imgrad.aggregators import torchjd as interop  # noqa: E402
from mtrl_imgrad.aggregators.torchjd import from_torchjd, to_torchjd  # noqa: E402

HERE = "mtrl_imgrad.aggregators.torchjd"
NEEDS_ECOS = pytest.mark.skipif(find_spec("ecos") is None, reason="TorchJD's NashMTL needs ecos")
NAMES = [pytest.param(name, marks=NEEDS_ECOS if name == "NashMTL" else ()) for name in interop.names()]
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning", "ignore:.*ECOS")


def call(rule: Aggregator, jacobian: Tensor, seed: int = 0) -> Tensor:
    noise = rule.draw_noise(len(jacobian), torch.Generator().manual_seed(seed), jacobian.shape[1])
    result = rule(jacobian @ jacobian.mT, noise, jacobian=jacobian)
    return result.weights.to(jacobian.dtype) @ jacobian if result.direction is None else result.direction


# Ours in TorchJD


@pytest.mark.parametrize("rule", [Mean(), MGDA(), CAGrad(), IMGrad(), AGGREGATORS["config"]()], ids=repr)
def test_our_rule_in_jac_to_grad_is_our_direction(rule: Aggregator) -> None:
    jacobian = gradients("conflict", 4)
    expected = rule(jacobian @ jacobian.mT).weights
    for saves_memory in (False, True):
        parameter = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
        backward(list(jacobian @ parameter))
        weights = jac_to_grad([parameter], to_torchjd(rule), optimize_gramian_computation=saves_memory)
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parameter.grad, expected @ jacobian, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [IMGrad(), GradDrop(), AdaTask(), MoCo()], ids=repr)
def test_our_rule_in_mtl_backward_trains_a_shared_trunk(rule: Aggregator) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(8, size, generator=generator) for size in (3, 2))
    trunk, heads = nn.Linear(3, 4), [nn.Linear(4, 1) for _ in range(2)]
    features = trunk(inputs)
    losses = [((head(features)[:, 0] - target) ** 2).mean() for head, target in zip(heads, targets.T, strict=True)]
    mtl_backward(losses, features=features)
    jac_to_grad(trunk.parameters(), to_torchjd(rule))
    for parameter in (*trunk.parameters(), *heads[0].parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.norm() > 0


def test_a_weighting_takes_the_gramian_and_gives_a_tensor_of_its_dtype() -> None:
    weighting = to_torchjd(CAGrad(c=0.7)).gramian_weighting
    assert isinstance(weighting, aggregation.Weighting)
    jacobian = gradients("conflict", 4).float()
    weights = weighting(jacobian @ jacobian.mT)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, CAGrad(c=0.7)(jacobian @ jacobian.mT).weights.float())


def test_cagrad_without_rescaling_is_torchjds() -> None:
    jacobian = gradients("gauss", 5)
    torch.testing.assert_close(
        to_torchjd(CAGrad(c=0.5, rescale=0))(jacobian), aggregation.CAGrad(c=0.5)(jacobian), rtol=1e-4, atol=1e-4
    )


def test_random_rules_draw_from_torchs_default_generator_there() -> None:
    jacobian = gradients("conflict", 6)
    for rule in (PCGrad(), RLW(), GradDrop()):
        foreign = to_torchjd(rule)
        torch.manual_seed(3)
        first = foreign(jacobian)
        torch.manual_seed(3)
        assert torch.equal(foreign(jacobian), first)
        assert not torch.equal(foreign(jacobian), first)


def test_the_state_is_saved_with_the_module_and_reset_forgets_it() -> None:
    rule, jacobians = MoCo(beta=0.3), [gradients("gauss", 3, seed) for seed in range(4)]
    rule(jacobians[0] @ jacobians[0].mT, jacobian=jacobians[0])
    foreign, fresh = to_torchjd(rule), to_torchjd(rule)
    directions = [foreign(jacobian) for jacobian in jacobians[:3]]
    torch.testing.assert_close(directions[0], 0.3 * jacobians[0].mean(0), rtol=0.2, atol=0.2)  # the rule's own is left
    buffer = io.BytesIO()
    torch.save(foreign.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(jacobians[3]), foreign(jacobians[3]))
    foreign.reset()
    assert torch.equal(foreign(jacobians[0]), directions[0])
    weighted = to_torchjd(CAGrad())
    weighted.load_state_dict(weighted.state_dict())
    weighted.reset()
    assert repr(weighted) == str(weighted) == f"GramianRule({CAGrad()!r})"


@pytest.mark.parametrize("rule", [FAMO(), DBMTL()], ids=repr)
def test_a_rule_that_needs_losses_is_refused(rule: Aggregator) -> None:
    with pytest.raises(ValueError, match=r"needs losses, and TorchJD hands on gradients alone"):
        to_torchjd(rule)


# TorchJD's here


def test_the_classical_ones_are_there() -> None:
    classical = {"CAGrad", "ConFIG", "DualProj", "GradDrop", "Krum", "MGDA", "PCGrad", "TrimmedMean", "UPGrad"}
    assert classical <= set(interop.names())


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_by_name_gives_torchjds_direction(name: str) -> None:
    rule, jacobian = resolve(f"torchjd:{name}")(), gradients("gauss", 4)
    twin = aggregation.NashMTL(4) if name == "NashMTL" else copy.deepcopy(rule.foreign)
    found = call(rule, jacobian, seed=5)
    noise = rule.draw_noise(4, torch.Generator().manual_seed(5))
    torch.manual_seed(int(noise))
    torch.testing.assert_close(found, twin(jacobian), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_by_name_is_a_dataclass_that_a_run_writes_down_and_reads_back(name: str) -> None:
    cls = resolve(f"torchjd:{name}")
    assert cls is resolve(f"torchjd:{name}") is resolve(f"{HERE}:{name}")
    rule = cls()
    assert rule == cls() == pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule)
    assert aggregator_name(rule) == f"torchjd:{name}"
    assert from_dict(to_dict(Config(aggregator=rule))).aggregator == rule
    assert (cls.__doc__ or "").startswith(f"TorchJD's {name}, as it is: ")
    assert ":class:" not in cls.__doc__


def test_the_parameters_of_the_constructor_are_the_fields() -> None:
    rule = resolve("torchjd:CAGrad")(c=0.5)
    assert to_dict(Config(aggregator=rule))["aggregator"] == {"name": "torchjd:CAGrad", "c": 0.5, "norm_eps": 0.0001}
    assert resolve("torchjd:CAGrad")().c == 0.4
    assert resolve("torchjd:AlignedMTL")(scale_mode="rmse").foreign.scale_mode == "rmse"
    assert resolve("torchjd:PCD")().tau == 0.02
    jacobian = gradients("conflict", 4)
    assert not torch.equal(call(rule, jacobian), call(resolve("torchjd:CAGrad")(c=0.9), jacobian))


def test_the_command_line_takes_a_name_and_its_fields() -> None:
    from mtrl_imgrad.overlays import parse_config

    assert parse_config(["--aggregator", "torchjd:ConFIG"]).aggregator == resolve("torchjd:ConFIG")()
    given = parse_config(["--aggregator", "torchjd:CAGrad", "--aggregator.c", "0.5"]).aggregator
    assert given == resolve("torchjd:CAGrad")(c=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchjd:NoSuchRule", "TorchJD has no aggregator 'NoSuchRule'; it has AlignedMTL, CAGrad, ConFIG"),
        ("torchjd:UPGradWeighting", "TorchJD has no aggregator 'UPGradWeighting'"),
        ("torchjd:Constant", "'torchjd:Constant' needs 'weights', which no flag can give"),
    ],
)
def test_what_cannot_be_used_by_name_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_parameter_that_torchjd_refuses_is_told_by_name() -> None:
    with pytest.raises(ValueError, match=r"torchjd:CAGrad: .*-1"):
        resolve("torchjd:CAGrad")(c=-1.0)


def test_a_missing_torchjd_is_one_line_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, HERE)
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ValueError, match=r"'torchjd:CAGrad' needs TorchJD: pip install 'mtrl_imgrad\[torchjd\]'"):
        resolve("torchjd:CAGrad")


def test_an_object_that_plain_parameters_describe_becomes_the_rule_of_its_name() -> None:
    assert from_torchjd(aggregation.CAGrad(c=0.3)) == resolve("torchjd:CAGrad")(c=0.3)
    assert from_torchjd(aggregation.ConFIG()) == resolve("torchjd:ConFIG")()


def test_nashmtls_number_of_tasks_is_that_of_the_call() -> None:
    pytest.importorskip("ecos", reason="TorchJD's NashMTL needs it")
    rule = resolve("torchjd:NashMTL")(optim_niter=10)
    for num_tasks in (3, 5):
        jacobian = gradients("gauss", num_tasks)
        foreign = aggregation.NashMTL(num_tasks, optim_niter=10)
        for _ in range(2):  # it starts at its last answer
            torch.testing.assert_close(call(rule, jacobian), foreign(jacobian))
        assert from_torchjd(foreign) == rule


def test_what_a_wrapped_object_remembers_is_forgotten_in_the_copy() -> None:
    used = aggregation.GramianWeightedAggregator(aggregation.CRMOGMWeighting(aggregation.MGDAWeighting()))
    first, later = used(gradients("conflict", 3)), gradients("imbalanced", 3)
    copied = from_torchjd(used)
    assert not torch.allclose(used(later), copied.foreign(later))
    copied = from_torchjd(used)
    torch.testing.assert_close(call(copied, gradients("conflict", 3)), first)


class Doubled(aggregation.Aggregator):
    """A user's aggregator of TorchJD's kind."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return 2 * matrix.sum(0)


def test_any_other_object_is_wrapped_as_it_is() -> None:
    jacobian = gradients("gauss", 3)
    preference = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    for foreign in (aggregation.ConFIG(preference), aggregation.Constant(preference), Doubled()):
        rule = from_torchjd(foreign)
        torch.testing.assert_close(call(rule, jacobian), foreign(jacobian))
        with pytest.raises(ValueError, match="cannot be written down"):
            aggregator_name(rule)
    torch.testing.assert_close(call(from_torchjd(aggregation.Constant(preference)), jacobian), preference @ jacobian)


def test_without_weights_of_its_own_the_projections_on_the_gradients_are_logged() -> None:
    jacobian = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    result = from_torchjd(Doubled())(jacobian @ jacobian.mT, jacobian=jacobian)
    assert result.weights.tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_bad_numbers_and_no_gradient_never_reach_it(name: str) -> None:
    jacobian = gradients("gauss", 4)
    jacobian[1, 1] = torch.nan
    rule = resolve(f"torchjd:{name}")()
    assert call(rule, jacobian).isnan().all()
    assert (call(rule, torch.zeros(4, 9)) == 0).all()


def test_a_seeded_call_leaves_the_default_generator_alone() -> None:
    rule, jacobian = resolve("torchjd:GradDrop")(), gradients("conflict", 4)
    before = torch.get_rng_state()
    first = call(rule, jacobian, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(call(rule, jacobian, seed=1), first)
    assert not torch.equal(call(rule, jacobian, seed=2), first)


def test_our_rules_need_no_torchjd() -> None:
    assert noise_for(resolve("rlw")(), 3).shape == (3,)
