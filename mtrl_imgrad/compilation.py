"""The whole update as one compiled graph, or as one captured CUDA graph.

The update, its backward passes included, is traced into one graph of tensor operations, which torch.compile takes with
`fullgraph=True`. On a CPU an aggregator is one opaque operator of that graph: its host solver (numpy) is faster there
than a compiled iteration of fixed length, and a user's `solve` may be any Python. On a GPU the aggregator is traced
too, and nothing in the graph waits for the host.

The graph is for fixed shapes and made once; torch keeps what it compiled on disk for the next process.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mtrl_imgrad.aggregators import Aggregation, Aggregator
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.sac_update import Metrics, Noise, SacUpdate, State, remembered

Update: TypeAlias = Callable[[State, Batch, Noise], tuple[State, Metrics]]
OPERATOR = (
    "(int rule, Tensor gramian, Tensor? noise, Tensor losses, Tensor? jacobian, Tensor[] state, float rounding)"
    " -> Tensor[]"
)
RULES: WeakValueDictionary[int, Aggregator] = WeakValueDictionary()
"""What the first argument of an operator stands for: a graph can hold numbers and tensors alone."""


# ---------------------------------------------------------------------------------------------------------------------
# An aggregator as one operator
# ---------------------------------------------------------------------------------------------------------------------


class CompilationError(RuntimeError):
    """There is no compiled update."""


@dataclass(frozen=True)
class OpaqueRule:
    """A rule whose `aggregate` is one operator of a graph, called as it is when the graph runs.

    Attributes:
        rule: the rule.
        number: its key in RULES.
        operator: takes the arguments of OPERATOR, gives the tensors of `flattened`.
        example: an aggregation with the names that the rule's have.
    """

    rule: Aggregator
    number: int
    operator: Callable[..., Sequence[Tensor]]
    example: Aggregation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def aggregate(
        self,
        gramian: Tensor,
        noise: Tensor | None,
        losses: Tensor,
        jacobian: Tensor | None,
        state: State,
        rounding: float,
    ) -> Aggregation:
        """See `Aggregator.aggregate`."""
        held = [state[name] for name in sorted(state)]
        found = self.operator(self.number, gramian, noise, losses, jacobian, held, rounding)
        return restored(found, self.example)


def flattened(aggregation: Aggregation) -> list[Tensor]:
    """Its tensors in a fixed order; copies, since an operator's outputs may be neither its inputs nor one another."""
    parts = [aggregation.weights, *aggregation.diagnostics.values()]
    parts += [aggregation.state[name] for name in sorted(aggregation.state)]
    parts += [part for part in (aggregation.own_weights, aggregation.direction) if part is not None]
    return [part.clone() for part in parts]


def restored(parts: Sequence[Tensor], example: Aggregation) -> Aggregation:
    """The inverse of `flattened`, given an aggregation with the same names."""
    left = iter(parts)
    return Aggregation(
        next(left),
        {name: next(left) for name in example.diagnostics},
        {name: next(left) for name in sorted(example.state)},
        None if example.own_weights is None else next(left),
        None if example.direction is None else next(left),
    )


