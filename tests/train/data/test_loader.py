"""Each rank gets its samples in one order that does not depend on the number of ranks."""

import math
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stu.common.errors import UserError
from tests.train.token_shards import write_token_shards
from train.data.batches import (
    Boundaries,
    PackedDocuments,
    SampleStream,
    ValidationSet,
    Windows,
)
from train.data.loader import TokenData
from train.data.order import SampleOrder
from train.data.shards import TokenShards
from train.data.weights import Phase

SEQ_LEN = 8
NUM_SAMPLES = 124  # (1000 - 1) // SEQ_LEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_token_shards(folder, num_train=1000, num_validation=100)
    return folder


def _stream(folder, m=1, seq_len=SEQ_LEN, seed=0, **settings):
    samples = Windows(TokenShards(folder, "train"), seq_len)
    order = SampleOrder({"": len(samples)}, seed, [Phase(0, {"": 1.0})])
    return SampleStream([samples], order, m, **settings)


def _ids(stream, num_batches):
    return [batch["sample_ids"].tolist() for batch in islice(stream, num_batches)]


def _over_all_ranks(folder, num_steps, m, world_size, position):
    """Sample ids that `num_steps` steps of all ranks consume, in order of position."""
    ranks = [
        _ids(_stream(folder, m, rank=r, world_size=world_size, position=position), num_steps)
        for r in range(world_size)
    ]
    return [i for step in range(num_steps) for rank in ranks for i in rank[step]]


def test_a_sample_is_its_window_of_tokens(folder):
    for batch in islice(_stream(folder, m=3), 50):
        assert batch["tokens"].dtype == batch["sample_ids"].dtype == torch.int64
        assert batch["tokens"].shape == (3, SEQ_LEN + 1)
        # The value of a token in these shards is its position.
        expected = batch["sample_ids"][:, None] * SEQ_LEN + torch.arange(SEQ_LEN + 1)
        assert torch.equal(batch["tokens"], expected)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(folder):
    ids = [i for (i,) in _ids(_stream(folder), 3 * NUM_SAMPLES)]
    epochs = [ids[k * NUM_SAMPLES : (k + 1) * NUM_SAMPLES] for k in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_SAMPLES))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(NUM_SAMPLES))
    assert _ids(_stream(folder, seed=5), 20) != _ids(_stream(folder), 20)


sizes = st.integers(1, 5)


@settings(deadline=None, max_examples=40)
@given(
    start=st.integers(0, 3 * NUM_SAMPLES),
    legs=st.lists(st.tuples(st.integers(1, 5), sizes, sizes), min_size=1, max_size=3),
)
def test_changing_the_number_of_ranks_neither_repeats_nor_skips_samples(folder, start, legs):
    consumed = []
    for num_steps, m, world_size in legs:
        position = start + len(consumed)
        consumed += _over_all_ranks(folder, num_steps, m, world_size, position)
    assert consumed == _over_all_ranks(folder, 1, len(consumed), 1, start)


@pytest.mark.parametrize("seq_len", [1, 998, 999])
def test_shortest_and_longest_samples(folder, seq_len):
    data = TokenData(str(folder), seq_len, 1)
    assert data.samples_per_epoch == 999 // seq_len
    batches = islice(data.train_dataloader(), data.samples_per_epoch)
    last = max(batches, key=lambda b: int(b["sample_ids"]))
    assert last["tokens"][0, -1] == data.samples_per_epoch * seq_len


def test_a_sample_longer_than_the_data_is_refused(folder):
    with pytest.raises(
        UserError, match=r"data.seq_len=1000 .* less than 1000, .*; lower it or prepare more text"
    ):
        TokenData(str(folder), seq_len=1000, micro_batch_size=1)


@settings(deadline=None, max_examples=100)
@given(seq_len=st.integers(1, 120), m=sizes, world_size=sizes, max_tokens=st.integers(1, 120))
def test_validation_predicts_every_target_once(folder, seq_len, m, world_size, max_tokens):
    shards = TokenShards(folder, "validation")
    num_batches = math.ceil(min(99, max_tokens) / (seq_len * m * world_size))
    targets = []
    for rank in range(world_size):
        part = ValidationSet(shards, seq_len, m, max_tokens, rank, world_size)
        batches = list(part)
        assert len(batches) == len(part) == num_batches
        for batch in batches:
            assert batch["tokens"].shape == (m, seq_len + 1)
            for row, count in zip(batch["tokens"], batch["num_targets"].tolist(), strict=True):
                targets += row[1 : count + 1].tolist()
                if count:
                    assert torch.equal(row[: count + 1], row[0] + torch.arange(count + 1))
    assert sorted(targets) == list(range(1, min(99, max_tokens) + 1))


def _data(folder, rank=0, world_size=1, **changes):
    data = TokenData(str(folder), **{"seq_len": SEQ_LEN, "micro_batch_size": 2} | changes)
    if world_size > 1:
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=world_size, accumulate_grad_batches=1
        )
    return data


def test_a_resumed_run_continues_with_the_next_sample_on_other_ranks(folder):
    reference = _over_all_ranks(folder, 40, 1, 1, 0)
    data = _data(folder)
    seen = []
    for batch in islice(data.train_dataloader(), 5):
        seen += batch["sample_ids"].tolist()
        data.advance(2)
    state = data.state_dict()
    ranks = [_data(folder, rank=r, world_size=3, micro_batch_size=1) for r in range(3)]
    for rank in ranks:
        rank.load_state_dict(state)
        assert rank.position == 10
    for step in zip(*(islice(rank.train_dataloader(), 10) for rank in ranks), strict=True):
        seen += [int(batch["sample_ids"]) for batch in step]
    assert seen == reference


