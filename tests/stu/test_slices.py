"""Slices of sequences on several ranks give what whole sequences give on one."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from stu import layouts
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.filters import spectral_filters
from stu.model import FlashSTU
from stu.sequences.base import WHOLE
from stu.sequences.slices import SequenceSlices, all_channels, all_positions
from stu.slices import states
from stu.slices.ranks import with_earlier
from tests.stu.own_mixers import FadingSTU, TwoStreams
from tests.stu.slice_threads import in_threads
from train.parallel.config import ParallelConfig, prepare_blocks
from train.plan.activations import PlannedRanks

CONFIG = ModelConfig(
    vocab_size=50,
    width=20,
    num_layers=2,
    num_heads=4,
    mlp_ratio=2,
    max_seq_len=96,
    num_filters=6,
    window_tokens=7,
)
LAYOUTS = [("stu", "tensordot"), ("stu", "full"), ("hyena", ""), ("attention", ""), ("hybrid", "")]


def make_model(layout, form, **changes):
    torch.manual_seed(0)
    changes |= {"stu_form": form} if form else {}
    return FlashSTU(replace(CONFIG, layout=layout, **changes))


def loss_of(model, tokens, own, sequences=WHOLE):
    hidden = model.hidden(tokens[:, own], sequences)
    targets = tokens[:, own.start + 1 : own.stop + 1]
    return cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())


def whole_step(model, tokens):
    """Return the loss of whole sequences and the gradients."""
    model = copy.deepcopy(model)
    loss = loss_of(model, tokens, slice(0, tokens.shape[1] - 1))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def step_in_slices(model, tokens, size, prepare=lambda model: None):
    """Return the means over ranks of losses and gradients, and each rank's exchanges in bytes."""

    def step(ranks):
        own = copy.deepcopy(model)
        prepare(own)
        loss = loss_of(own, tokens, ranks.own(tokens.shape[1] - 1), SequenceSlices(ranks))
        loss.backward()
        return loss.item(), {name: p.grad for name, p in own.named_parameters()}, ranks.sent

    losses, gradients, sent = zip(*in_threads(size, step), strict=True)
    means = {name: sum(own[name] for own in gradients) / size for name in gradients[0]}
    return sum(losses) / size, means, sent


def assert_equal_steps(actual, expected, tolerance):
    assert actual[0] == pytest.approx(expected[0], rel=tolerance / 10)
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).norm() / gradient.norm()
        assert error < tolerance, name


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
@pytest.mark.parametrize(
    ("size", "length", "window"),
    [(2, 96, 7), (4, 64, 7), (4, 20, 13), (3, 33, 95), (5, 35, 7), (4, 4, 2), (2, 6, 3)],
)
def test_slices_equal_whole_sequences(layout, form, size, length, window):
    model = make_model(layout, form, window_tokens=window)
    tokens = torch.randint(50, (2, length + 1))
    expected = whole_step(model, tokens)
    assert_equal_steps(step_in_slices(model, tokens, size), expected, 1e-4)


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_slices_are_exact_in_float64(layout, form):
    """Filters in float64 have states in float64."""
    model = make_model(layout, form).double()
    if model.filters.numel():
        model.filters.copy_(torch.from_numpy(spectral_filters(*model.filters.shape)))
    tokens = torch.randint(50, (2, 61))
    expected = whole_step(model, tokens)
    tolerance = 1e-8 if model.filters.numel() else 1e-12
    assert_equal_steps(step_in_slices(model, tokens, 4), expected, tolerance)


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_recomputed_blocks_exchange_again(layout, form):
    model = make_model(layout, form)
    tokens = torch.randint(50, (2, 49))
    config = ParallelConfig(checkpoint_activations=True)
    actual = step_in_slices(model, tokens, 4, lambda own: prepare_blocks(own, config))
    assert_equal_steps(actual, whole_step(model, tokens), 1e-4)


@pytest.mark.parametrize(
    ("layout", "form", "of_a_layer"),
    [
        # Own states in two phases, for at most three later ranks.
        ("stu", "tensordot", 3 * 2 * 2 * 20),
        ("stu", "full", 3 * 2 * 2 * 20),
        ("attention", "", 2 * 2 * 7 * 20),
    ],
)
def test_bytes_are_counted_and_do_not_grow_with_the_length(layout, form, of_a_layer):
    model = make_model(layout, form, max_seq_len=1024, num_layers=1)
    sent = {}
    for length in (256, 512, 1024):
        tokens = torch.randint(50, (2, length + 1))
        exchanges = step_in_slices(model, tokens, 4)[2]
        passes = [own[-2:] for own in exchanges]  # one forward, one backward
        assert all(len(own) == 2 + (layout == "stu") for own in exchanges)  # rates come first
        sent[length] = [sum(own) for own in passes]
    assert sent[256] == sent[512] == sent[1024]
    both = sent[256]
    if layout == "stu":
        rank = both[0] // (4 * of_a_layer)
        assert both == [4 * rank * of_a_layer] * 4
        assert 8 <= rank <= 40
    else:  # the ends have one neighbour, the others two
        assert both == [4 * of_a_layer, 8 * of_a_layer, 8 * of_a_layer, 4 * of_a_layer]


