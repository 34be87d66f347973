"""Which weights decay, and the learning rate at every step."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from tests.train.conftest import MODEL, slow
from train.checkpoint.folder import CHECKPOINTS, LAST, WEIGHT, CheckpointFolder
from train.optimizer import (
    OptimizerConfig,
    adamw,
    check_schedule,
    learning_rate_factor,
    make_optimizer,
    optimizer_kind,
)


@pytest.mark.parametrize(
    ("layout", "form"),
    [("hybrid", "tensordot"), ("hybrid", "full"), ("hyena", "tensordot"), ("attention", "full")],
)
def test_only_matrices_decay(layout, form):
    """The matrices of the network that makes Hyena's filters do not decay either."""
    model = FlashSTU(ModelConfig(**MODEL, layout=layout, stu_form=form))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
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
    defaults = make_optimizer(model, config).defaults
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
        *(("learning_rate", 0.0), ("learning_rate", math.nan), ("beta1", 1.0), ("beta2", -0.1)),
        *(("eps", 0.0), ("weight_decay", -1.0), ("warmup_steps", -1), ("decay_fraction", 1.5)),
        ("final_lr_fraction", 2.0),
    ],
)
def test_wrong_value_is_named(name, value):
    with pytest.raises(UserError, match="is not allowed: it must be") as caught:
        OptimizerConfig(**{name: value})
    assert (caught.value.field, caught.value.value) == (f"model.optimizer.{name}", value)


def test_unknown_optimizer_is_refused_with_all_names():
    with pytest.raises(UserError, match="must be adamw or lion"):
        make_optimizer(nn.Linear(2, 2), OptimizerConfig(name="sgd"))


def test_lion_steps_by_the_sign_of_a_mixed_gradient():
    """As in algorithm 2 of the paper, on numbers whose signs are clear."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 3, generator=generator))
    config = OptimizerConfig(name="lion", learning_rate=0.1, beta1=0.7, beta2=0.9, weight_decay=0.2)
    kind = optimizer_kind(config)
    optimizer = kind.make(
        [{"params": [weight], "weight_decay": 0.2}], **kind.hyperparameters(config)
    )
    expected, average = weight.detach().clone(), torch.zeros(5, 3)
    for _ in range(4):
        gradient = torch.randn(5, 3, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        mixed = 0.7 * average + 0.3 * gradient
        expected = expected - 0.1 * (mixed.sign() + 0.2 * expected)
        average = 0.9 * average + 0.1 * gradient
    torch.testing.assert_close(weight.detach(), expected)
    state = optimizer.state[weight]
    assert state.keys() == {"step", *kind.state_tensors}
    torch.testing.assert_close(state["exp_avg"], average)
    assert state["step"] == 4


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_follows_steps_or_time_whichever_is_further(schedule):
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
def test_warmup_that_does_not_fit_is_refused(settings, steps, message):
    with pytest.raises(UserError, match=message):
        check_schedule(OptimizerConfig(**settings), steps)
    check_schedule(OptimizerConfig(**settings), steps + 1)


def test_adamw_is_fused_where_all_parameters_are_on_gpus():
    on_gpu, on_cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    assert adamw.is_fused([on_gpu, on_gpu])
    assert not adamw.is_fused([on_gpu, on_cpu])
    optimizer = make_optimizer(FlashSTU(ModelConfig(**MODEL)), OptimizerConfig())
    assert {group["fused"] for group in optimizer.param_groups} == {None}


@pytest.mark.parametrize("saved_fused", [True, False])
def test_fused_adamw_continues_what_another_implementation_began(saved_fused, monkeypatch):
    """A CPU has a fused implementation too, which GPUs' stands for here."""

    def begin(fused):
        monkeypatch.setattr(adamw, "is_fused", lambda _: fused)
        torch.manual_seed(0)
        model = FlashSTU(ModelConfig(**MODEL))
        return model, make_optimizer(model, OptimizerConfig(weight_decay=0.3))

    def step(model, optimizer, seed):
        source = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source)
        optimizer.step()

    expected, reference = begin(fused=False)
    saved, saver = begin(saved_fused)
    for seed in range(3):
        step(expected, reference, seed)
        step(saved, saver, seed)
    model, optimizer = begin(not saved_fused)
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(saver.state_dict())
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {not saved_fused}
    for seed in range(3, 6):
        step(expected, reference, seed)
        step(model, optimizer, seed)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [slow("ddp"), slow("fsdp")])
def test_a_run_with_fused_adamw_clips_and_resumes(kind, train, tmp_path, monkeypatch):
    """Lightning refuses to clip gradients for optimizers that it takes for fused."""
    common = ["--trainer.precision=bf16-mixed", f"--parallel.kind={kind}"]
    common += ["--trainer.gradient_clip_val=0.1"]
    checkpoints = []
    for fused in (False, True):
        monkeypatch.setattr(adamw, "is_fused", lambda _, fused=fused: fused)
        run = tmp_path / f"fused-{fused}"
        train(run, *common, "--trainer.max_steps=3")
        train(run, *common, "--trainer.max_steps=6", "--resume=last")
        checkpoints.append(CheckpointFolder(run / CHECKPOINTS / LAST))
    expected, found = checkpoints
    assert found.training["optimizer_step"] == expected.training["optimizer_step"] == 6
    assert found.training["optimizer_groups"][0]["fused"]
    for name in expected.names:
        ours, theirs = found.tensor(WEIGHT, name), expected.tensor(WEIGHT, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_checkpoints_whose_groups_do_not_name_state_tensors_are_read(trained):
    folder = CheckpointFolder(trained / CHECKPOINTS / LAST)
    expected = [dict(group) for group in folder.optimizer_groups]
    assert expected[0]["state_tensors"] == ["exp_avg", "exp_avg_sq"]
    for group in folder.training["optimizer_groups"]:
        del group["state_tensors"]
    assert folder.optimizer_groups == expected
    folder.training["stu"]["state_tensors"] = ["exp_avg"]
    assert all(group["state_tensors"] == ["exp_avg"] for group in folder.optimizer_groups)
    folder.check()
