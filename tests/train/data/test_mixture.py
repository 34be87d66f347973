"""A mixture: weights hold at every position, and the sample there depends on nothing else."""

import json
import math
import re
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stu.common.errors import UserError
from tests.train.token_shards import write_token_shards
from train.data.loader import TokenData
from train.data.mixture import open_sources, read_weights, save_mixture
from train.data.order import SampleOrder
from train.data.weights import Phase, Turns, plan_phases

SEQ_LEN = 8
SIZES = {"books": 124, "code": 62, "web": 12}  # samples
STORED = {"books": 5.0, "code": 3.0, "web": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, size in SIZES.items():
        write_token_shards(folder / name, num_train=size * SEQ_LEN + 1, num_validation=50)
    save_mixture(folder, STORED)
    return folder


weights = st.lists(
    st.just(0.0) | st.floats(1e-3, 1) | st.sampled_from([0.5, 1.0]), min_size=1, max_size=9
).filter(any)


@settings(deadline=None, max_examples=30)
@given(weights)
def test_weights_hold_at_every_position(values):
    """Counts of turns one by one, against those that are found without the turns before."""
    turns = Turns({f"s{i}": value for i, value in enumerate(values)})
    shares = {f"s{i}": value / math.fsum(values) for i, value in enumerate(values)}
    sources, counts = turns(np.arange(1500))
    seen = dict.fromkeys(turns.names, 0)
    for position, (source, count) in enumerate(zip(sources.tolist(), counts.tolist(), strict=True)):
        assert turns.counts(position) == seen
        assert all(abs(seen[name] - position * share) <= 2 for name, share in shares.items())
        name = turns.names[source]
        assert count == seen[name]
        seen[name] += 1


@pytest.mark.parametrize("start", [2**30 - 3, 2**33 + 5, 2**50])
def test_turns_at_positions_that_do_not_fit_into_32_bits(start):
    turns = Turns({"a": 0.7, "b": 0.2, "c": 0.1})
    positions = np.arange(start, start + 200)
    sources, counts = turns(positions)
    for position, source, count in zip(
        positions.tolist(), sources.tolist(), counts.tolist(), strict=True
    ):
        before, after = turns.counts(position), turns.counts(position + 1)
        assert sum(before.values()) == position
        name = turns.names[source]
        assert (count, after) == (before[name], {**before, name: before[name] + 1})
    assert turns.counts(start)["c"] == pytest.approx(start * 0.1, rel=1e-8)


def test_realised_weights_after_a_million_tokens():
    """To 0.1% of all tokens, with samples of 1,024 tokens or fewer."""
    shares = {"a": 0.55, "b": 0.25, "c": 0.1337, "d": 0.05, "e": 0.0163}
    order = SampleOrder(dict.fromkeys(shares, 50), 0, [Phase(0, shares)])
    for seq_len in (128, 1024):
        read = order.num_read(10**6 // seq_len)
        for name, share in shares.items():
            assert abs(read[name] * seq_len / 10**6 - share) < 1e-3


def test_sources_of_one_size_have_orders_of_their_own():
    order = SampleOrder({"a": 50, "b": 50}, 0, [Phase(0, {"a": 0.5, "b": 0.5})])
    sources, samples = order(np.arange(100))
    first, second = (samples[sources == source].tolist() for source in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def ids(data, num_batches):
    return [batch["sample_ids"].tolist() for batch in islice(data.train_dataloader(), num_batches)]


def make(folder, m=2, rank=0, ranks=1, accumulate=1, step=0, **changes):
    data = TokenData(str(folder), SEQ_LEN, m, **changes)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=ranks, accumulate_grad_batches=accumulate, global_step=step
    )
    return data


def consume(folder, state, num_steps, m, ranks, accumulate, **changes):
    """Return the samples of `num_steps` steps in order, and the state after them."""
    all_ranks = [make(folder, m, rank, ranks, accumulate, **changes) for rank in range(ranks)]
    for data in all_ranks:
        if state:
            data.load_state_dict(json.loads(json.dumps(state)))
    batches = [ids(data, num_steps * accumulate) for data in all_ranks]
    seen = [i for number in range(num_steps * accumulate) for rank in batches for i in rank[number]]
    data = all_ranks[0]
    data.trainer.global_step = (state or {"step": 0})["step"] + num_steps
    data.advance(len(seen))
    return seen, data.state_dict()


CURRICULUM = [
    {"until_step": 3, "weights": {"web": 1}},
    {"until_step": 7, "weights": {"web": 1, "code": 3}},
]


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), st.data())
def test_samples_do_not_depend_on_ranks_micro_batches_and_resumes(
    folder, legs, is_curriculum, draw
):
    changes = {"curriculum": CURRICULUM if is_curriculum else None}
    expected, last = consume(folder, None, sum(legs), 12, 1, 1, **changes)
    state, seen = None, []
    for num_steps in legs:  # each in the middle of an epoch of the smallest source, 12 samples
        m, ranks, accumulate = draw.draw(st.sampled_from([(12, 1, 1), (3, 2, 2), (1, 4, 3)]))
        part, state = consume(folder, state, num_steps, m, ranks, accumulate, **changes)
        seen += part
    assert seen == expected
    assert state == last


