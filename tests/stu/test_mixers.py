"""Every registered mixer fulfils the contract of `stu.mixers.Mixer`; no other file names one."""

import ast
import copy
import pkgutil
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stu import layouts, stu_mixer
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.futurefill import Continuous
from stu.layouts import LAYOUTS, MIXERS, layout_names, register_mixer
from stu.mixers import Kind, LongConvolution, make_mixer, planned_mixers
from stu.model import FlashSTU
from stu.sequences.base import WHOLE
from stu.sequences.documents import Documents
from stu.sequences.slices import SequenceSlices
from tests.reference.decoding import Runner
from tests.reference.documents import alone
from tests.stu.slice_threads import in_threads

ROOT = Path(__file__).parents[2]
SMALL = {"vocab_size": 50, "width": 16, "num_layers": 4, "num_heads": 4, "mlp_ratio": 2}
SMALL |= {"max_seq_len": 64, "num_filters": 5, "window_tokens": 7}
VARIANTS = (
    ROOT / "benchmarks/training/variants.py",
    ROOT / "benchmarks/peers/rope_attention.py",
)
"""Change what a mixer computes."""


@pytest.mark.parametrize("form", ["tensordot", "full"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixer_fulfils_its_contract(name, form):
    torch.manual_seed(0)
    config = ModelConfig(**SMALL, layout=name, stu_form=form)
    mixer = make_mixer(name, config)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(torch.nan)
        mixer.initialize(depth_scale=0.5)
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())
    kinds = [type(memory) for memory in mixer.remembers]
    assert len(set(kinds)) == len(kinds) > 0
    assert set(kinds) <= set(Kind.__constraints__)
    assert mixer.undecayed_names <= {name for name, _ in mixer.named_parameters()}
    planned = planned_mixers(config)[0]
    forward, backward = planned.training_costs(64, 2)
    assert 0 < forward.dense < backward.dense
    assert 0 < planned.decoding_weights <= sum(p.numel() for p in mixer.parameters())
    x, filters = torch.randn(2, 9, 16), torch.randn(64, 5 if mixer.needs_filters else 0)
    assert mixer(x, filters, WHOLE).shape == x.shape


@pytest.mark.parametrize("adds_groups", [True, False], ids=["cpu", "cuda"])
def test_full_form_is_arranged_beside_its_parameters(monkeypatch, tmp_path, adds_groups):
    """They can be trained and saved as before, and are in memory once where they can be."""
    monkeypatch.setattr(stu_mixer, "_adds_groups", lambda _: adds_groups)
    torch.manual_seed(0)
    mixer = make_mixer("stu", ModelConfig(**SMALL, stu_form="full"))
    mixer.initialize(depth_scale=0.5)
    x, filters = torch.randn(2, 9, 16), torch.randn(64, mixer.plus_matrices.shape[0])
    before = {name: weight.clone() for name, weight in mixer.state_dict().items()}
    expected, arranged = mixer(x, filters, WHOLE), []
    for _ in range(2):
        copied = copy.deepcopy(mixer, {id(weight): weight for weight in mixer.parameters()})
        for _ in range(2):
            copied.pack(None)
        torch.testing.assert_close(copied(x, filters, WHOLE), expected)
        assert copied.decoding_weights == mixer.decoding_weights
        assert not copied.state_dict()
        arranged.append(copied.arranged)
    if not adds_groups:
        assert arranged[0].data_ptr() == arranged[1].data_ptr() == mixer.plus_matrices.data_ptr()
    wide = copied.double()(x.double(), filters.double(), WHOLE)
    torch.testing.assert_close(wide, expected.double(), rtol=1e-4, atol=1e-5)
    assert wide.dtype == copied.arranged.dtype == torch.float64
    assert all(weight.is_contiguous() for weight in mixer.parameters())
    save_file(mixer.state_dict(), tmp_path / "mixer.safetensors")
    saved = load_file(tmp_path / "mixer.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in before.items())
    torch.testing.assert_close(mixer(x, filters, WHOLE), expected)


@pytest.mark.parametrize("packs_for_cpu", [True, False])
def test_full_form_moves_to_a_device_with_another_arrangement(monkeypatch, packs_for_cpu):
    torch.manual_seed(0)
    mixer = make_mixer("stu", ModelConfig(**SMALL, stu_form="full"))
    mixer.initialize(depth_scale=0.5)
    x, filters = torch.randn(2, 9, 16), torch.randn(64, mixer.plus_matrices.shape[0])
    expected = mixer(x, filters, WHOLE)
    monkeypatch.setattr(stu_mixer, "_adds_groups", lambda _: packs_for_cpu)
    mixer.pack(None)
    monkeypatch.setattr(stu_mixer, "_adds_groups", lambda _: not packs_for_cpu)
    torch.testing.assert_close(copy.deepcopy(mixer)(x, filters, WHOLE), expected)


def test_layouts_are_of_registered_mixers():
    assert {name for names in LAYOUTS.values() for name in names} <= set(MIXERS)
    assert layout_names() == ["hybrid", "stu", "hyena", "attention"]
    with pytest.raises(ValueError, match="stu is the name of another"):
        register_mixer("stu", "stu.stu_mixer:make_stu")


@pytest.mark.parametrize("mixers", [("hyena", "attention"), ("attention", "hyena", "attention")])
def test_mixers_of_several_kinds_decode_as_the_forward_pass(monkeypatch, mixers):
    """Layers are numbered by what they remember, not by their place in the model."""
    monkeypatch.setitem(layouts.LAYOUTS, "mixed", mixers)
    torch.manual_seed(0)
    model = FlashSTU(ModelConfig(**SMALL, layout="mixed")).double().eval()
    tokens = torch.randint(50, (1, 30))
    runner = Runner(model, [tokens[0, :10].tolist()], 20, Continuous)
    decoded = [runner.prefill(), *(runner.step(tokens[:, t]) for t in range(10, 30))]
    with torch.inference_mode():
        expected = model(tokens)[:, 9:]
    torch.testing.assert_close(torch.stack(decoded, dim=1), expected, rtol=0, atol=1e-12)


def test_a_mixer_from_outside_mixes_every_kind_of_sequences(monkeypatch):
    """It asks the sequences, and knows nothing of their kinds."""
    example = runpy.run_path(str(ROOT / "examples/add_a_mixer.py"))
    monkeypatch.setitem(layouts.MIXERS, "own", example["GatedShortConvolution"])
    torch.manual_seed(0)
    model = FlashSTU(ModelConfig(**SMALL, layout="own")).double().eval()
    tokens, lengths = torch.randint(50, (1, 30)), [[1, 17, 2, 10]]
    whole = model(tokens)
    found = model(tokens, Documents(lengths))
    torch.testing.assert_close(found, alone(model, tokens, lengths), rtol=0, atol=1e-12)
    assert not torch.allclose(found, whole)
    parts = in_threads(3, lambda ranks: model(tokens[:, ranks.own(30)], SequenceSlices(ranks)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    runner = Runner(model, [tokens[0, :10].tolist()], 20, Continuous)
    decoded = [runner.prefill(), *(runner.step(tokens[:, t]) for t in range(10, 30))]
    torch.testing.assert_close(torch.stack(decoded, dim=1), whole[:, 9:], rtol=0, atol=1e-12)


def test_decoding_convolutions_with_different_lag_steps_is_refused(monkeypatch):
    monkeypatch.setitem(layouts.LAYOUTS, "mixed", ("hyena", "stu"))
    model = FlashSTU(ModelConfig(**SMALL, layout="mixed"))
    assert [mixer.past.lag_step for mixer in model.mixers] == [1, 2, 1, 2]
    with pytest.raises(UserError, match="layout=mixed cannot be decoded"):
        model.convolution_taps()


def test_no_other_file_names_a_mixer():
    makers = [pkgutil.resolve_name(path) for path in MIXERS.values()]
    modules = [sys.modules[maker.__module__] for maker in makers]
    own_files = {Path(module.__file__) for module in modules}
    names = {
        name
        for module in modules
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, nn.Module)
        if found.__module__ == module.__name__
    }
    assert {"TensordotSTU", "FullSTU", "Hyena", "ImplicitFilter"} < names
    assert LongConvolution.__name__ not in names
    wrong = []
    for package in ("stu", "train", "serve", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            if file in own_files or file in VARIANTS:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                found = {
                    ast.Name: lambda node: node.id,
                    ast.Attribute: lambda node: node.attr,
                    ast.alias: lambda node: node.name,
                }.get(type(node), lambda node: None)(node)
                if found in names:
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {found}")
    assert wrong == []
