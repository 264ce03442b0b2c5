"""Aggregation rules: from the Gramian of the per-task gradients to the row weights of one direction."""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import is_dataclass
from pathlib import Path

from mtrl_imgrad.aggregators.alignedmtl import AlignedMTL
from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given
from mtrl_imgrad.aggregators.cagrad import CAGrad
from mtrl_imgrad.aggregators.conicgrad import ConicGrad
from mtrl_imgrad.aggregators.dualproj import DualProj
from mtrl_imgrad.aggregators.fairgrad import FairGrad
from mtrl_imgrad.aggregators.imgrad import IMGrad
from mtrl_imgrad.aggregators.imgrad_nash import IMGradNash
from mtrl_imgrad.aggregators.imtlg import IMTLG
from mtrl_imgrad.aggregators.mean import Mean
from mtrl_imgrad.aggregators.mgda import MGDA
from mtrl_imgrad.aggregators.nashmtl import NashMTL
from mtrl_imgrad.aggregators.pcgrad import PCGrad
from mtrl_imgrad.aggregators.sum import Sum
from mtrl_imgrad.aggregators.upgrad import UPGrad

__all__ = [
    "AGGREGATORS", "IMTLG", "MGDA", "Aggregation", "Aggregator", "AlignedMTL", "CAGrad", "ConicGrad", "DualProj",
    "FairGrad", "Given", "IMGrad", "IMGradNash", "Mean", "NashMTL", "PCGrad", "Sum", "UPGrad", "resolve",
]  # fmt: skip

AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "sum": Sum,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "imtlg": IMTLG,
    "nashmtl": NashMTL,
    "fairgrad": FairGrad,
    "alignedmtl": AlignedMTL,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "imgrad": IMGrad,
    "imgrad_nash": IMGradNash,
    "conicgrad": ConicGrad,
}


def resolve(name: str) -> type[Aggregator]:
    """The rule called `name`: a key of AGGREGATORS, or `module:Class` (the current directory is searched first).

    Raises:
        ValueError: in one line, what was given and what is allowed.
    """
    if ":" not in name:
        if name in AGGREGATORS:
            return AGGREGATORS[name]
        near = difflib.get_close_matches(name.lower(), AGGREGATORS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"aggregator: got {name!r}; {hint}allowed: {', '.join(AGGREGATORS)}, or module:Class")

    module_name, _, class_name = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way; its reason is the message
        reason = " ".join(str(error).split())
        raise ValueError(
            f"aggregator: cannot import {module_name!r} of {name!r}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        sys.path.remove(here)

    rule = getattr(module, class_name, None)
    if rule is None:
        near = difflib.get_close_matches(class_name, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"aggregator: module {module_name!r} has no class {class_name!r}{hint}")
    if not (isinstance(rule, type) and issubclass(rule, Aggregator) and is_dataclass(rule)):
        raise ValueError(f"aggregator: {name!r} is not a dataclass derived from mtrl_imgrad.aggregators.Aggregator")
    return rule
