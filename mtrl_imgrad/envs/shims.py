"""Quicker stand-ins for three functions that Meta-World's reward and observation code calls, with the same bits.

`np.linalg.norm` of three numbers, `reward_utils.tolerance` of one and `Rotation.from_matrix(m).as_quat()` of one matrix
are half of the time that Meta-World's Python takes: general code that looks at its arguments for longer than it
computes. Each stand-in handles only the arguments that Meta-World passes and hands all others to the original.

Nothing is patched. `with_globals` copies a function around its own, unchanged code object, with globals in which the
names `np`, `reward_utils` and `Rotation` mean the stand-ins; numpy, scipy, metaworld and other envs keep the originals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

_ARRAY, _NUMBER, _FLOAT64, _sqrt = np.ndarray, np.float64, np.dtype(np.float64), math.sqrt
_LONG_TAIL_SCALE = float(np.sqrt(1 / 0.1 - 1))
_GAUSSIAN_SCALE = float(np.sqrt(-2 * np.log(0.1)))
"""The scales of `reward_utils._sigmoids` for the default value at the margin, by the same formulas."""


def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """`np.linalg.norm`, quick for one axis of contiguous float64 and for a number, with `ord` None or 2."""
    if axis is None and not keepdims and (ord is None or ord == 2):
        if type(x) is _ARRAY:
            if x.dtype is _FLOAT64 and x.strides == (8,):
                # The dot product stays numpy's: BLAS may round a sum of squares differently from Python.
                return _NUMBER(_sqrt(x.dot(x)))
        elif type(x) is _NUMBER and ord is None:
            return _NUMBER(_sqrt(x * x))
    return np.linalg.norm(x, ord, axis, keepdims)


def hstack(arrays: Any) -> Any:
    """`np.hstack`, quick for a tuple of numbers."""
    if type(arrays) is tuple and all(type(entry) is _NUMBER for entry in arrays):
        return np.array(arrays)
    return np.hstack(arrays)


def tolerance(
    x: Any, bounds: Any = (0.0, 0.0), margin: Any = 0.0, sigmoid: str = "gaussian", value_at_margin: float = 0.1
) -> Any:
    """`reward_utils.tolerance`, quick for one number, "long_tail" or "gaussian", and the default `value_at_margin`."""
    kind = type(x)
    if margin > 0 and value_at_margin == 0.1 and (kind is _NUMBER or kind is float):
        lower, upper = bounds
        if lower <= upper:
            if lower <= x <= upper:
                return 1.0
            distance = float((lower - x if x < lower else x - upper) / margin)
            if distance < 1e150:  # beyond, or not a number: Python would raise where numpy gives infinity
                if sigmoid == "long_tail":
                    return 1 / ((distance * _LONG_TAIL_SCALE) ** 2 + 1)
                if sigmoid == "gaussian":
                    return float(np.exp(-0.5 * (distance * _GAUSSIAN_SCALE) ** 2))
    return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)  # pyright: ignore[reportArgumentType]


class OneRotation:
    """`Rotation`, quick for `from_matrix(m).as_quat()` of one rotation matrix: scipy's algorithm for an orthogonal one
    (the largest of the diagonal and the trace chooses the entry that is computed first), number by number.
    """

    __slots__ = ("_matrix", "_quaternion")

    def __init__(self, matrix: np.ndarray, quaternion: list[float] | None) -> None:
        self._matrix, self._quaternion = matrix, quaternion

    @staticmethod
    def from_matrix(matrix: np.ndarray) -> OneRotation:
        return OneRotation(matrix, _quaternion(*matrix.ravel().tolist()) if matrix.shape == (3, 3) else None)

    def as_quat(self) -> np.ndarray:
        if self._quaternion is None:
            return Rotation.from_matrix(self._matrix).as_quat()
        return np.array(self._quaternion)


def _quaternion(
    a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float, i: float
) -> list[float] | None:
    """The quaternion (x, y, z, w) of the matrix ((a, b, c), (d, e, f), (g, h, i)); None where scipy has to decide."""
    # scipy takes a matrix for orthogonal where M M^T is the identity within 1e-12, and 1e-5 on the diagonal. Where all
    # of these are smaller it surely is; and the determinant must be +1, not -1.
    skew = abs(a * d + b * e + c * f) + abs(a * g + b * h + c * i) + abs(d * g + e * h + f * i)
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    lengths = abs(a * a + b * b + c * c - 1) + abs(d * d + e * e + f * f - 1) + abs(g * g + h * h + i * i - 1)
    if not (skew < 9e-13 and lengths < 9e-6 and determinant > 0.5):
        return None
    trace = a + e + i
    if a >= e and a >= i and a >= trace:
        x, y, z, w = 1 - trace + 2 * a, d + b, g + c, h - f
    elif e >= i and e >= trace:
        x, y, z, w = d + b, 1 - trace + 2 * e, h + f, c - g
    elif i >= trace:
        x, y, z, w = g + c, h + f, 1 - trace + 2 * i, d - b
    else:
        x, y, z, w = h - f, c - g, d - b, 1 + trace
    length = math.sqrt(x * x + y * y + z * z + w * w)
    return [x / length, y / length, z / length, w / length]


def _module(original: ModuleType, **replaced: Any) -> ModuleType:
    """A module with everything of another, except for what is replaced."""
    copy = ModuleType(original.__name__)
    vars(copy).update(vars(original) | replaced)
    return copy


@cache
def stand_ins() -> Mapping[int, Any]:
    """The stand-in of each object that stands for one, by the identity of the original. A stand-in that has not the
    original's bits on this machine (another scipy, another processor) is left out."""
    table: dict[int, Any] = {}
    if _norm_agrees():
        table[id(np)] = _module(np, linalg=_module(np.linalg, norm=norm), hstack=hstack)
    if _tolerance_agrees():
        table[id(reward_utils.tolerance)] = tolerance
        table[id(reward_utils)] = _module(reward_utils, tolerance=tolerance)
    if _rotation_agrees():
        table[id(Rotation)] = OneRotation
    return table


