"""The compiled update equals the eager one, for every rule and network; it is compiled once; nothing in it waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from small_learner import RULES, draw_noise, random_batch, small_learner, update
from tiny_world import make_world, tiny_config, tiny_sac
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import Aggregation, Aggregator, ConicGrad, IMGrad, Mean, NashMTL
from mtrl_imgrad.aggregators.solvers import dual_cone, simplex
from mtrl_imgrad.compilation import CapturedUpdate, CompiledUpdate, compile_sac
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.sac_update import Metrics, Noise, State
from mtrl_imgrad.task_gradients import chunked_task_gradients

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "multi_head": {"kind": "multi_head", "layer_norm": "plain", "task_input": "none"},
    "shared_encoder": {"share_encoder": True, "layer_norm": "affine", "observation_normalization": True},
}
STATEFUL = {"nashmtl_state": NashMTL(update_weights_every=3), "conicgrad_single_loop": ConicGrad(mode="single_loop")}


def compiled(learner: Learner, backend: str) -> CompiledUpdate:
    dtype = learner.state["critic"].dtype
    return compile_sac(learner.sac, learner.state, random_batch(9, dtype=dtype), draw_noise(learner, 9), backend)


def assert_equal_results(ours: tuple[State, Metrics], theirs: tuple[State, Metrics], tolerance: float) -> None:
    assert ours[0].keys() == theirs[0].keys()
    for name in theirs[0]:
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=tolerance, atol=tolerance, msg=name)
    for found, expected in ((ours[1].per_task, theirs[1].per_task), (ours[1].scalars, theirs[1].scalars)):
        assert found.keys() == expected.keys()
        for tag, value in expected.items():
            if not tag.endswith(("gap", "residual")):
                torch.testing.assert_close(found[tag], value, rtol=100 * tolerance, atol=tolerance, msg=tag)


def assert_equals_eager(learner: Learner, backend: str, tolerance: float) -> None:
    """Over two updates, so that a rule's state and Adam's moments have moved, from the same state each."""
    dtype = learner.state["critic"].dtype
    fast = compiled(learner, backend)
    for seed in (1, 2):
        batch, noise = random_batch(seed, dtype=dtype), draw_noise(learner, seed)
        expected = learner.sac(learner.state, batch, noise)
        assert_equal_results(fast(learner.state, batch, noise), expected, tolerance)
        learner.state |= expected[0]


KINDS = ("imgrad", "graddrop", "famo", "adatask", "rlw", "nashmtl_state")
"""Rules that take part in an update each in their own way; the others are marked slow."""
EACH = [
    pytest.param(rule, id=name, marks=() if name in KINDS else pytest.mark.slow)
    for name, rule in (RULES | STATEFUL).items()
]


@pytest.mark.parametrize("rule", EACH)
def test_the_traced_graph_equals_the_eager_update_for_every_rule(rule):
    assert_equals_eager(small_learner(rule=rule, double=True), "eager", 1e-10)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("critic_loss", ["squared", "categorical"])
def test_the_traced_graph_equals_the_eager_update_for_every_network(network, critic_loss):
    learner = small_learner(network=network, critic_loss=critic_loss, critic_bins=7, shared_temperature=True)
    learner.observe(random_batch(5).observations)
    assert_equals_eager(learner, "aot_eager", 1e-5)


def test_the_traced_graph_equals_the_eager_update_with_a_jacobian_in_pieces():
    learner = small_learner(rule=IMGrad(), network=NETWORKS["multi_head"], double=True)
    learner.sac.gradients = chunked_task_gradients
    assert_equals_eager(learner, "aot_eager", 1e-10)


def test_the_traced_graph_equals_the_eager_update_in_bfloat16():
    assert_equals_eager(small_learner(rule=IMGrad(), precision="bfloat16"), "aot_eager", 1e-4)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_the_compiled_update_equals_the_eager_one(double):
    learner = small_learner(network=NETWORKS["multi_head"], rule=IMGrad(), max_grad_norm=1.0, double=double)
    assert_equals_eager(learner, "inductor", 1e-10 if double else 1e-5)


def test_nothing_is_compiled_again_after_the_first_call():
    learner = small_learner(rule=NashMTL(update_weights_every=2))
    learner._update = compiled(learner, "aot_eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(4):
            update(learner, seed=seed)
    assert float(learner.state["updates"]) == 4


def test_a_bad_number_changes_nothing_but_counters_in_the_compiled_update_too():
    learner = small_learner(rule=IMGrad())
    fast = compiled(learner, "inductor")
    batch = random_batch()
    batch.rewards[1] = torch.inf
    new, _ = fast(learner.state, batch, draw_noise(learner))
    assert all(value.equal(learner.state[name]) for name, value in new.items() if name != "non_finite")
    assert new["non_finite"][:, 1].any()
    assert not new["non_finite"][:, [0, 2]].any()


@dataclass(frozen=True)
class OnTheHost(Aggregator):
    """A user's rule in plain Python, which remembers its calls behind our back."""

    calls: ClassVar[list[float]] = []

    def solve(self, given):
        self.calls.append(float(given.gramian.sum()))
        weights = [1.0 / (1.0 + index) for index in range(given.gramian.shape[-1])]
        return Aggregation(torch.tensor(weights, dtype=torch.float64))