def test_a_sample_is_its_window_of_tokens(folder):
    starts = np.cumsum([0, *SIZES.values()])
    sources = set()
    for batch in islice(make(folder, m=3).train_dataloader(), 60):
        for tokens, number in zip(batch["tokens"], batch["sample_ids"].tolist(), strict=True):
            source = int(np.searchsorted(starts, number, side="right")) - 1
            sources.add(source)
            first = (number - starts[source]) * SEQ_LEN
            assert tokens.tolist() == list(range(first, first + SEQ_LEN + 1))
    assert sources == {0, 1, 2}


def by_source(samples):
    starts = np.cumsum([0, *SIZES.values()])
    return {
        name: [i - start for i in samples if start <= i < stop]
        for name, (start, stop) in zip(SIZES, pairwise(starts), strict=True)
    }


@pytest.mark.parametrize("curriculum", [None, CURRICULUM])
def test_each_source_has_epochs_of_its_own(folder, curriculum):
    data = make(folder, m=10, curriculum=curriculum)
    samples = [i for batch in ids(data, 40) for i in batch]
    orders = set()
    for name, own in by_source(samples).items():
        size = SIZES[name]
        assert data.epochs(400, 10)[name] == len(own) / size
        for start in range(0, len(own) - size + 1, size):
            epoch = own[start : start + size]
            assert sorted(epoch) == list(range(size))
            orders.add((name, *epoch))
    assert len(orders) >= 7  # one or more of each source, all different
    if curriculum is None:
        shares = {name: len(own) / 400 for name, own in by_source(samples).items()}
        assert shares == pytest.approx({"books": 0.5, "code": 0.3, "web": 0.2}, abs=2 / 400)


def test_a_curriculum_changes_weights_at_its_steps(folder):
    data = make(folder, m=5, accumulate=2, curriculum=CURRICULUM)
    samples = [i for batch in ids(data, 40) for i in batch]
    counts = [
        {name: len(own) for name, own in by_source(samples[start:stop]).items()}
        for start, stop in [(0, 30), (30, 70), (70, 200)]
    ]
    assert counts[0] == {"books": 0, "code": 0, "web": 30}
    assert counts[1] == {"books": 0, "code": 30, "web": 10}
    assert counts[2] == pytest.approx({"books": 65, "code": 39, "web": 26}, abs=2)