def shimmed_globals(function: FunctionType) -> dict[str, Any]:
    """A function's globals, with stand-ins for what has one."""
    table = stand_ins()
    return {name: table.get(id(value), value) for name, value in function.__globals__.items()}


def with_globals(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The same code, looking its global names up in `names`."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _bits_agree(ours: Callable[..., Any], theirs: Callable[..., Any], arguments: list[Any]) -> bool:
    return all(np.asarray(ours(x)).tobytes() == np.asarray(theirs(x)).tobytes() for x in arguments)


def _norm_agrees() -> bool:
    random = np.random.default_rng(0)
    vectors = [random.normal(size=size) * scale for size in (1, 2, 3, 4) for scale in (1e-3, 1.0) for _ in range(50)]
    return _bits_agree(norm, np.linalg.norm, vectors + [vector[0] for vector in vectors])


def _tolerance_agrees() -> bool:
    random = np.random.default_rng(1)
    numbers = zip(random.uniform(-1, 2, 300), random.uniform(0, 0.1, 300), random.exponential(0.3, 300), strict=True)
    arguments = [(*three, sigmoid) for three in numbers for sigmoid in ("long_tail", "gaussian")]
    return _bits_agree(
        lambda x: tolerance(x[0], (0, x[1]), x[2], x[3]),
        lambda x: reward_utils.tolerance(x[0], (0, x[1]), x[2], x[3]),
        arguments,
    )


def _rotation_agrees() -> bool:
    # General rotations, rotations near an axis, near none, and the exact ones of the cube.
    random = np.random.default_rng(2).normal(size=(200, 4))
    near_axis = 1e-3 * random + np.eye(4)[np.arange(200) % 4]
    cube = np.sign(random) * (np.abs(random) > 0.7) + np.eye(4)[3] * 2
    quaternions = np.concatenate([random, near_axis, np.eye(4), cube])
    matrices = list(Rotation.from_quat(quaternions).as_matrix())
    return _bits_agree(
        lambda m: OneRotation.from_matrix(m).as_quat(), lambda m: Rotation.from_matrix(m).as_quat(), matrices
    )
