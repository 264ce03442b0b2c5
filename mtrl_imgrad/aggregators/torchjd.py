"""TorchJD's rules here, and these rules in TorchJD (the extra `torchjd`).

* `to_torchjd(rule)`: one of these rules for `torchjd.autojac`; its `gramian_weighting` is the one for
  `torchjd.autogram`.
* `from_torchjd(aggregator)`, and `--aggregator torchjd:Name`: one of theirs here, `--aggregator.FIELD` being the number
  or string parameters of its constructor.

TorchJD's rules are passed on as they are: sum scale for PCGrad, GradVac, GradDrop and ConFIG, constants that depend on
the gradients' scale, Python loops and solvers that copy to the host, no batches. What they remember is not part of a
checkpoint, and an update that is not finite does not take it back: a resumed run starts it anew.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torchjd.aggregation
from torch import Tensor, nn
from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator, Weighting
from torchjd.linalg import Matrix, PSDMatrix

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, device_of

PLAIN = (float, int, bool, str)
DEFAULTS: dict[str, dict[str, Any]] = {
    "CAGrad": {"c": 0.4},
    "FairGrad": {"alpha": 2.0},
    "Krum": {"n_byzantine": 1},
    "TrimmedMean": {"trim_number": 1},
}
"""Values of parameters that TorchJD asks for: CAGrad's is our rule's, our choice; FairGrad's of its published MT10
command; and one outlier for the robust rules."""


NUM_TASKS = "n_tasks"
"""A parameter of NashMTL's that every call answers by itself."""


class _HoldsRule(nn.Module):
    """A module whose state is its rule's; named before TorchJD's class, so that its `__repr__` comes first."""

    def __init__(self, rule: Aggregator) -> None:
        super().__init__()
        self.rule = rule

    def reset(self) -> None:
        """Forget the rule's state."""
        self.rule.reset()

    def get_extra_state(self) -> dict[str, Tensor]:
        return self.rule.state_dict()

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self.rule.load_state_dict(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r})"

    __str__ = __repr__


class GramianWeighting(_HoldsRule, Weighting[PSDMatrix]):
    """A rule as TorchJD's weighting: `weighting(gramian)` gives the row weights, in the Gramian's dtype.

    `state_dict` holds the rule's state; random numbers come from torch's default generator.
    """

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        return self.rule(gramian).weights.to(gramian.dtype)


class GramianRule(GramianWeightedAggregator):
    """A rule that needs the Gramian alone, as TorchJD's aggregator."""

    gramian_weighting: GramianWeighting

    def __init__(self, rule: Aggregator) -> None:
        super().__init__(GramianWeighting(rule))

    def reset(self) -> None:
        """Forget the rule's state."""
        self.gramian_weighting.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.gramian_weighting.rule!r})"

    __str__ = __repr__


class JacobianRule(_HoldsRule, torchjd.aggregation.Aggregator):
    """A rule that needs J, as TorchJD's aggregator; there is no weighting of it."""

    @torch.no_grad()
    def forward(self, matrix: Matrix, /) -> Tensor:
        result = self.rule(matrix @ matrix.mT, jacobian=matrix)
        return result.weights.to(matrix.dtype) @ matrix if result.direction is None else result.direction


def to_torchjd(rule: Aggregator) -> GramianRule | JacobianRule:
    """A copy of a rule, without its state, for `jac_to_grad` and whatever else takes a TorchJD aggregator.

    AdaTask's direction is a step as Adam would take it, and is to be followed by plain SGD: under another Adam its
    length would be lost.

    Raises:
        ValueError: the rule needs losses, which TorchJD does not hand on.
    """
    own = copy.deepcopy(rule)
    own.reset()
    if rule.needs == "gramian":
        return GramianRule(own)
    if rule.needs == "losses" or rule.critic_only:
        raise ValueError(f"rule: {rule!r} needs losses, and TorchJD hands on gradients alone")
    return JacobianRule(own)


class TorchJDRule(Aggregator):
    """One of TorchJD's aggregators as a rule. A call of a rule with randomness is seeded by `draw_noise`.

    A Jacobian with a number that is not finite never reaches it (several raise), nor one that is all 0. The weights are
    its own where it has some; else, for the log alone, <g_i, d> / ||g_i||^2.
    """

    needs: ClassVar[Needs] = "jacobian"
    paper: ClassVar[str] = "TorchJD, github.com/SimplexLab/TorchJD"

    @property
    def foreign(self) -> torchjd.aggregation.Aggregator:
        """TorchJD's object."""
        raise NotImplementedError

    def draw_noise(self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0) -> Tensor:
        """A seed."""
        return torch.randint(2**62, (), generator=generator, device=device_of(generator))

    def solve(self, given: Given) -> Aggregation:
        jacobian, foreign = given.jacobian, self.foreign
        assert jacobian is not None
        usable = torch.isfinite(jacobian).all() & (jacobian != 0).any()
        stand_in = torch.eye(*jacobian.shape, dtype=jacobian.dtype, device=jacobian.device)
        rows = torch.where(usable, jacobian, stand_in)
        with torch.random.fork_rng([jacobian.device] if jacobian.is_cuda else [], enabled=given.noise is not None):
            if given.noise is not None:
                torch.manual_seed(int(given.noise))
            if isinstance(foreign, WeightedAggregator):
                weights = foreign.weighting(rows)
                return Aggregation(torch.where(usable, weights, 0.0).double())
            direction = torch.where(usable, foreign(rows), 0.0)
        squared_norms = (jacobian * jacobian).sum(-1)
        shares = (jacobian @ direction) / torch.where(squared_norms > 0, squared_norms, 1.0)
        return Aggregation(shares.double(), direction=direction)


