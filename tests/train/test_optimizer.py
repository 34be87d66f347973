"""Which weights decay, and the learning rate at every step."""

import math

import pytest

from stu.config import ModelConfig
from stu.model import FlashSTU
from tests.train.conftest import MODEL
from train.optimizer import OptimizerConfig, adamw, check_schedule, learning_rate_factor


@pytest.mark.parametrize(
    ("layout", "form"),
    [("hybrid", "tensordot"), ("hybrid", "full"), ("hyena", "tensordot"), ("attention", "full")],
)
def test_only_matrices_decay(layout, form):
    """And not those that make Hyena's filters."""
    model = FlashSTU(ModelConfig(**MODEL, layout=layout, stu_form=form))
    optimizer = adamw(model, OptimizerConfig(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    named = dict(model.named_parameters())
    assert len(decay) == len(named)
    kept = {name for name, p in named.items() if decay[id(p)] == 0}
    norms = {name for name in named if name.endswith("norm.weight")}
    filters = {name for name in named if ".mixer.filter." in name}
    assert len(filters) == (2 * 6 if layout == "hyena" else 0)
    assert kept == norms | filters
    assert ("blocks.0.mixer.short_taps" in named) == (layout == "hyena")
    assert {decay[id(p)] for name, p in named.items() if name not in kept} == {0.3}


def test_settings_reach_the_optimizer():
    model = FlashSTU(ModelConfig(**MODEL))
    config = OptimizerConfig(learning_rate=0.5, beta1=0.1, beta2=0.2, eps=0.3)
    defaults = adamw(model, config).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (0.5, (0.1, 0.2), 0.3)


def test_cosine():
    config = OptimizerConfig(warmup_steps=10, final_lr_fraction=0.1)
    rates = [learning_rate_factor(step, 111, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way from step 10 to step 110
    assert rates[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[110] == pytest.approx(0.1)


def test_wsd_is_flat_and_then_falls_linearly():
    config = OptimizerConfig(
        schedule="wsd", warmup_steps=4, decay_fraction=0.2, final_lr_fraction=0.0
    )
    rates = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert set(rates[4:80]) == {1.0}
    assert rates[80:] == pytest.approx([n / 20 for n in range(19, -1, -1)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_degenerate_lengths(schedule):
    for total, warmup in ((1, 0), (1, 1), (5, 5), (5, 100), (2, 1)):
        config = OptimizerConfig(schedule=schedule, warmup_steps=warmup)
        rates = [learning_rate_factor(step, total, config) for step in range(total + 3)]
        assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("warmup_steps", -1),
        ("decay_fraction", 1.5),
        ("final_lr_fraction", 2.0),
    ],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{name}={value!r} is not allowed: it must"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_decays_by_its_steps_or_its_time_whichever_is_further_along(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_steps=10, final_lr_fraction=0.1)
    assert learning_rate_factor(5, 1001, config, 0.01) == 0.6  # the warm-up counts steps
    assert learning_rate_factor(100, 1001, config, 0.9) == learning_rate_factor(900, 1001, config)
    assert learning_rate_factor(900, 1001, config, 0.1) == learning_rate_factor(900, 1001, config)
    assert learning_rate_factor(100, 1001, config, 1.0) == pytest.approx(0.1)
    assert learning_rate_factor(3, 1001, config, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({}, 99, r"warmup_steps=100 is longer than the run \(trainer.max_steps=99\)"),
        ({"schedule": "wsd"}, 124, r"warmup_steps=100 overlaps .* begins at step 99"),
    ],
)
def test_a_warmup_that_does_not_fit_is_refused(settings, steps, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(OptimizerConfig(**settings), steps)
    check_schedule(OptimizerConfig(**settings), steps + 1)
