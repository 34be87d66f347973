"""Requests go to replicas that remember their prompts, as far as that is sooner."""

import asyncio
import random
import time
from types import SimpleNamespace

import pytest
import torch

from serve.cache.prefix_cache import BLOCK_TOKENS
from serve.config import EngineConfig
from serve.server.replicas import prefixes
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.dispatcher import ENGINE_FAILED
from serve.server.replicas.prefixes import SentPrefixes, prefix_digests
from serve.server.replicas.replica import Replica
from serve.server.replicas.stream import EngineError
from serve.server.replicas.supervisor import ReplicasConfig
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import save_model
from tests.serve.requests import make_request


class StoppedReplica(Replica):
    """A replica that takes requests and decodes nothing."""

    def __init__(self):
        self.settings = {"engine": {"max_running": 100}}
        self.streams, self.prefixes, self._writer = {}, SentPrefixes(), None
        self.stats = SimpleNamespace(prefix_tokens_asked=1)


@pytest.fixture
def replicas(tmp_path):
    replicas = Replicas(ReplicasConfig(tmp_path, ("cpu",) * 3))
    replicas._replicas = [StoppedReplica() for _ in range(3)]
    replicas._has_been_ready = True
    return replicas


def prompt(document, question, num_tokens=10 * BLOCK_TOKENS):
    return [1 + document] * num_tokens + [100 + question] * 5


def place_of(replicas, tokens, count=5, **values):
    """Return the number of the replica that a request goes to."""
    (stream,) = replicas.submit([make_request(tokens, count, **values)])
    (place,) = [
        place for place, own in enumerate(replicas._replicas) if stream.number in own.streams
    ]
    return place


def test_prompts_that_begin_alike_go_to_one_replica(replicas):
    places = {document: place_of(replicas, prompt(document, 0)) for document in range(3)}
    assert sorted(places.values()) == [0, 1, 2]
    for document, place in places.items():
        assert place_of(replicas, prompt(document, 1)) == place


def test_busy_replica_is_left_alone_when_prefilling_elsewhere_is_sooner(replicas):
    first = place_of(replicas, prompt(0, 0))
    assert place_of(replicas, prompt(0, 1)) == first
    more = place_of(replicas, prompt(0, 2), 400)
    assert more == first, "it has less to do than the prompt has tokens"
    elsewhere = place_of(replicas, prompt(0, 3))
    assert elsewhere != first
    assert place_of(replicas, prompt(0, 4)) == elsewhere, "it remembers the prompt as well"


def test_cost_of_a_request_leaves_out_what_is_remembered_and_what_is_prefilled(replicas):
    first, second = (
        replicas.submit([make_request(prompt(0, number), 7)])[0] for number in range(2)
    )
    assert (first.cost, second.cost) == (10 * BLOCK_TOKENS + 5 + 7, 5 + 7)
    (replica,) = [own for own in replicas._replicas if own.streams]
    output = SimpleNamespace(request_id=0, new_token_ids=[5], finish_reason=None)
    replicas._take(replica, output, 1.0)
    assert first.cost == 6


@pytest.mark.parametrize(
    ("count", "values"),
    [(5, {"cache_salt": "another"}), (0, {"pooling": "mean"}), (5, {"prompt_logprobs": 1})],
    ids=["salt", "pooling", "prompt_logprobs"],
)
def test_a_prompt_that_would_not_be_found_goes_to_the_least_busy_replica(replicas, count, values):
    first = place_of(replicas, prompt(0, 0))
    assert place_of(replicas, prompt(0, 1), count, **values) != first


def test_engines_without_a_prefix_cache_are_chosen_by_what_they_have_to_do(replicas):
    for own in replicas._replicas:
        own.stats.prefix_tokens_asked = 0
    assert sorted(place_of(replicas, prompt(0, number)) for number in range(3)) == [0, 1, 2]


def test_a_request_that_another_server_began_continues_after_its_tokens(replicas):
    (stream,) = replicas.submit([make_request([1], 5, new_token_ids=[7, 8])])
    assert list(stream.rest().new_token_ids) == [7, 8]
    assert stream.cost == 1 + 2 + 5 - 2


