"""An hour of training leaves memory, open files and threads as they were; what judges that sees a leak."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from soak import FLAGS, Sample, judge, train

SAMPLES = 360
"""An hour of them."""


def samples(seed: int = 1) -> list[Sample]:
    """An hour at 1,000 MB with noise of 10 MB that wanders, as an allocator's does."""
    generator = np.random.default_rng(seed)
    noise = np.zeros(SAMPLES)
    for number in range(1, SAMPLES):
        noise[number] = 0.8 * noise[number - 1] + 6 * generator.standard_normal()
    return [
        Sample(10.0 * number, 1000 + noise[number], 17, 4, 3, 0, 100 * number, 900.0, 9.0 * number)
        for number in range(SAMPLES)
    ]


class TestJudge:
    def test_noise_is_no_leak(self):
        wrong = [seed for seed in range(100) if not judge(samples(seed), 10)[1]]
        assert len(wrong) <= 5

    @pytest.mark.parametrize("name", ["memory", "files", "threads", "processes", "shared"])
    def test_a_leak_is_named(self, name):
        leaking = [
            replace(sample, **{name: getattr(sample, name) + number // 3}) for number, sample in enumerate(samples())
        ]
        text, flat = judge(leaking, 10)
        assert not flat
        assert f"Grown: {name}." in text

    def test_slower_steps_are_told(self):
        slowing = [
            replace(sample, step=int(100 * number * (1 - 0.3 * number / SAMPLES)))
            for number, sample in enumerate(samples())
        ]
        text, _ = judge(slowing, 10)
        (line,) = (line for line in text.splitlines() if line.startswith("Last window over first"))
        ratios = dict(entry.rsplit(" ", 1) for entry in line.removesuffix(".").split(": ")[1].split(", "))
        # The step at time t comes at the rate of 1 - 0.6 t / hour; windows are centred on 15 and 56 minutes.
        assert float(ratios["ms_per_step"]) == pytest.approx((1 - 0.6 * 14.2 / 60) / (1 - 0.6 * 55.8 / 60), rel=0.02)


@pytest.mark.slow
def test_two_minutes_of_training_are_sampled_stopped_and_resumed(tmp_path):
    """The hour itself is `python scripts/soak.py --out FOLDER`."""
    found = train(tmp_path / "run", FLAGS.split(), minutes=2)
    assert found[-1].step > 1000
    assert found[-1].processes == 3, "the main process and two workers"
    assert found[-1].memory > 100