def opaque(rule: Aggregator, tasks: int, parameters: int, state: State, dtype: torch.dtype) -> OpaqueRule:
    """The rule as one operator.

    The operator is named after the rule and its sizes, and lasts as long as the process: what torch compiled for an
    equal rule, here or in another process, fits.

    Args:
        rule: any rule; it is called once.
        tasks: K.
        parameters: shared parameters, the columns of J.
        state: what the rule remembers.
        dtype: of losses and gradients.
    """
    noise = rule.draw_noise(tasks, torch.Generator(), parameters)
    jacobian = torch.eye(tasks, parameters, dtype=dtype) if rule.needs == "jacobian" else None
    names = sorted(state)
    losses = torch.ones(tasks, dtype=dtype)
    example = rule.aggregate(torch.eye(tasks, dtype=torch.float64), noise, losses, jacobian, state)
    shapes = [(part.shape, part.dtype) for part in flattened(example)]
    outputs = (names, list(example.diagnostics), shapes)
    kind = f"{outputs} {type(rule).__module__} {type(rule).__qualname__} {rule!r} {tasks} {parameters} {dtype}"
    name = f"aggregate_{hashlib.sha256(kind.encode()).hexdigest()[:16]}"
    if not hasattr(torch.ops.mtrl_imgrad, name):

        def call(
            rule: int,
            gramian: Tensor,
            noise: Tensor | None,
            losses: Tensor,
            jacobian: Tensor | None,
            state: list[Tensor],
            rounding: float,
        ) -> list[Tensor]:
            held = dict(zip(names, state, strict=True))
            return flattened(RULES[rule].aggregate(gramian, noise, losses, jacobian, held, rounding))

        torch.library.define(f"mtrl_imgrad::{name}", OPERATOR)
        torch.library.impl(f"mtrl_imgrad::{name}", "cpu", call)
        torch.library.register_fake(
            f"mtrl_imgrad::{name}", lambda *_: [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        )
    number = next(number for number in itertools.count() if number not in RULES)  # a graph holds it as a constant
    RULES[number] = rule
    return OpaqueRule(rule, number, getattr(torch.ops.mtrl_imgrad, name), example)


# ---------------------------------------------------------------------------------------------------------------------
# The graph
# ---------------------------------------------------------------------------------------------------------------------


class CompiledUpdate:
    """An update that was traced and compiled for the shapes of its arguments. Calling it gives what `update` gives, up
    to rounding.

    Args:
        update: what to compile.
        state, batch, noise: arguments of the shapes to come. They are used for one call, whose results are dropped.
        backend: torch.compile's.
    """

    def __init__(self, update: Update, state: State, batch: Batch, noise: Noise, backend: str = "inductor") -> None:
        self.state_names = list(state)
        self.noises = [name for name, tensor in vars(noise).items() if tensor is not None]
        self.batch_names = list(vars(batch))
        self.update = update  # its rules have to live as long as the graph
        self.outputs: tuple[list[str], ...] = ()

        def flat(tensors: list[Tensor]) -> list[Tensor]:
            left = iter(tensors)
            taken = {name: next(left) for name in self.state_names}
            rows = Batch(**{name: next(left) for name in self.batch_names})
            drawn = {name: next(left) if name in self.noises else None for name in vars(noise)}
            new, metrics = update(taken, rows, Noise(**drawn))  # pyright: ignore[reportArgumentType]
            parts = (new, *vars(metrics).values())
            self.outputs = tuple(list(part) for part in parts)
            return [tensor for part in parts for tensor in part.values()]

        traced = make_fx(flat, tracing_mode="fake")(self._tensors(state, batch, noise))
        # The number of threads is part of the generated code, so it has to be part of what torch keeps it under.
        options: Any = {"cpp.threads": torch.get_num_threads()} if backend == "inductor" else None
        # Not the module itself: what it does on an error would be compiled too, and hide the error.
        self.graph = torch.compile(traced.forward, fullgraph=True, dynamic=False, backend=backend, options=options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of itself
            self(state, batch, noise)

    def _tensors(self, state: State, batch: Batch, noise: Noise) -> list[Tensor]:
        parts = vars(noise)
        return [*(state[name] for name in self.state_names), *vars(batch).values(), *(parts[n] for n in self.noises)]

    @torch.no_grad()
    def __call__(self, state: State, batch: Batch, noise: Noise) -> tuple[State, Metrics]:
        """See `SacUpdate`."""
        left = iter(self.graph(self._tensors(state, batch, noise)))
        new, *metrics = ({name: next(left) for name in names} for names in self.outputs)
        return new, Metrics(*metrics)


def with_operators(update: SacUpdate, state: State) -> SacUpdate:
    """The update with copies of its rules as operators, for a CPU; elsewhere the update itself."""
    if state["critic"].device.type != "cpu":
        return update
    layouts, tasks = {"critic": update.critic.layout, "actor": update.actor.layout}, len(state["log_alpha"])
    rules = {
        name: opaque(copy.deepcopy(rule), tasks, layouts[name].shared_size, remembered(name, state), state[name].dtype)
        for name, rule in update.rules.items()
    }
    return replace(update, rules=rules)  # pyright: ignore[reportArgumentType]


def compile_sac(
    update: SacUpdate, state: State, batch: Batch, noise: Noise, backend: str = "inductor"
) -> CompiledUpdate:
    """The update compiled, on a CPU with its rules as operators. Arguments are those of `CompiledUpdate`.

    Raises:
        CompilationError: in one line why the compiler failed. What the rules raise comes out as it is.
    """
    prepared = with_operators(update, state)
    try:
        compiled = CompiledUpdate(prepared, state, batch, noise, backend)
    except Exception as error:  # a compiler may raise anything
        while (inner := error.__cause__ or error.__context__) is not None:
            error = inner
        reason = str(error).strip().splitlines() or [""]
        raise CompilationError(f"{type(error).__name__}: {reason[0]}") from error
    # The call that compiled was made with copies, since a foreign rule may remember it.
    for name, rule in prepared.rules.items():
        if isinstance(rule, OpaqueRule):
            RULES[rule.number] = update.rules[name]
    return compiled


class CapturedUpdate:
    """An update as one CUDA graph: a single launch, on tensors of its own that arguments are copied to.

    The state that it returns is its own and changes with the next call; the metrics are the caller's.

    Args:
        update: what to capture: an update that waits for nothing.
        state, batch, noise: arguments of the shapes to come, on the GPU.
    """

    def __init__(self, update: Update, state: State, batch: Batch, noise: Noise) -> None:
        self.state = {name: value.clone() for name, value in state.items()}
        self.batch = Batch(**{name: value.clone() for name, value in vars(batch).items()})
        drawn = {name: None if value is None else value.clone() for name, value in vars(noise).items()}
        self.noise = Noise(**drawn)  # pyright: ignore[reportArgumentType]
        # The first calls, outside of the graph, let libraries allocate their workspaces.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                update(self.state, self.batch, self.noise)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            new, self.metrics = update(self.state, self.batch, self.noise)
            for name, value in new.items():
                self.state[name].copy_(value)
        self.changing = list(new)

    def __call__(self, state: State, batch: Batch, noise: Noise) -> tuple[State, Metrics]:
        """See `SacUpdate`."""
        for own, given in ((self.state, state), (vars(self.batch), vars(batch)), (vars(self.noise), vars(noise))):
            for name, value in own.items():
                if value is not None and value is not given[name]:
                    value.copy_(given[name])
        self.graph.replay()
        metrics = ({tag: value.clone() for tag, value in part.items()} for part in vars(self.metrics).values())
        return {name: self.state[name] for name in self.changing}, Metrics(*metrics)