@pytest.mark.parametrize("step", [2, 3, 5, 7, 12])
def test_weights_may_change_at_a_resume(folder, step):
    """Each source goes on with its own order; the phases until then are those of the checkpoint."""
    before, state = consume(folder, None, step, 2, 1, 2, curriculum=CURRICULUM)
    changed = {"weights": {"code": 1.0, "web": 1.0}, "curriculum": CURRICULUM[:1]}
    with pytest.raises(UserError, match=r"^data\.weights is .*made with .*books"):
        consume(folder, state, 1, 4, 1, 1, **changed)
    data = make(folder, m=4, **changed)
    data.accepted_changes = {"weights", "curriculum"}
    data.load_state_dict(state)
    after = [i for batch in ids(data, 50) for i in batch]
    assert data.order(4).num_read(step * 4) == {
        name: len(own) for name, own in by_source(before).items()
    }
    only_web = max(0, 3 - step) * 4
    assert by_source(after[:only_web])["web"] == [i - 186 for i in after[:only_web]]
    rest = by_source(after[only_web:])
    assert rest["books"] == []
    assert len(rest["web"]) == pytest.approx(len(rest["code"]), abs=2)
    for name, own in by_source([*before, *after]).items():
        for start in range(0, len(own) - SIZES[name] + 1, SIZES[name]):
            assert sorted(own[start : start + SIZES[name]]) == list(range(SIZES[name]))
    # A second resume continues that.
    data.advance(20)
    data.trainer.global_step = step + 5
    again = make(folder, m=4, **changed)
    again.load_state_dict(data.state_dict())
    assert [i for batch in ids(again, 45) for i in batch] == after[20:]


def test_a_lone_source_keeps_its_name_at_a_resume(folder, tmp_path):
    """Its text alone does not tell, and its samples would be counted from the first one again."""
    for name in ("code", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).symlink_to(folder / "code")
        save_mixture(tmp_path / name, {name: 1})
    state = make(tmp_path / "code").state_dict()
    make(tmp_path / "code").load_state_dict(state)
    data = make(tmp_path / "other")
    data.accepted_changes = {"weights"}
    with pytest.raises(UserError, match=r"^data\.contents: .* run are code, .* are other; use the"):
        data.load_state_dict(state)


def test_phases_follow_the_number_of_samples_in_a_step():
    a, b, last = {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}
    parts = [{"until_step": 4, "weights": a}, {"until_step": 9, "weights": b}]
    first = plan_phases([], 0, 0, 10, parts, last)
    assert first == [(0, a), (40, b), (90, last)]
    # From step 6, at position 60, steps of 100 samples.
    assert plan_phases(first, 60, 6, 100, parts, last) == [(0, a), (40, b), (360, last)]
    assert plan_phases(first, 40, 4, 10, parts, last) == first
    assert plan_phases(first, 200, 20, 10, parts, last) == first
    assert plan_phases(first, 200, 20, 10, [], a) == [*first, (200, a)]


def test_the_order_of_sources_in_the_mixture_does_not_matter(folder, tmp_path):
    for name in SIZES:
        (tmp_path / name).symlink_to(folder / name)
    save_mixture(tmp_path, dict(reversed(STORED.items())))
    equal = dict.fromkeys(SIZES, 1.0)  # then their names decide which is first
    tokens = [
        [batch["tokens"].tolist() for batch in islice(data.train_dataloader(), 50)]
        for data in (
            make(folder, weights=equal),
            make(tmp_path, weights=dict(reversed(equal.items()))),
        )
    ]
    assert tokens[0] == tokens[1]
    assert make(folder).identity() == make(tmp_path).identity()


