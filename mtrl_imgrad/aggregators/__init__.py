"""Aggregation rules: from the Gramian of the per-task gradients to the row weights of one direction."""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import is_dataclass
from pathlib import Path

from mtrl_imgrad.aggregators.adatask import AdaTask
from mtrl_imgrad.aggregators.alignedmtl import AlignedMTL
from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given
from mtrl_imgrad.aggregators.cagrad import CAGrad
from mtrl_imgrad.aggregators.cagrad_fast import CAGradFast
from mtrl_imgrad.aggregators.config_gradient import ConFIG
from mtrl_imgrad.aggregators.conicgrad import ConicGrad
from mtrl_imgrad.aggregators.dbmtl import DBMTL
from mtrl_imgrad.aggregators.dualproj import DualProj
from mtrl_imgrad.aggregators.dwa import DWA
from mtrl_imgrad.aggregators.fairgrad import FairGrad
from mtrl_imgrad.aggregators.famo import FAMO
from mtrl_imgrad.aggregators.graddrop import GradDrop
from mtrl_imgrad.aggregators.gradnorm import GradNorm
from mtrl_imgrad.aggregators.gradvac import GradVac
from mtrl_imgrad.aggregators.imgrad import IMGrad
from mtrl_imgrad.aggregators.imgrad_nash import IMGradNash
from mtrl_imgrad.aggregators.imtlg import IMTLG
from mtrl_imgrad.aggregators.mean import Mean
from mtrl_imgrad.aggregators.mgda import MGDA
from mtrl_imgrad.aggregators.moco import MoCo
from mtrl_imgrad.aggregators.nashmtl import NashMTL
from mtrl_imgrad.aggregators.pcgrad import PCGrad
from mtrl_imgrad.aggregators.rlw import RLW
from mtrl_imgrad.aggregators.sdmgrad import SDMGrad, SDMGradOS
from mtrl_imgrad.aggregators.sum import Sum
from mtrl_imgrad.aggregators.uncertainty_weighting import UncertaintyWeighting
from mtrl_imgrad.aggregators.upgrad import UPGrad

__all__ = [
    "AGGREGATORS", "DBMTL", "DWA", "FAMO", "IMTLG", "MGDA", "RLW", "AdaTask", "Aggregation", "Aggregator",
    "AlignedMTL", "CAGrad", "CAGradFast", "ConFIG", "ConicGrad", "DualProj", "FairGrad", "Given", "GradDrop",
    "GradNorm", "GradVac", "IMGrad", "IMGradNash", "Mean", "MoCo", "NashMTL", "PCGrad", "SDMGrad", "SDMGradOS", "Sum",
    "UPGrad", "UncertaintyWeighting", "resolve",
]  # fmt: skip

AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "sum": Sum,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "cagrad": CAGrad,
    "cagrad_fast": CAGradFast,
    "imtlg": IMTLG,
    "nashmtl": NashMTL,
    "fairgrad": FairGrad,
    "sdmgrad": SDMGrad,
    "sdmgrad_os": SDMGradOS,
    "alignedmtl": AlignedMTL,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "imgrad": IMGrad,
    "imgrad_nash": IMGradNash,
    "conicgrad": ConicGrad,
    "graddrop": GradDrop,
    "moco": MoCo,
    "dbmtl": DBMTL,
    "config": ConFIG,
    "uw": UncertaintyWeighting,
    "rlw": RLW,
    "dwa": DWA,
    "gradnorm": GradNorm,
    "famo": FAMO,
    "adatask": AdaTask,
}


def resolve(name: str) -> type[Aggregator]:
    """The rule called `name`: a key of AGGREGATORS, `torchjd:Name` for one of TorchJD's, or `module:Class` (the current
    directory is searched first).

    Raises:
        ValueError: in one line, what was given and what is allowed.
    """
    if ":" not in name:
        if name in AGGREGATORS:
            return AGGREGATORS[name]
        near = difflib.get_close_matches(name.lower(), AGGREGATORS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"aggregator: got {name!r}; {hint}allowed: {', '.join(AGGREGATORS)}, torchjd:Name, or module:Class"
        )

    module_name, _, class_name = name.partition(":")
    if module_name == "torchjd":
        return _of_torchjd(class_name)
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
        raise ValueError(
            f"aggregator: {name!r} is not a dataclass derived from mtrl_imgrad.aggregators.Aggregator, as it must be"
        )
    return rule


def _of_torchjd(name: str) -> type[Aggregator]:
    try:
        from mtrl_imgrad.aggregators.torchjd import named
    except ImportError as error:
        raise ValueError(
            f"aggregator: 'torchjd:{name}' needs TorchJD: pip install 'mtrl_imgrad[torchjd]' ({error})"
        ) from error
    return named(name)