@dataclass(frozen=True, eq=False)
class Wrapped(TorchJDRule):
    """An object of TorchJD's that its plain parameters alone do not describe; a run cannot write it down."""

    aggregator: torchjd.aggregation.Aggregator
    """TorchJD's object."""

    @property
    def foreign(self) -> torchjd.aggregation.Aggregator:
        return self.aggregator


class _Named(TorchJDRule):
    """A rule that builds its object from its own fields, once they are checked."""

    source: ClassVar[type[torchjd.aggregation.Aggregator]]

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        if NUM_TASKS in inspect.signature(self.source.__init__).parameters:
            values[NUM_TASKS] = 1
        name = f"torchjd:{type(self).__name__}"
        try:
            built = self.source(**values)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
        object.__setattr__(self, "_foreign", built)

    @property
    def foreign(self) -> torchjd.aggregation.Aggregator:
        return vars(self)["_foreign"]

    def solve(self, given: Given) -> Aggregation:
        _set_num_tasks(self.foreign, given.gramian.shape[-1])
        return super().solve(given)


def from_torchjd(aggregator: torchjd.aggregation.Aggregator) -> TorchJDRule:
    """A rule that does what this object of TorchJD's does, without what it remembers (a user's class: if it is
    TorchJD's `Stateful`).

    Where plain parameters describe it, the rule is the one of `--aggregator torchjd:Name`, which a run writes down and
    reads back; else it wraps a copy, for use from Python.
    """
    name = type(aggregator).__name__
    if getattr(torchjd.aggregation, name, None) is type(aggregator):
        try:
            cls = named(name)
            values = {f.name: getattr(aggregator, f.name) for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
            rule = cls(**values)
            _set_num_tasks(rule.foreign, getattr(aggregator, NUM_TASKS, 1))
        except (ValueError, AttributeError):
            pass  # a parameter that is no number or string
        else:
            if all(type(value) in PLAIN for value in values.values()) and repr(rule.foreign) == repr(aggregator):
                return rule
    own = copy.deepcopy(aggregator)
    for part in own.modules():
        if isinstance(part, torchjd.Stateful):
            part.reset()
    return Wrapped(own)


@functools.cache
def named(name: str) -> type[TorchJDRule]:
    """The dataclass of `torchjd:name`; the same object in every call.

    Raises:
        ValueError: TorchJD has no such aggregator, or its constructor asks for something that is no number or string.
    """
    source = getattr(torchjd.aggregation, name, None)
    if not (isinstance(source, type) and issubclass(source, torchjd.aggregation.Aggregator)):
        raise ValueError(f"aggregator: TorchJD has no aggregator {name!r}; it has {', '.join(names())}")
    fields: list[tuple[str, Any, Any]] = []
    hints = typing.get_type_hints(source.__init__)
    for parameter in list(inspect.signature(source.__init__).parameters.values())[1:]:
        if parameter.name == NUM_TASKS:
            continue
        default = DEFAULTS.get(name, {}).get(parameter.name, parameter.default)
        kind = _plain_type(hints.get(parameter.name), default)
        if kind is not None:
            fields.append((parameter.name, kind, default))
        elif default is inspect.Parameter.empty:
            raise ValueError(
                f"aggregator: 'torchjd:{name}' needs {parameter.name!r}, which no flag can give; build it in Python, "
                "and use from_torchjd outside of runs"
            )
    namespace = {
        "source": source,
        "__doc__": f"TorchJD's {name}, as it is: {_first_sentence(source)}",
        "__module__": __name__,
    }
    return dataclasses.make_dataclass(name, fields, bases=(_Named,), namespace=namespace, frozen=True)


def _set_num_tasks(foreign: torchjd.aggregation.Aggregator, num_tasks: int) -> None:
    if getattr(foreign, NUM_TASKS, num_tasks) != num_tasks:
        setattr(foreign, NUM_TASKS, num_tasks)
        typing.cast(torchjd.Stateful, foreign).reset()


def names() -> list[str]:
    """TorchJD's aggregators that can be used by name."""

    def usable(name: str) -> bool:
        source = getattr(torchjd.aggregation, name)
        if not (isinstance(source, type) and issubclass(source, torchjd.aggregation.Aggregator)):
            return False
        try:
            return not inspect.isabstract(source) and named(name) is not None
        except ValueError:
            return False

    return sorted(name for name in torchjd.aggregation.__all__ if usable(name))


def _plain_type(hint: Any, default: object) -> Any:
    """The type of a field for a parameter annotated so, or None where it cannot be one."""
    if default is inspect.Parameter.empty:
        return None
    if typing.get_origin(hint) is typing.Literal or hint in PLAIN:
        return hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next((kind for kind in typing.get_args(hint) if kind in PLAIN and type(default) is kind), None)
    return None


def _first_sentence(source: type) -> str:
    """The first sentence of its documentation, without the marks of reStructuredText."""
    text = " ".join((inspect.getdoc(source) or "").split())
    text = re.sub(r"`([^`<]+?) ?<([^>]+)>`_", r"\1 (\2)", re.sub(r":class:`~?(?:\w+\.)*(\w+)`", r"\1", text))
    return text.partition(". ")[0].rstrip(".") + "."


def __getattr__(name: str) -> type[TorchJDRule]:
    """The rules of `named` as attributes of this module, so that they can be pickled."""
    if name.startswith("_") or name not in torchjd.aggregation.__all__:
        raise AttributeError(name)
    try:
        return named(name)
    except ValueError as error:
        raise AttributeError(str(error)) from error