def test_hyena_exchanges_its_short_taps_and_divides_channels():
    model = make_model("hyena", "", max_seq_len=512, num_layers=1)
    for length in (256, 512):
        tokens = torch.randint(50, (2, length + 1))
        forward = [own[:3] for own in step_in_slices(model, tokens, 4)[2]]
        halo = 4 * 2 * 2 * 3 * 20
        whole = 4 * 2 * length // 4 * 15  # what of all channels belongs to others
        assert forward == [[halo, whole, whole]] * 3 + [[0, whole, whole]]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9, 11, 12, 50])
def test_earlier_positions_come_from_as_many_ranks_as_they_reach(count):
    x = torch.arange(2 * 12 * 3.0).view(2, 12, 3)
    weights = torch.randn(4, 2, 12, 3)

    def run(ranks):
        own = ranks.own(12)
        part = x[:, own].clone().requires_grad_()
        found = with_earlier(ranks, part, count)
        (found * weights[ranks.rank][:, own.stop - found.shape[1] : own.stop]).sum().backward()
        return found, part.grad

    results = in_threads(4, run)
    for rank, (found, _) in enumerate(results):
        assert torch.equal(found, x[:, max(0, 3 * rank - count) : 3 * rank + 3])
    wanted = torch.zeros_like(x)
    for rank in range(4):
        reached = slice(max(0, 3 * rank - count), 3 * rank + 3)
        wanted[:, reached] += weights[rank][:, reached]
    torch.testing.assert_close(torch.cat([grad for _, grad in results], dim=1), wanted)


@pytest.mark.parametrize("channels", [4, 7])
def test_positions_are_exchanged_for_channels_and_back(channels):
    x = torch.randn(2, 12, channels)

    def run(ranks):
        part = x[:, ranks.own(12)].clone().requires_grad_()
        divided = all_positions(ranks, part)
        back = all_channels(ranks, divided, channels)
        (back * part.detach()).sum().backward()
        return divided, back, part.grad

    results = in_threads(4, run)
    assert torch.equal(torch.cat([divided for divided, _, _ in results], dim=2), x)
    for place in (1, 2):
        assert torch.equal(torch.cat([result[place] for result in results], dim=1), x)


def test_states_are_computed_once_for_equal_filters(monkeypatch):
    model = make_model("stu", "tensordot")
    counts = []
    fitting = states.fitting_realisation
    monkeypatch.setattr(
        states, "fitting_realisation", lambda *args: counts.append(1) or fitting(*args)
    )
    tokens = torch.randint(50, (1, 49))

    def run(ranks):
        own, slices = copy.deepcopy(model), SequenceSlices(ranks)
        place, found = ranks.own(48), []
        with torch.inference_mode():  # a validation comes first
            found.append(own.hidden(tokens[:, place], slices))
        for change in (1.0, 1.0, 2.0, 1.0):
            own.filters.mul_(change)
            loss_of(own, tokens, place, slices).backward()
            found.append(own.hidden(tokens[:, place], slices).detach())
        return found

    first, *others = in_threads(2, run)[1]
    assert len(counts) == 2  # by the first rank
    assert torch.equal(others[0], first)
    assert torch.equal(others[1], first)
    assert not torch.allclose(others[2], first)
    assert torch.equal(others[3], others[2])


@pytest.mark.parametrize("name", ["fading", "streams"])
def test_layers_have_the_states_of_their_own_filters(monkeypatch, name):
    made = {"fading": FadingSTU, "streams": TwoStreams}[name]
    monkeypatch.setitem(layouts.MIXERS, name, made)
    monkeypatch.setitem(layouts.LAYOUTS, "own", ("stu", name))
    model = make_model("own", "", num_layers=4)
    tokens = torch.randint(50, (2, 97))
    assert_equal_steps(step_in_slices(model, tokens, 2), whole_step(model, tokens), 1e-4)


def test_nothing_of_later_slices_is_read():
    """A token changes nothing before it, and NaN stays where it is read."""
    model = make_model("hybrid", "tensordot")
    tokens = torch.randint(50, (1, 48))

    def run(ranks):
        own = copy.deepcopy(model)
        with torch.no_grad():
            own.embedding.weight[49] = torch.nan
        changed = tokens.clamp(max=48)
        changed[:, 30] = 49
        with torch.no_grad():
            return own.hidden(changed[:, ranks.own(48)], SequenceSlices(ranks))

    hidden = torch.cat(in_threads(4, run), dim=1)[0]
    assert hidden[:24].isfinite().all()
    assert hidden[30].isnan().all()


def test_sequences_may_not_be_longer_than_the_context():
    slices = SequenceSlices(PlannedRanks(0, 2))
    with pytest.raises(UserError, match="98 tokens exceeds max_seq_len=96"):
        make_model("attention", "").hidden(torch.zeros(1, 49, dtype=torch.int64), slices)


def test_filters_without_a_state_are_refused_on_all_ranks():
    model = make_model("stu", "tensordot")
    model.filters.normal_()

    def run(ranks):
        with pytest.raises(UserError, match="filters have no state") as refused:
            model.hidden(torch.zeros(1, 8, dtype=torch.int64), SequenceSlices(ranks))
        return str(refused.value)

    first, second = in_threads(2, run)
    assert "float32 accepts" in first
    assert "accepts" not in second
