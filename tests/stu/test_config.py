"""Model configurations: what is refused, and how it is said."""

import json

import pytest

from stu.common.errors import UserError
from stu.config import ModelConfig


def test_json_round_trip():
    config = ModelConfig(vocab_size=100, layout="stu", width=64, num_heads=4)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("layout", "mixers"),
    [
        ("hybrid", ("stu", "attention", "stu")),
        *((name, (name,) * 3) for name in ("stu", "hyena", "attention")),
    ],
)
def test_blocks_take_the_mixers_of_a_layout_in_turn(layout, mixers):
    assert ModelConfig(vocab_size=9, num_layers=3, layout=layout).mixers == mixers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("vocab_size", 0), ("width", -1), ("num_layers", 2.0), ("num_filters", True)),
        *(("max_seq_len", "many"), ("mlp_ratio", 0), ("num_heads", 0), ("window_tokens", 0)),
        *(("layout", "conv"), ("stu_form", "dense"), ("norm_eps", 0.0)),
        *(("softcap", value) for value in (float("nan"), float("inf"), "5")),
    ],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(UserError, match="is not allowed: it must be") as refused:
        ModelConfig(**{"vocab_size": 10, name: value})
    assert refused.value.field == name


def test_inconsistent_values_are_refused():
    with pytest.raises(
        UserError, match="num_heads=8 is not allowed: it must be a number that divides"
    ):
        ModelConfig(vocab_size=10, width=100)
    with pytest.raises(
        UserError, match="num_filters=24 is not allowed: it must be at most max_seq_len"
    ):
        ModelConfig(vocab_size=10, max_seq_len=16)
    ModelConfig(vocab_size=10, max_seq_len=16, layout="hyena")  # without spectral filters


def test_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="'num_layer': did you mean 'num_layers'"):
        ModelConfig.from_dict({"vocab_size": 10, "num_layer": 2})
    with pytest.raises(UserError, match="'zzz': choose from vocab_size, width"):
        ModelConfig.from_dict({"vocab_size": 10, "zzz": 2})
    with pytest.raises(UserError, match="'vocab_size' is missing"):
        ModelConfig.from_dict({"width": 64})


def test_files_of_older_models_stay_as_they_are():
    """Fields that older versions do not read are written where they are needed alone."""
    plain = ModelConfig(vocab_size=5, layout="hyena", blocks="plain", filter_bands=2)
    added = {"blocks", "filter_bands", "filter_floor"}
    assert not added & ModelConfig(vocab_size=5).stored().keys()
    assert added & plain.stored().keys() == {"blocks", "filter_bands"}
    assert ModelConfig.from_dict(plain.stored()) == plain


@pytest.mark.parametrize("layout", ["hybrid", "stu", "attention"])
def test_plain_blocks_are_those_of_hyena(layout):
    with pytest.raises(UserError, match="is not allowed: it must be gated"):
        ModelConfig(vocab_size=5, layout=layout, blocks="plain")