def test_a_rule_in_plain_python_is_called_when_the_graph_runs():
    learner = small_learner(rule=OnTheHost())
    fast = compiled(learner, "aot_eager")
    OnTheHost.calls.clear()
    assert_equal_results(
        fast(learner.state, random_batch(), draw_noise(learner)),
        learner.sac(learner.state, random_batch(), draw_noise(learner)),
        1e-5,
    )
    assert len(OnTheHost.calls) == 4
    assert OnTheHost.calls[:2] == pytest.approx(OnTheHost.calls[2:])


@dataclass(frozen=True)
class Fails(Aggregator):
    """A user's rule with a mistake that shows late."""

    countdown: ClassVar[list[int]] = [6]

    def solve(self, given):
        self.countdown[0] -= 1
        if self.countdown[0] < 0:
            raise ValueError("no answer for this Gramian")
        return Aggregation(given.gramian.diagonal(dim1=-2, dim2=-1))


def test_what_a_rule_raises_comes_out_of_the_compiled_update_as_it_is():
    learner = small_learner(rule=Fails())
    learner._update = compiled(learner, "aot_eager")  # two example calls and two of the first run
    update(learner)
    with pytest.raises(ValueError, match="no answer for this Gramian"):
        update(learner)


def test_a_mistake_in_a_rule_is_not_taken_for_one_of_the_compiler():
    class Typo(Aggregator):
        def solve(self, given):
            return Aggregation(given.gramain)

    with pytest.raises(AttributeError, match="gramain"):
        small_learner(rule=Typo()).compile()


def test_an_edited_rule_of_the_same_name_is_compiled_anew():
    """As in a notebook."""

    def version(names: tuple[str, ...]) -> Aggregator:
        @dataclass(frozen=True)
        class Edited(Aggregator):
            def solve(self, given):
                weights = torch.full_like(given.gramian[..., 0], 0.5)
                return Aggregation(weights, {name: weights.sum(-1) for name in names})

        return Edited()

    for names in ((), ("one",), ("one", "two")):
        learner = small_learner(rule=version(names))
        _, metrics = compiled(learner, "eager")(learner.state, random_batch(), draw_noise(learner))
        assert {f"gradients/critic/{name}" for name in names} <= set(metrics.scalars)


class TestLearnerAndRun:
    def test_a_failing_compiler_is_told_in_one_line_and_training_is_the_eager_one(
        self, tmp_path, monkeypatch, capsys, read_progress
    ):
        def fails(*_: object) -> None:
            raise RuntimeError("no C++ compiler\nwhatever else it says")

        config = tiny_config(tmp_path / "eager", sac=tiny_sac(steps=200, warmup=100))
        train(config, make_world=make_world)
        monkeypatch.setattr("mtrl_imgrad.compilation.CompiledUpdate", fails)
        train(replace(config, compile=True, run_dir=str(tmp_path / "tried")), make_world=make_world)
        said = capsys.readouterr().out
        assert said.count("warning: the update is not compiled, which is slower (RuntimeError: no C++ compiler)") == 1
        assert read_progress(tmp_path / "tried") == read_progress(tmp_path / "eager")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rule", [Mean(), IMGrad(), NashMTL(update_weights_every=2)], ids=["mean", "imgrad", "nashmtl"])
