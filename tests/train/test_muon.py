"""Muon in one process: against the formula, and which weights are matrices."""

import pytest
import torch
from torch import nn

from stu.config import ModelConfig
from stu.model import FlashSTU
from tests.reference import muon as reference
from tests.train.conftest import MODEL
from train.flops import matrix_share
from train.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer, matrices
from train.optimizer.muon import Muon, orthogonalized

SHAPES = [(1, 1, 1), (1, 1, 7), (1, 7, 1), (2, 16, 16), (3, 5, 33), (2, 33, 5), (1, 64, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalized_equals_the_polynomial_of_singular_values(shape):
    source = torch.Generator().manual_seed(0)
    batch = torch.randn(shape, generator=source) * 1e3 ** torch.rand(
        shape[0], 1, 1, generator=source
    )
    before = batch.clone()
    expected = torch.stack([reference.orthogonalized(matrix) for matrix in batch])
    found = orthogonalized(batch)
    assert torch.equal(batch, before)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_a_matrix_without_a_gradient_stays():
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch older than 2.9")
def test_orthogonalized_in_bfloat16_is_as_torch_has_it():
    """torch's own computes in bfloat16 alone."""
    source = torch.Generator().manual_seed(0)
    for shape in ((8, 8), (6, 20), (20, 6)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=source)
        torch.optim.Muon([weight], lr=1.0, adjust_lr_fn="match_rms_adamw").step()
        ours = orthogonalized(weight.grad.bfloat16()[None])[0].float()
        update = -0.2 * max(shape) ** 0.5 * ours
        torch.testing.assert_close(update, weight.detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("bucket", [1, 300, matrices.BUCKET_ELEMENTS])
def test_steps_equal_the_formula_for_each_matrix_of_a_stack(bucket, monkeypatch):
    monkeypatch.setattr(matrices, "BUCKET_ELEMENTS", bucket)
    source = torch.Generator().manual_seed(0)
    counts = {(6, 10): 1, (24, 8): 3, (4, 8, 8): 4, (10, 6): 1}
    weights = [nn.Parameter(torch.randn(shape, generator=source)) for shape in counts]
    vector = nn.Parameter(torch.randn(9, generator=source))
    alone = nn.Parameter(vector.detach().clone())
    groups = [
        {"params": weights, "weight_decay": 0.3, "matrices": list(counts.values())},
        {"params": [vector], "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, lr=0.02, momentum=0.9, betas=(0.8, 0.95), eps=1e-8)
    adamw = torch.optim.AdamW([alone], lr=0.02, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.0)
    expected = [
        [reference.Reference(matrix, 0.02, 0.9, 0.3) for matrix in split(weight, count)]
        for weight, count in zip(weights, counts.values(), strict=True)
    ]
    for _ in range(5):
        for parameter in (*weights, vector):
            parameter.grad = torch.randn(parameter.shape, generator=source)
        alone.grad = vector.grad.clone()
        for weight, alike in zip(weights, expected, strict=True):
            for gradient, matrix in zip(split(weight.grad, len(alike)), alike, strict=True):
                matrix.step(gradient)
        optimizer.step()
        adamw.step()
    for weight, alike in zip(weights, expected, strict=True):
        found = split(weight.detach(), len(alike))
        wanted = torch.stack([matrix.matrix for matrix in alike])
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
        assert optimizer.state[weight].keys() == {"step", "exp_avg"}
    assert torch.equal(vector, alone)
    assert optimizer.state[vector].keys() == {"step", "exp_avg", "exp_avg_sq"}


def split(tensor, count):
    return tensor.detach().view(count, -1, tensor.shape[-1])


def test_closure_sees_all_groups():
    """Lightning clips the gradients of all groups in it."""
    weight, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "matrices": [1]}, {"params": [vector]}]
    optimizer = Muon(groups, lr=0.1, momentum=0.9)

    def closure():
        assert len(optimizer.param_groups) == 2
        loss = (weight @ vector).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert (weight < 1).all()
    assert (vector < 1).all()


@pytest.mark.parametrize(
    ("layout", "form", "counts"),
    [
        ("hybrid", "tensordot", {"0.mixer.input_matrix": 1, "1.mixer.qkv.weight": 3}),
        ("hybrid", "full", {"0.mixer.plus_matrices": 4, "0.mixer.minus_matrices": 4}),
        ("hyena", "tensordot", {"1.mixer.input.weight": 3, "1.mixer.output.weight": 1}),
        ("attention", "full", {"0.mixer.qkv.weight": 3, "0.mixer.output.weight": 1}),
    ],
)
def test_matrices_are_those_of_mixers_and_mlps(layout, form, counts):
    config = ModelConfig(**MODEL, layout=layout, stu_form=form)
    model = FlashSTU(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(name="muon"))
    found = {names[id(p)]: count for group in optimizer.counts for p, count in group.items()}
    assert found == model.linear_maps
    assert {f"blocks.{name}": count for name, count in counts.items()}.items() <= found.items()
    assert {"blocks.0.mlp.gate.weight", "blocks.1.mlp.down.weight"} <= found.keys()
    others = names.values() - found.keys()
    assert all("norm" in name or "filter" in name or "taps" in name for name in others - EMBEDDING)
    share = sum(model.get_parameter(name).numel() for name in found) / model.num_parameters()
    assert matrix_share(config) == share
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for n, t in state.items() if n != "step"]
    stored = sum(tensor.nbytes for tensor in tensors)
    assert OPTIMIZERS["muon"].state_bytes(share) * model.num_parameters() == pytest.approx(stored)


EMBEDDING = {"embedding.weight"}
