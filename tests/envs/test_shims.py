"""The stand-ins against the originals, bit for bit."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from mtrl_imgrad.envs import shims
from mtrl_imgrad.envs.fast_env import fast_class

lengths = st.floats(-10, 10, allow_subnormal=False)
vectors = numpy_strategies.arrays(np.float64, st.integers(1, 5), elements=lengths)


def same(ours, theirs) -> bool:
    return type(ours) is type(theirs) and np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@given(vectors, st.sampled_from([{}, {"ord": None}, {"ord": 2}]))
def test_norm(vector, options):
    assert same(shims.norm(vector, **options), np.linalg.norm(vector, **options))
    assert same(shims.norm(vector[0]), np.linalg.norm(vector[0]))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        pytest.param(np.arange(6.0).reshape(2, 3), {}, id="matrix"),
        pytest.param(np.arange(6.0).reshape(2, 3), {"axis": 1}, id="axis"),
        pytest.param(np.arange(6.0)[::2], {}, id="not contiguous"),
        pytest.param(np.arange(3.0, dtype=np.float32), {}, id="float32"),
        pytest.param(np.arange(3.0), {"ord": 1}, id="another order"),
        pytest.param([3.0, 4.0], {}, id="list"),
        pytest.param(np.arange(3), {}, id="integers"),
        pytest.param(np.arange(3.0), {"keepdims": True}, id="kept axis"),
    ],
)
def test_norm_of_anything_else_is_numpys(x, options):
    assert same(shims.norm(x, **options), np.linalg.norm(x, **options))


@given(
    st.one_of(lengths, lengths.map(np.float64), st.just(float("nan")), st.just(float("inf"))),
    st.tuples(lengths, lengths).map(lambda pair: tuple(sorted(pair))),
    st.one_of(st.floats(0, 5), st.floats(0, 5).map(np.float64), st.just(5e-324)),
    st.sampled_from(["long_tail", "gaussian", "hyperbolic"]),
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_tolerance(x, bounds, margin, sigmoid):
    arguments = (x, bounds, margin, sigmoid)
    assert same(shims.tolerance(*arguments), reward_utils.tolerance(*arguments))


@pytest.mark.parametrize("arguments", [(0.5, (1, 0), 1.0, "long_tail"), (0.5, (0, 1), -1.0, "long_tail")])
def test_tolerance_refuses_what_metaworld_refuses(arguments):
    for function in (shims.tolerance, reward_utils.tolerance):
        with pytest.raises(ValueError, match=r"must be"):
            function(*arguments)


@given(st.tuples(lengths.map(np.float64), lengths.map(np.float64)))
def test_hstack_of_numbers(numbers):
    assert same(shims.hstack(numbers), np.hstack(numbers))


@given(vectors, vectors)
def test_hstack_of_arrays(left, right):
    assert same(shims.hstack((left, right)), np.hstack((left, right)))


quaternions = numpy_strategies.arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(
    lambda q: np.linalg.norm(q) > 1e-3
)


@given(quaternions)
def test_quaternion_of_a_rotation(quaternion):
    matrix = Rotation.from_quat(quaternion).as_matrix()
    assert same(shims.OneRotation.from_matrix(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat())


@given(numpy_strategies.arrays(np.float64, (3, 3), elements=st.floats(-1e-4, 1e-4)))
def test_quaternion_of_a_matrix_that_is_not_quite_a_rotation(error):
    matrix = np.eye(3) + error
    assert same(shims.OneRotation.from_matrix(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat())


def test_a_reflection_is_refused_as_scipy_refuses_it():
    with pytest.raises(ValueError, match="determinant"):
        shims.OneRotation.from_matrix(np.diag([1.0, 1.0, -1.0])).as_quat()


def test_a_stand_in_that_differs_is_left_out(monkeypatch):
    monkeypatch.setattr(shims, "norm", lambda x: np.float64(abs(x).sum()))
    stand_ins = shims.stand_ins.__wrapped__()
    assert id(np) not in stand_ins
    assert id(Rotation) in stand_ins


def test_nothing_is_patched():
    """Meta-World's functions keep the names they had; only the copies look up the stand-ins."""
    env_class = ALL_V3_ENVIRONMENTS["push-v3"]
    module = sys.modules[env_class.__module__]
    fast = fast_class(env_class)
    assert env_class.compute_reward.__globals__ is vars(module)
    assert module.np is np
    assert module.Rotation is Rotation
    assert reward_utils.tolerance is not shims.tolerance
    assert fast.compute_reward.__code__ is env_class.compute_reward.__code__
    assert fast.compute_reward.__globals__["np"].linalg.norm is shims.norm
    assert fast.compute_reward.__globals__["np"].exp is np.exp
