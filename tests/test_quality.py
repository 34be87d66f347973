"""What is made of training runs; the runs themselves are those of `stu-train`."""

import pytest

from benchmarks import quality
from train.flops import num_parameters


def test_shapes_have_as_many_weights():
    for layout in ("hybrid", "stu", "hyena", "attention"):
        assert num_parameters(quality.shape(layout)) == pytest.approx(quality.WEIGHTS, rel=0.01)


class FakeRun:
    """As good as its learning rate is near the best one."""

    def __init__(self, rate, best):
        self.rate, self._best, self._trained = rate, best, False

    def train(self):
        self._trained = True

    def bits_per_byte(self):
        assert self._trained
        return abs(self.rate / self._best - 1)


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (2e-3, [2e-3, 4e-3, 1e-3]),
        (4e-3, [2e-3, 4e-3, 8e-3]),
        (16e-3, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
        (0.5e-3, [2e-3, 4e-3, 1e-3, 0.5e-3, 0.25e-3]),
    ],
)
def test_the_best_learning_rate_has_worse_ones_on_either_side(best, rates, monkeypatch):
    monkeypatch.setattr(quality.Run, "bits_per_byte", FakeRun.bits_per_byte)
    made = []

    def make(rate):
        made.append(rate)
        return FakeRun(rate, best)

    runs = quality.swept(make)
    assert made == pytest.approx(rates)
    assert runs[0].rate == pytest.approx(best)
    assert len(runs) == len(rates)


def test_every_run_comes_to_where_the_worst_ends():
    def run(bits, seconds):
        return {"bits_per_byte": bits, "seconds": seconds}

    layouts = {
        "stu": {"runs": [run([3.0, 2.0, 1.0], [10, 20, 30]), run([2.5, 2.1, 2.0], [11, 22, 33])]},
        "hyena": {"runs": [run([1.9, 1.5, 1.4], [4, 8, 12]), run([2.2, 1.8, 1.7], [5, 10, 15])]},
    }
    reached = quality.time_to_reach(layouts)
    assert reached["bits_per_byte"] == 2.0
    stu, hyena = reached["layouts"]["stu"], reached["layouts"]["hyena"]
    assert (stu["lowest_seconds"], stu["mean_seconds"], stu["highest_seconds"]) == (20, 26.5, 33)
    assert hyena["lowest_seconds"] == 4, "no later than the first evaluation"
    assert hyena["highest_seconds"] == pytest.approx(7.5), "half way from 2.2 to 1.8"
