"""The chunked loss against torch's own on whole logits."""

import pytest
import torch
from torch.nn import functional as F

from train import loss as losses
from train.loss import next_token_loss, token_losses


def inputs(num_rows, vocab_size, width=12, dtype=torch.float64):
    torch.manual_seed(num_rows * vocab_size)
    hidden = torch.randn(num_rows, width, dtype=dtype, requires_grad=True)
    output = torch.randn(vocab_size, width, dtype=dtype, requires_grad=True)
    return hidden, output, torch.randint(vocab_size, (num_rows,))


def plain(hidden, output, targets, z_weight):
    logits = hidden @ output.t()
    nats = F.cross_entropy(logits, targets)
    return nats + z_weight * logits.logsumexp(1).square().mean(), nats


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 100])
@pytest.mark.parametrize("num_rows", [1, 7, 20])
@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_the_plain_loss(monkeypatch, rows_at_once, num_rows, z_weight, dtype, tolerance):
    vocab_size = 31
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * vocab_size * rows_at_once)
    hidden, output, targets = inputs(num_rows, vocab_size, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, output)]
    expected, expected_nats = plain(*exact, targets, z_weight)
    (2.5 * expected).backward()
    loss, nats = next_token_loss(hidden, output, targets, z_weight)
    (2.5 * loss).backward()
    for actual, wanted in (
        (loss, expected),
        (nats, expected_nats),
        (hidden.grad, exact[0].grad),
        (output.grad, exact[1].grad),
    ):
        error = (actual.double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance
    assert not nats.requires_grad


def test_a_frozen_output_matrix_has_no_gradient():
    hidden, output, targets = inputs(20, 31)
    next_token_loss(hidden, output, targets)[0].backward()
    expected, hidden.grad = hidden.grad, None
    next_token_loss(hidden, output.detach(), targets)[0].backward()
    assert torch.equal(hidden.grad, expected)


@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_targets_that_do_not_count(monkeypatch, z_weight):
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 31 * 3)
    hidden, output, targets = inputs(20, 31)
    counted = torch.arange(20) % 3 > 0
    expected, expected_nats = plain(hidden[counted], output, targets[counted], z_weight)
    share = counted.double().mean()
    (expected * share).backward()
    grads = hidden.grad.clone(), output.grad.clone()
    hidden.grad = output.grad = None
    loss, nats = next_token_loss(hidden, output, targets, z_weight, counted)
    loss.backward()
    torch.testing.assert_close(loss, expected * share)
    torch.testing.assert_close(nats, expected_nats * share)
    for actual, wanted in zip((hidden.grad, output.grad), grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)
    every = next_token_loss(hidden, output, targets, z_weight, torch.ones(20, dtype=torch.bool))
    assert torch.equal(every[0], next_token_loss(hidden, output, targets, z_weight)[0])
    loss, nats = next_token_loss(hidden, output, targets, z_weight, torch.zeros_like(counted))
    assert loss == nats == 0


def test_losses_and_hits_of_each_token(monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 31 * 3)
    hidden, output, targets = inputs(20, 31)
    targets[:5] = (hidden @ output.t())[:5].argmax(1)
    nats, hits = token_losses(hidden, output, targets)
    logits = hidden @ output.t()
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(hits, logits.argmax(1) == targets)
    assert hits[:5].all()


def test_large_logits_stay_finite():
    hidden, output, targets = inputs(6, 9, dtype=torch.float32)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    loss, _ = next_token_loss(hidden, output, targets)
    loss.backward()
    expected, _ = plain(hidden.double(), output.double(), targets, 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert hidden.grad.isfinite().all()


def test_autocast_affects_only_the_products():
    hidden, output, targets = inputs(40, 31, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nats = next_token_loss(hidden, output, targets)
        logits = (hidden @ output.t()).float()
    assert loss.dtype == nats.dtype == torch.float32
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets), rtol=1e-6, atol=0)
    loss.backward()
    assert output.grad.dtype == hidden.grad.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, output)]
    plain(*exact, targets, 0.0)[0].backward()
    for actual, wanted in zip((hidden.grad, output.grad), exact, strict=True):
        assert (actual - wanted.grad).abs().max() < 0.02 * wanted.grad.abs().max()
