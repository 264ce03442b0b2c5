from __future__ import annotations

import re
import subprocess
import sys

import pytest

from mtrl_imgrad.envs import MT10, MT25, MT50, expand_tasks


def test_mt10_is_the_published_set_in_metaworlds_order():
    assert MT10 == (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    )


def test_larger_sets_contain_the_smaller():
    assert (len(set(MT25)), len(set(MT50))) == (25, 50)
    assert MT25[:10] == MT10
    assert set(MT25) < set(MT50)


@pytest.mark.parametrize("name", ["mt10", "MT10", "Mt10"])
def test_sets_expand_in_any_case(name):
    assert expand_tasks([name]) == MT10


def test_names_keep_the_order_given_and_mix_with_sets():
    assert expand_tasks(["window-open-v3", "reach-v3"]) == ("window-open-v3", "reach-v3")
    assert expand_tasks(["sweep-v3", "mt10"]) == ("sweep-v3", *MT10)
    assert expand_tasks("reach-v3") == ("reach-v3",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["reach"], "unknown name 'reach'; did you mean 'reach-v3'", id="version left out"),
        pytest.param(["Reach-v3"], "did you mean 'reach-v3'", id="capital letter"),
        pytest.param(["reach-v3", "windwo-open-v3"], "'windwo-open-v3'; did you mean 'window-open-v3'", id="typo"),
        pytest.param(["mt11"], "'mt11'; did you mean 'MT1", id="unknown set"),
        pytest.param(["qqqqq"], "unknown name 'qqqqq'; a task is for example 'reach-v3'", id="nothing near"),
        pytest.param(["reach-v3", "reach-v3"], "'reach-v3' is given twice", id="task twice"),
        pytest.param(["push-v3", "mt10"], "'push-v3' is given twice", id="task and its set"),
        pytest.param([], "none given", id="empty"),
    ],
)
def test_wrong_names_raise_one_line_that_says_what_is_wrong(names, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        expand_tasks(names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("mtrl_imgrad.envs", ("metaworld", "torch")),
        ("mtrl_imgrad.envs.worker", ("torch",)),
        ("mtrl_imgrad.cli", ("metaworld", "scipy.stats", "stable_baselines3", "matplotlib", "tensorboard")),
        ("mtrl_imgrad.trainer", ("metaworld", "scipy.stats", "matplotlib")),
    ],
)
def test_importing_a_module_does_not_import_what_takes_seconds_and_is_not_needed_there(module, slow):
    code = f"import sys, {module}; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
