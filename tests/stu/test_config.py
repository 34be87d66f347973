"""Model configurations: what is refused, and how it is said."""

import json

import pytest

from stu.config import ModelConfig


def test_json_round_trip():
    config = ModelConfig(vocab_size=100, layout="stu", width=64, num_heads=4)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_layers_alternate_from_stu():
    assert ModelConfig(vocab_size=9, num_layers=5).stu_layers == (0, 2, 4)
    assert ModelConfig(vocab_size=9, num_layers=5).attention_layers == (1, 3)
    assert ModelConfig(vocab_size=9, num_layers=3, layout="stu").stu_layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("layout", "stu", "convolution", "attention"),
    [
        ("hybrid", (0, 2), (0, 2), (1,)),
        ("stu", (0, 1, 2), (0, 1, 2), ()),
        ("hyena", (), (0, 1, 2), ()),
        ("attention", (), (), (0, 1, 2)),
    ],
)
def test_what_layers_mix_with(layout, stu, convolution, attention):
    config = ModelConfig(vocab_size=9, num_layers=3, width=16, stu_form="full", layout=layout)
    assert config.stu_layers == stu
    assert config.convolution_layers == convolution
    assert config.attention_layers == attention
    assert config.streams_per_sequence == (16 if stu else 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 0),
        ("width", -1),
        ("num_layers", 2.0),
        ("num_filters", True),
        ("max_seq_len", "many"),
        ("mlp_ratio", 0),
        ("num_heads", 0),
        ("window_tokens", 0),
        ("layout", "conv"),
        ("stu_form", "dense"),
        ("softcap", float("nan")),
        ("softcap", float("inf")),
        ("softcap", "5"),
        ("norm_eps", 0.0),
    ],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r} is not allowed: it must be"):
        ModelConfig(**{"vocab_size": 10, name: value})


def test_values_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match="width=100 is not divisible by num_heads=8"):
        ModelConfig(vocab_size=10, width=100)
    with pytest.raises(ValueError, match="num_filters=24 is more than max_seq_len=16"):
        ModelConfig(vocab_size=10, max_seq_len=16)
    ModelConfig(vocab_size=10, max_seq_len=16, layout="hyena")  # without spectral filters


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="'num_layer': did you mean 'num_layers'"):
        ModelConfig.from_dict({"vocab_size": 10, "num_layer": 2})
    with pytest.raises(ValueError, match="'zzz': choose from vocab_size, width"):
        ModelConfig.from_dict({"vocab_size": 10, "zzz": 2})
    with pytest.raises(ValueError, match="'vocab_size' is missing"):
        ModelConfig.from_dict({"width": 64})