def test_state_is_the_position_and_the_values_it_depends_on(folder):
    data = _data(folder, seed=3)
    list(islice(data.train_dataloader(), 10))
    assert data.position == 0  # batches that were fetched ahead do not count
    data.advance(6)
    assert data.state_dict() == {
        "position": 6,
        "seed": 3,
        "seq_len": SEQ_LEN,
        "tokenizer_sha256": data.tokenizer_sha256,
        "num_tokens": 1000,
        "contents": TokenShards(folder, "train").fingerprint(),
        "documents": "together",
        "packing": "cut",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", 4), ("seq_len", 16), ("num_tokens", 7), ("contents", "0")),
        *(("tokenizer_sha256", "0"), ("documents", "apart"), ("packing", "best_fit")),
    ],
)
def test_a_position_of_another_order_is_refused(folder, name, value):
    data = _data(folder)
    mine = data.state_dict()[name]
    with pytest.raises(UserError, match=f"data.{name} is {mine!r}, .* made with {value!r}"):
        data.load_state_dict(data.state_dict() | {name: value, "position": 50})
    assert data.position == 0


@pytest.mark.parametrize("name", ["seq_len", "micro_batch_size", "max_validation_tokens"])
def test_settings_are_checked(folder, name):
    with pytest.raises(UserError, match=f"^data.{name}=0 .* must be at least 1"):
        _data(folder, **{name: 0})


MARK = 2000
APART = Boundaries(are_kept=True)
MARKED = Boundaries(are_kept=True, mark=MARK)


def lengths_of(bounds, start, stop):
    """Tokens of each document between two places."""
    inner = [bound for bound in bounds if start < bound < stop]
    return [b - a for a, b in pairwise([start, *inner, stop])]


@pytest.mark.parametrize("boundaries", [Boundaries(), MARKED, APART])
def test_windows_say_which_documents_they_hold(folder, boundaries):
    samples, bounds = Windows(TokenShards(folder, "train"), 8, boundaries), range(0, 1001, 7)
    for number in range(len(samples)):
        sample, start = samples[number], 8 * number
        assert sample["tokens"].tolist() == list(range(start, start + 9))
        if boundaries.are_kept:
            assert sample["document_lengths"] == lengths_of(bounds, start, start + 8)
        if boundaries is APART:  # the token after a document is the next one's text
            expected = [place not in bounds for place in range(start + 1, start + 9)]
            assert sample["counted"].tolist() == expected
        assert len(sample) == 1 + boundaries.are_kept + (boundaries is APART)


@pytest.mark.parametrize("seq_len", [5, 7, 8, 20, 2000])
@pytest.mark.parametrize("boundaries", [Boundaries(mark=MARK), MARKED, APART])
def test_packed_documents_are_whole_and_every_target_counts_once(folder, boundaries, seq_len):
    samples = PackedDocuments(TokenShards(folder, "train"), seq_len, boundaries)
    bounds, inputs, targets, ends = [*range(0, 1000, 7), 1000], [], [], 0
    for number in range(len(samples)):
        sample = samples[number]
        tokens, counted = sample["tokens"].tolist(), sample["counted"].tolist()
        assert (len(tokens), len(counted)) == (seq_len + 1, seq_len)
        lengths = sample.get("document_lengths", [])
        assert sum(lengths) == (seq_len if boundaries.are_kept else 0)
        stops = [sum(lengths[:n]) for n in range(1, len(lengths) + 1)]
        for place, counts in enumerate(counted):
            before, after = tokens[place : place + 2]
            if before == (boundaries.mark or 0) and not counts:
                continue  # padding
            inputs.append(before)
            is_end = before + 1 in bounds
            if is_end:  # a target unless the rest of a cut document follows, which has no mark
                assert counts == (boundaries.mark is not None and after in (*bounds, MARK))
            else:
                assert counts
            assert not is_end or not lengths or place + 1 in stops
            ends += is_end and counts
            if counts and not is_end:
                assert after == before + 1
                assert place + 1 not in stops or place + 1 == seq_len  # where a cut is
                targets.append(after)
    assert sorted(targets) == [place for place in range(1000) if place not in bounds]
    assert sorted(inputs) == list(range(1000))
    # In rows of 5, the rests of two documents, of 2 tokens each, share a row.
    assert ends == (0 if not boundaries.mark else 71 if seq_len == 5 else 143)


@settings(deadline=None, max_examples=40)
@given(seq_len=st.integers(1, 60), m=sizes, world_size=sizes, max_tokens=st.integers(1, 120))
def test_validation_says_which_documents_it_holds(folder, seq_len, m, world_size, max_tokens):
    shards, bounds = TokenShards(folder, "validation"), range(0, 100, 7)
    for rank in range(world_size):
        for batch in ValidationSet(shards, seq_len, m, max_tokens, rank, world_size, APART):
            counts = batch["num_targets"].tolist()
            for i, count in enumerate(counts):
                lengths, counted = batch["document_lengths"][i], batch["counted"][i]
                start = int(batch["tokens"][i, 0])
                padding = [seq_len - count] if count < seq_len else []
                expected = lengths_of(bounds, start, start + count) if count else []
                assert lengths == expected + padding
                targets = range(start + 1, start + count + 1)
                assert counted[:count].tolist() == [place not in bounds for place in targets]


def test_checkpoints_of_before_kept_documents_together(folder):
    data = _data(folder)
    state = data.state_dict()
    del state["documents"], state["packing"]
    data.load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.documents"):
        _data(folder).load_state_dict(state | {"documents": "apart", "packing": "cut"})
