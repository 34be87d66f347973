"""Log probabilities and embeddings of prompts, against the model's full forward pass."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling.chooser import NOT_FINITE
from stu.model import Block, FlashSTU
from tests.models import float64_model
from tests.serve.requests import decode, make_request

LAYOUTS = ("hybrid", "hyena", "stu")
CACHES = [
    *[("hybrid", None), ("hybrid", "pages"), ("hyena", None)],
    # The layers of `hybrid` are those of `stu` and of attention, and `hyena` always has pages.
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("hyena", "pages"), ("stu", None), ("stu", "pages"))
    ),
]


@pytest.fixture(scope="module")
def make_model(code_model):
    """Return a function of a layout."""

    def make(layout):
        torch.manual_seed(0)
        return FlashSTU(replace(code_model.config, layout=layout)).eval()

    return make


def score(prompt):
    return make_request(prompt, 0, prompt_logprobs=0)


def score_end(prompt):
    """Return a request for the log probabilities of the last third of a prompt."""
    first = max(1, 2 * len(prompt) // 3)
    return make_request(prompt, 0, prompt_logprobs=0, prompt_logprobs_from=first)


def mean(prompt):
    return make_request(prompt, 0, pooling="mean")


def last(prompt):
    return make_request(prompt, 0, pooling="last")


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(280, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(("layout", "convolution_cache"), CACHES)
@pytest.mark.parametrize(
    "prompt_tokens_per_step", [1, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 200))]
)
def test_results_of_any_chunks_equal_the_full_forward_pass(
    code_model, code_tokenizer, layout, convolution_cache, prompt_tokens_per_step
):
    torch.manual_seed(0)
    model = float64_model(replace(code_model.config, layout=layout))
    prompts = random_prompts(1, 2, 13, 31, 64)
    kinds = (score, score_end, mean, last)
    asked = [make(prompt) for prompt in prompts for make in kinds]
    settings = {
        "convolution_cache": convolution_cache,
        "prompt_tokens_per_step": prompt_tokens_per_step,
    }
    answers = iter(decode(model, code_tokenizer, asked, **settings))
    for prompt in prompts:
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([prompt]))[0]
        logprobs = model.logits(hidden).log_softmax(-1)
        expected = [logprobs[at, token].item() for at, token in enumerate(prompt[1:])]
        scored, of_end, of_mean, of_last = (next(answers) for _ in kinds)
        found = [token.logprob for token in scored.prompt_logprobs]
        assert found == pytest.approx(expected, abs=1e-9)
        found = [token.logprob for token in of_end.prompt_logprobs]
        first = score_end(prompt).prompt_logprobs_from
        assert found == pytest.approx(expected[first - 1 :], abs=1e-9)
        assert of_mean.embedding == pytest.approx(hidden.mean(0).tolist(), abs=1e-9)
        assert of_last.embedding == pytest.approx(hidden[-1].tolist(), abs=1e-9)
        ended = {answer.finish_reason for answer in (scored, of_end, of_mean, of_last)}
        assert ended == {"length"}


@pytest.mark.parametrize(("layout", "convolution_cache"), CACHES)
def test_batch_invariant_results_are_equal_to_the_last_bit(
    make_model, code_tokenizer, layout, convolution_cache
):
    model = make_model(layout)
    settings = {
        "batch_invariant": True,
        "convolution_cache": convolution_cache,
        "prompt_tokens_per_step": 12,
        "max_running": 5,
    }
    kinds = (score, score_end, mean, last)
    asked = [make(prompt) for prompt in random_prompts(2, 9, 40) for make in kinds]
    others = [make_request(prompt, 15) for prompt in random_prompts(3, 30, 8, 1)]
    together = decode(model, code_tokenizer, [*others, *asked], **settings)[len(others) :]
    for request, answer in zip(asked, together, strict=True):
        (alone,) = decode(model, code_tokenizer, [request], **settings)
        assert answer == alone


@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
def test_the_last_feed_forward_part_takes_only_tokens_that_are_read(
    make_model, code_tokenizer, monkeypatch, layout
):
    taken, feed_forward = [], Block.feed_forward

    def counted(block, x):
        taken.append((block, x.shape[0] * x.shape[1]))
        return feed_forward(block, x)

    monkeypatch.setattr(Block, "feed_forward", counted)
    (prompt,) = random_prompts(40)
    of_end = 40 - score_end(prompt).prompt_logprobs_from + 1
    generated = make_request(prompt, 1)
    for request, read in [
        (generated, 1), (last(prompt), 1), (mean(prompt), 40), (score(prompt), 40),
        (score_end(prompt), of_end),
    ]:  # fmt: skip
        taken.clear()
        decode(make_model(layout), code_tokenizer, [request], prompt_tokens_per_step=7)
        counts = Counter(block for block, _ in taken)
        by_block = [sum(n for own, n in taken if own is block) for block in counts]
        assert by_block == [40] * (len(by_block) - 1) + [read]
        assert len(by_block) > 1


def test_results_that_are_not_finite_end_their_request_only(make_model, code_tokenizer):
    model = make_model("hybrid")
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan  # also the logits of this token after any other
    asked = [mean([1, 7, 3]), mean([1, 3]), last([7]), score([1, 3]), last([3])]
    answers = decode(model, code_tokenizer, asked)
    assert [answer.error for answer in answers] == [NOT_FINITE, "", NOT_FINITE, NOT_FINITE, ""]
    assert all(answer.embedding for answer in answers if not answer.error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_request_that_is_aborted_leaves_nothing(make_model, code_tokenizer, layout):
    config = EngineConfig(cache_gib=0.01, prompt_tokens_per_step=8)
    engine = Engine(make_model(layout), code_tokenizer, config)
    for _ in range(2):
        request_id = engine.add(mean([5] * 60))
        engine.step()
        engine.abort(request_id)
        (output,) = engine.step()
        assert (output.finish_reason, engine.has_work) == ("abort", False)
    assert not engine._prompt_results._hidden
    engine.check_integrity()


@pytest.mark.parametrize("layout", ["hybrid", "hyena", pytest.param("stu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_completions_after_one_prompt_compute_it_once(
    code_model, code_tokenizer, layout, batch_invariant
):
    """To the last bit as alone, where the engine is batch invariant."""
    torch.manual_seed(0)
    model = FlashSTU(replace(code_model.config, layout=layout, max_seq_len=512)).eval()
    context, *ends = random_prompts(300, 1, 20, 90, 3)
    asked = [last(context)]
    asked += [
        make_request(context + end, 0, prompt_logprobs=0, prompt_logprobs_from=len(context))
        for end in [*ends, []]
    ]
    asked += [last(context + ends[1]), score(context + ends[1])]
    settings = {"cache_gib": 0.05, "batch_invariant": batch_invariant}
    alone = [decode(model, code_tokenizer, [request], **settings)[0] for request in asked]
    engine = Engine(model, code_tokenizer, EngineConfig(**settings))
    outputs = []
    for request in asked:
        engine.add(request)
    while engine.has_work:
        outputs += engine.step()
    outputs.sort(key=lambda output: output.request_id)
    for request, output, expected in zip(asked, outputs, alone, strict=True):
        found = [token.logprob for token in output.prompt_logprobs]
        values = [token.logprob for token in expected.prompt_logprobs]
        assert len(found) == (len(request.prompt_token_ids) - request.prompt_logprobs_from) * (
            request.pooling is None
        )
        tolerance = 0 if batch_invariant else 1e-4
        assert found == pytest.approx(values, abs=tolerance, rel=0)
        assert output.embedding == pytest.approx(expected.embedding, abs=tolerance, rel=0)
    remembered = 0 if layout == "hyena" else 256 if batch_invariant else 288
    expected = [0, *[remembered] * 6, 0]
    assert [output.cached_tokens for output in outputs] == expected
