"""Run folders as tests compare them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from checkpoints import load_checkpoint
from torch import Tensor

from mtrl_imgrad.checkpoint import read_manifest

TABLES = ("eval_training.csv", "eval.csv", "gradient_cosines.csv")


def differences(ours: Path, theirs: Path) -> set[str]:
    """What differs between two run folders whose numbers should be the same, bit for bit: tables without wall-clock
    columns; of the newest checkpoint `state.json`, and `<group>/<name>` of a tensor; other checkpoints as a whole."""
    found = {name for name in TABLES if content(ours / name) != content(theirs / name)}
    if without_times(ours / "progress.csv") != without_times(theirs / "progress.csv"):
        found.add("progress.csv")

    places = [{path.name: path for path in folder.glob("checkpoints/*")} for folder in (ours, theirs)]
    found |= {f"checkpoints/{name}" for name in places[0].keys() ^ places[1].keys()}
    for name in places[0].keys() & places[1].keys():
        if read_manifest(places[0][name]).files != read_manifest(places[1][name]).files:  # with their checksums
            found.add(f"checkpoints/{name}")

    (state, groups), (other_state, other_groups) = (load_checkpoint(run, torch.device("cpu")) for run in (ours, theirs))
    tensors, other_tensors = flat(groups), flat(other_groups)
    found |= {"state.json"} if state != other_state else set()
    found |= tensors.keys() ^ other_tensors.keys()
    both = tensors.keys() & other_tensors.keys()
    return found | {name for name in both if not same_bits(tensors[name], other_tensors[name])}


def flat(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    shown = [(tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for tensor in (one, other)]
    return shown[0] == shown[1]


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def without_times(progress: Path) -> bytes:
    """A `progress.csv` without the columns of wall-clock time, which no two runs share."""
    with progress.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = io.StringIO()
    columns = [name for name in rows[0] if not name.startswith("time/")]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