def test_a_request_that_cannot_be_sent_ends_alone(replicas):
    request = make_request([1], 5)
    object.__setattr__(request.sampling, "truncate_prompt_tokens", 2**64)
    wrong, right = replicas.submit([request, make_request([1], 5)])
    assert str(wrong.outputs.get_nowait()) == ENGINE_FAILED
    assert [stream.number for stream in replicas._held()] == [right.number]
    assert (len(replicas._waiting), right.outputs.empty()) == (0, True)
    for own in replicas._replicas:  # of a replica that ends
        own.streams[wrong.number] = wrong
        replicas._move(own)
        assert isinstance(wrong.outputs.get_nowait(), EngineError)


def test_sent_prefixes_agree_with_a_search_through_all_prompts(monkeypatch):
    generator = random.Random(0)
    sent, known = [], SentPrefixes()
    for _ in range(60):
        base = generator.choice(sent) if sent and generator.random() < 0.7 else []
        tokens = base[: generator.randrange(1 + len(base))]
        tokens += [generator.randrange(9) for _ in range(generator.randrange(1, 200))]
        request = make_request(tokens, 1)
        digests = prefix_digests(request)
        common = max((num_common(tokens, other) for other in sent), default=0)
        # The last token is always computed, and only whole blocks are compared.
        expected = min(common, len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert known.num_tokens(digests) <= expected
        # A prompt whose last token ends a block is known up to the block before.
        shortened = max((min(num_common(tokens, o), len(o) - 1) for o in sent), default=0)
        assert known.num_tokens(digests) == min(shortened, len(tokens) - 1) // 32 * 32
        known.add(digests)
        sent.append(tokens)
    monkeypatch.setattr(prefixes, "MOST_BLOCKS", 3)
    known = SentPrefixes()
    long, short = (prefix_digests(make_request([n] * 32 * n + [1], 1)) for n in (3, 1))
    known.add(long)
    known.add(short)
    assert (known.num_tokens(long), known.num_tokens(short)) == (64, 32)


def num_common(first, second):
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


NUM_DOCUMENTS, NUM_QUESTIONS, DOCUMENT_TOKENS = 12, 6, 2048


@pytest.mark.slow
def test_much_less_of_common_prefixes_is_read_again_than_by_load_alone(
    tmp_path, code_tokenizer, monkeypatch
):
    """Questions about documents arrive at random at four replicas, at the same moments."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=code_tokenizer.vocab_size,
        width=128,
        num_layers=4,
        num_filters=8,
        num_heads=4,
        window_tokens=32,
        max_seq_len=4096,
    )
    save_model(tmp_path / "model", FlashSTU(config).eval(), code_tokenizer, {"max_new_tokens": 9})
    by_prefix = asyncio.run(share_read(tmp_path / "model"))
    monkeypatch.setattr(Replica, "num_remembered", lambda replica, stream: 0)
    by_load = asyncio.run(share_read(tmp_path / "model"))
    assert by_prefix < 0.35, "a sixth of the questions are the first about a document"
    assert by_load > 1.5 * by_prefix


async def share_read(model):
    """Return the share of the prompts' tokens that were not remembered."""
    engine = EngineConfig(cache_gib=0.2, prefix_cache_gib=0.01)
    replicas = Replicas(ReplicasConfig(model, ("cpu",) * 4, engine=engine))
    generator = random.Random(0)
    documents = [
        [generator.randrange(3, 250) for _ in range(DOCUMENT_TOKENS)]
        for _ in range(NUM_DOCUMENTS + 3)
    ]

    async def ask(tokens):
        began = time.perf_counter()
        (stream,) = replicas.submit([make_request(tokens, 4)])
        async for _ in replicas.outputs(stream):
            pass
        return time.perf_counter() - began

    await replicas.start()
    try:
        await replicas.ready(lambda: True)
        while len(replicas.running) < 4:
            await asyncio.sleep(0.05)
        alone = min([await ask(document) for document in documents[NUM_DOCUMENTS:]])
        order = [
            [*document[:-1], 250 + question]
            for document in documents[:NUM_DOCUMENTS]
            for question in range(NUM_QUESTIONS)
        ]
        generator.shuffle(order)
        tasks = []
        for tokens in order:
            tasks.append(asyncio.create_task(ask(tokens)))
            await asyncio.sleep(generator.expovariate(1 / alone))
        await asyncio.gather(*tasks)
        totals = replicas.totals()
        return 1 - totals.prefix_tokens_found / totals.prefix_tokens_asked
    finally:
        await replicas.stop()