def test_validation_is_divided_evenly(folder):
    data = make(folder, m=1, max_validation_tokens=60)
    assert data.validated == {"books": 0.5, "code": 0.3, "web": 0.2}
    assert [part.num_targets for part in data.val_dataloader()] == [20, 20, 20]
    only = make(folder, weights={"web": 7})
    assert only.weights == {"web": 1.0}
    assert only.validated == {"books": 0, "code": 0, "web": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"book": 1}}, "^data.weights: no source 'book': did you mean 'books'"),
        ({"weights": {"web": -1}}, r"^data\.weights\.web=-1 .* a number >= 0"),
        ({"weights": {"web": math.nan}}, r"^data\.weights\.web=NaN .* a number >= 0"),
        ({"weights": {"web": "1"}}, r"^data\.weights\.web=\"1\" .* a number >= 0"),
        ({"weights": {"web": 0}}, "^data.weights=.* at least one weight above 0"),
        ({"weights": {}}, "^data.weights=.* at least one weight above 0"),
        ({"curriculum": [{"until_step": 3}]}, r"^data\.curriculum\[0\]=.*until_step and weights"),
        (
            {"curriculum": [CURRICULUM[1], CURRICULUM[0]]},
            r"^data\.curriculum\[1\]\.until_step=3 .* above 7",
        ),
        (
            {"curriculum": [{"until_step": 5, "weights": {"x": 1}}]},
            r"^data\.curriculum\[0\]\.weights: no source 'x': choose from books, code, web",
        ),
        ({"seq_len": 100}, r"^data\.seq_len=100 .* less than 97, .* tokens of source web"),
    ],
)
def test_settings_are_checked(folder, changes, message):
    with pytest.raises(UserError, match=message):
        TokenData(str(folder), **{"seq_len": SEQ_LEN, "micro_batch_size": 2} | changes)


def test_a_source_without_weight_may_be_short(folder):
    data = TokenData(str(folder), 100, 2, weights={"books": 1})
    assert data.num_samples("web") == 0
    assert data.epochs(8, 2) == {"books": 8 / 9, "code": 0.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object is needed"),
        ("{}", "not a mixture: format_version=null is not allowed: it must be 1"),
        ('{"format_version": 1}', "sources=null is not allowed: it must be a list of"),
        ('{"format_version": 1, "sources": {"a": 1}}', 'sources={"a": 1} is not allowed'),
        ('{"format_version": 1, "sources": ["a"]}', r'sources\[0\]="a" .* an object such as'),
        ('{"format_version": 1, "sources": [{"weight": 1}]}', r"\[0\]\.name=null is not"),
        ('{"format_version": 1, "sources": [{"name": "a"}]}', r"\[0\]\.weight=null is not"),
    ],
)
def test_a_file_that_is_no_mixture(tmp_path, text, reason):
    (tmp_path / "mixture.json").write_text(text)
    with pytest.raises(UserError, match=rf"mixture\.json: .*{reason}"):
        open_sources(tmp_path)


def test_the_documented_mixture_is_read(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```json\n(.*format_version.*)\n```", page)
    (tmp_path / "mixture.json").write_text(shown)
    assert read_weights(tmp_path) == {"code": 3, "books": 1}


def test_a_mixture_that_cannot_be_used(tmp_path):
    write_token_shards(tmp_path / "a")
    write_token_shards(tmp_path / "b")
    with pytest.raises(UserError, match=r"^data\.weights: .*a has no named sources"):
        TokenData(str(tmp_path / "a"), 8, 2, weights={"a": 1})
    for weights in [{"a": -1.0}, {"../a": 1.0}, {"a": math.nan}]:
        save_mixture(tmp_path, weights)
        with pytest.raises(UserError, match=r"mixture\.json: not a mixture: sources\[0\]\."):
            open_sources(tmp_path)
    save_mixture(tmp_path, {"a": 1.0, "c": 1.0})
    with pytest.raises(UserError, match=r"c: no index\.json"):
        open_sources(tmp_path)
    save_mixture(tmp_path, {"a": 1.0, "b": 1.0})
    index = json.loads((tmp_path / "b" / "index.json").read_text())
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"not the tokenizer that made these shards"):
        open_sources(tmp_path)
    sha256 = "ae448ac86c4e8e4dec645729708ef41873ae79c6dff84eff73360989487f08e5"  # of "another"
    (tmp_path / "b" / "index.json").write_text(json.dumps({**index, "tokenizer_sha256": sha256}))
    with pytest.raises(UserError, match=r"b: made with another tokenizer than .*a; prepare"):
        open_sources(tmp_path)