def test_a_captured_update_equals_the_eager_one_over_ten_updates(rule):
    """On a GPU the rule is inside the graph."""
    cuda = torch.device("cuda")
    eager, captured = (small_learner(rule=rule, network=NETWORKS["multi_head"]) for _ in range(2))
    for learner in (eager, captured):
        learner.state = {name: value.to(cuda) for name, value in learner.state.items()}
    for seed in range(10):
        batch = Batch(**{name: part.to(cuda) for name, part in vars(random_batch(seed)).items()})
        drawn = {name: part if part is None else part.to(cuda) for name, part in vars(draw_noise(eager, seed)).items()}
        noise = Noise(**drawn)  # pyright: ignore[reportArgumentType]
        if seed == 0:
            compiled_update = compile_sac(captured.sac, captured.state, batch, noise)
            captured._update = CapturedUpdate(compiled_update, captured.state, batch, noise)
        expected, found = eager.update(batch, noise), captured.update(batch, noise)
        assert_equal_results((captured.state, found), (eager.state, expected), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing in an update waits for the host: tensors on `meta` have no values, so any look at one raises
# ---------------------------------------------------------------------------------------------------------------------


def on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def update_on_meta(rule: Aggregator) -> State:
    learner = small_learner(network=NETWORKS["shared_encoder"] | {"kind": "multi_head"}, rule=rule, max_grad_norm=1.0)
    batch = Batch(**{name: on_meta(tensor) for name, tensor in vars(random_batch()).items()})
    noise = {name: None if part is None else on_meta(part) for name, part in vars(draw_noise(learner)).items()}
    state = {name: on_meta(tensor) for name, tensor in learner.state.items()}
    return learner.sac(state, batch, Noise(**noise))[0]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", RULES | STATEFUL)
def test_no_update_looks_at_a_value(name):
    assert update_on_meta((RULES | STATEFUL)[name])["critic"].device.type == "meta"


LARGE = pytest.param("imgrad_nash", marks=pytest.mark.slow)  # 15,000 operations


@pytest.mark.parametrize("name", [name for name in RULES if name != "imgrad_nash"] + [LARGE])
def test_no_rule_looks_at_a_value_once_a_compiler_has_taken_its_operations_apart(name, monkeypatch):
    """As on a GPU, where the rule is part of the graph: inductor replaces operations by simpler ones before it
    compiles, and one of them (`take`) looked at its index there. It raises where a value is looked at."""
    for solver in (simplex, dual_cone):  # every step has the same operations
        monkeypatch.setattr(solver, "INTERIOR_POINT_STEPS", 3)
    rule, tasks, generator = RULES[name], 3, torch.Generator().manual_seed(1)
    parameters = 7 if rule.needs == "jacobian" else 0
    state, noise = rule.initial_state((tasks,), parameters), rule.draw_noise(tasks, generator, 7)

    def weights(jacobian: Tensor, losses: Tensor, noise: Tensor | None, *held: Tensor) -> Tensor:
        whole = jacobian if parameters else None
        remembered = dict(zip(state, held, strict=True))
        return rule.aggregate(jacobian @ jacobian.T, noise, losses, whole, remembered).weights

    trace = make_fx(weights, tracing_mode="fake", decomposition_table=select_decomp_table())
    graph = trace(torch.randn(tasks, 7, generator=generator), torch.ones(tasks), noise, *state.values()).graph
    assert not [node for node in graph.nodes if "local_scalar" in str(node.target) or "nonzero" in str(node.target)]


@dataclass(frozen=True)
class Looks(Aggregator):
    """Waits for the device, in one of the ways there are."""

    how: str

    def solve(self, given):
        weights = given.gramian.diagonal(dim1=-2, dim2=-1)
        {
            "item": lambda: weights[..., 0].item(),
            "tolist": weights.tolist,
            "numpy": weights.numpy,
            "cpu": weights.cpu,
            "nonzero": weights.nonzero,
            "bool": lambda: bool(weights.any()),
        }[self.how]()
        return Aggregation(weights)


@pytest.mark.parametrize("how", ["item", "tolist", "numpy", "cpu", "nonzero", "bool"])
def test_the_proof_above_sees_a_planted_look(how):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        update_on_meta(Looks(how))
