"""Models that ranks divide, as threads of one process, against the same models whole."""

import random
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.division.parts import Parts
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from stu.quantization import QuantizedLinear
from stu.slices.channels import Divided
from stu.tokenizers.sentence_piece import train_bpe
from tests.models import float64_model
from tests.serve.requests import make_request
from tests.stu.slice_threads import ChannelThreadRanks, in_threads

VOCAB_SIZE = 281  # neither 2 nor 4 divides it
KINDS = {
    "stu": {"layout": "stu"},
    "hybrid": {"layout": "hybrid"},
    "full": {"layout": "stu", "stu_form": "full", "num_filters": 2, "num_layers": 2},
    "hyena": {"layout": "hyena"},
    "plain": {"layout": "hyena", "blocks": "plain"},
    "attention": {"layout": "attention"},
}
SHAPE = {"width": 16, "num_layers": 3, "num_heads": 4, "mlp_ratio": 2, "num_filters": 4}
SHAPE |= {"window_tokens": 10, "vocab_size": VOCAB_SIZE, "max_seq_len": 256}
in_ranks = partial(in_threads, kind=ChannelThreadRanks)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["the cat sat on the mat\n", "a dog and a cat\n"] * 5
    return train_bpe(texts, VOCAB_SIZE, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer):
    """Function of a kind and the format of its weights, which returns a model directory."""
    made = {}

    def directory(kind, weights="float", width=16):
        key = kind, weights, width
        if key not in made:
            torch.manual_seed(1)
            model = float64_model(ModelConfig(**{**SHAPE, **KINDS[kind], "width": width}))
            with torch.no_grad():
                for parameter in model.parameters():  # biases and norms too
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[key] = tmp_path_factory.mktemp(kind) / "model"
            save_model(made[key], model, tokenizer, weights=weights)
        return made[key]

    return directory


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("kind", "stored", "weights"),
    [
        *((kind, "float", "float") for kind in KINDS),
        *((kind, "float", "int8") for kind in ("hybrid", "plain")),
        *((kind, "int8", weights) for kind in ("hybrid", "plain") for weights in ("int8", "float")),
    ],
)
def test_divided_models_compute_what_whole_ones_do(directories, kind, stored, weights, size):
    path = directories(kind, stored)
    tokens = torch.randint(VOCAB_SIZE, (2, 37), generator=torch.Generator().manual_seed(2))
    load = partial(load_model, path, dtype=torch.float32, weights=weights)
    whole = load()
    with torch.inference_mode():
        expected = whole(tokens)

    def compute(ranks):
        model = load(ranks=ranks)
        assert model.weights == whole.weights
        with torch.inference_mode():
            return model(tokens), numbers(model)

    for logits, count in in_ranks(size, compute):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert count == part_of(whole, size)


def numbers(model):
    """Return the numbers of all tensors of a model."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def part_of(model, size):
    """Return the numbers that each of `size` ranks has of a model: its share of what is divided,
    the last share of tokens filled up, and all of filters and norms, of what makes filters, and of
    what is added to sums, or scales them."""
    rest = "norm", "filter", "output.bias", "down.bias", "output.scales", "down.scales"
    count = 0
    for name, tensor in model.state_dict().items():
        if name == "embedding.weight":
            count += -(-len(tensor) // size) * tensor.shape[1]
        else:
            is_whole = any(word in name for word in rest)
            count += tensor.numel() if is_whole else tensor.numel() // size
    return count


class Reads:
    """A safetensors file that counts the numbers that are read of it."""

    def __init__(self, archive):
        self._archive, self.count = archive, 0

    def get_tensor(self, name):
        tensor = self._archive.get_tensor(name)
        self.count += tensor.numel()
        return tensor

    def get_slice(self, name):
        stored = self._archive.get_slice(name)

        class Slice:
            get_shape = stored.get_shape

            def __getitem__(_, index):
                tensor = stored[index]
                self.count += tensor.numel()
                return tensor

        return Slice()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_read_their_parts_of_the_file_alone(directories, kind):
    whole = load_model(directories(kind))
    counts = []
    for rank in range(4):
        with torch.device("meta"):
            model = FlashSTU(whole.config)
        parts = Parts(model, ChannelThreadRanks(rank, 4, None))
        with safe_open(directories(kind) / "model.safetensors", framework="pt") as archive:
            reads = Reads(archive)
            for name in archive.keys():  # noqa: SIM118
                parts.read(reads, name)
        counts.append(reads.count)
    share = part_of(whole, 4)
    missing = -VOCAB_SIZE % 4 * whole.config.width  # filled up, and not read
    assert counts == [share] * 3 + [share - missing]


TRAFFIC = [(arrival, seed) for seed, arrival in enumerate([0, 0, 1, 5, 9, 30, 31])]


def request(seed):
    chosen = random.Random(seed)
    prompt = [(7 * place + place // 3) % VOCAB_SIZE for place in range(chosen.choice([0, 40, 90]))]
    prompt += [chosen.randrange(VOCAB_SIZE) for _ in range(chosen.randint(1, 50))]
    new_tokens = chosen.choice([0, 3, 20, 60])
    sampling = SamplingParams(
        temperature=chosen.choice([0, 1]),
        top_p=chosen.choice([1, 0.8]),
        logprobs=chosen.choice([0, 2]),
        seed=seed,
    )
    pooling = "mean" if new_tokens == 0 else None
    return make_request(prompt, new_tokens, sampling, prompt_logprobs=1, pooling=pooling)


def decode(engine):
    """Run `TRAFFIC`, with an abort, and return the outputs of each step."""
    steps = []
    while len(steps) < 60 or engine.has_work:
        for arrival, seed in TRAFFIC:
            if arrival == len(steps):
                engine.add(request(seed))
        if len(steps) == 12:
            engine.abort(2)
        steps.append(engine.step())
        engine.check_integrity()
    return steps


@pytest.mark.parametrize(
    ("size", "kind", "settings"),
    [
        (2, "hybrid", {"overlap": True}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (2, "stu", {}),
                (4, "stu", {"convolution_cache": "pages"}),
                (4, "hybrid", {"static": True, "prompt_tokens_per_step": 40}),
                (2, "full", {"static": True}),
                (4, "full", {"convolution_cache": "pages", "max_running": 2}),
                (4, "hyena", {"static": True}),
                (2, "plain", {}),
                (4, "attention", {}),
                (2, "hybrid", {"speculate": "ngram"}),
                (4, "hyena", {"speculate": "ngram"}),
            ]
        ),
    ],
)
def test_engines_of_ranks_decode_as_a_whole_one(directories, tokenizer, size, kind, settings):
    """All layouts and both caches: every rank gives the same tokens in the same steps, with the
    same log probabilities, and remembers its part alone."""
    settings = {"cache_gib": 0.004, "page_len": 8, "max_running": 3, **settings}
    static = settings.pop("static", False)

    def engine(ranks=None):
        model = load_model(directories(kind), dtype=torch.float64, ranks=ranks)
        return Engine(model, tokenizer, EngineConfig(**settings), static)

    def compute(ranks):
        own = engine(ranks)
        return decode(own), [remembered_bytes(own)]

    whole = engine()
    expected = decode(whole)
    for steps, (num_bytes,) in in_ranks(size, compute):
        compare(steps, expected)
        assert num_bytes == remembered_bytes(whole) / size


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("hybrid", 2),
        ("full", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("hybrid", 4), ("hyena", 4), ("full", 4)]
        ),
        pytest.param("plain", 2, marks=pytest.mark.slow),
    ],
)
def test_engines_with_weights_of_8_bits_compute_the_same_bits(directories, tokenizer, kind, size):
    """Ranks round the inputs of products alike, as they add whole numbers, and channels fill the
    registers: other sums have the same bits only then."""
    path = directories(kind, width=64)

    def compute(ranks):
        model = load_model(path, weights="int8", ranks=ranks)
        config = EngineConfig(cache_gib=0.01, page_len=8, max_running=3, weights="int8")
        return decode(Engine(model, tokenizer, config))

    expected = compute(None)
    for steps in in_ranks(size, compute):
        assert steps == expected


def remembered_bytes(engine):
    """Return the bytes of a row's page, state or inputs in each cache, without padding."""
    total = 0
    for cache in engine._caches.all:
        total += cache.pool.page_bytes if cache.pool else cache.num_bytes
    return total


def compare(steps, expected):
    assert len(steps) == len(expected)
    for found, whole in zip(steps, expected, strict=True):
        assert [output.request_id for output in found] == [own.request_id for own in whole]
        for output, own in zip(found, whole, strict=True):
            for name in ("new_token_ids", "text", "finish_reason", "cached_tokens"):
                assert getattr(output, name) == getattr(own, name)
            for name in ("logprobs", "prompt_logprobs"):
                for token, other in zip(getattr(output, name), getattr(own, name), strict=True):
                    assert token.logprob == pytest.approx(other.logprob, abs=1e-9)
            assert output.embedding == pytest.approx(own.embedding, abs=1e-9)


def test_sums_of_ranks_do_not_depend_on_the_batch(directories, tokenizer):
    """To the last bit, where the batch is invariant."""
    requests = [make_request([5 + i, *range(9)], 12, SamplingParams(logprobs=0)) for i in range(3)]

    def answers(ranks, groups):
        model = load_model(directories("hybrid"), ranks=ranks)
        engine = Engine(model, tokenizer, EngineConfig(0.004, max_running=8, batch_invariant=True))
        found = []
        for group in groups:
            ids = [engine.add(own) for own in group]
            outputs = []
            while engine.has_work:
                outputs += engine.step()
            found += [[out.logprobs for out in outputs if out.request_id == own] for own in ids]
        return found

    def compute(ranks):
        return answers(ranks, [requests]), answers(ranks, [[own] for own in requests])

    for together, alone in in_ranks(4, compute):
        assert together == alone


def test_memory_of_ranks_is_agreed_upon(directories, tokenizer, monkeypatch):
    """The rank with the least free memory decides, as all have as many pages."""
    free = iter([3 * 2**24, 2**24])
    monkeypatch.setattr("serve.cache.budget.free_bytes", lambda device: next(free))

    def compute(ranks):
        model = load_model(directories("hybrid"), ranks=ranks)
        return Engine(model, tokenizer, EngineConfig(max_running=2))._caches.capacity

    first, second = in_ranks(2, compute)
    assert first == second


@pytest.mark.parametrize(
    ("kind", "size", "allowed"),
    [
        ("hybrid", 8, "one of 1, 2, 4, which divide width=16 and num_heads=4"),
        ("stu", 3, "one of 1, 2, 4, 8, 16, which divide width=16"),
    ],
)
def test_numbers_of_ranks_that_do_not_divide_a_model_are_refused(directories, kind, size, allowed):
    with pytest.raises(UserError, match=f"tensor_parallel={size} .* {allowed}$"):
        load_model(directories(kind), ranks=ChannelThreadRanks(0, size, None))


def test_tensors_of_other_shapes_are_refused(directories, tmp_path, tokenizer):
    model = load_model(directories("stu"))
    save_model(tmp_path / "model", model, tokenizer)
    file = tmp_path / "model" / "model.safetensors"
    with safe_open(file, framework="pt") as archive:
        metadata = archive.metadata()
    tensors = load_file(file)
    name = "blocks.1.mlp.down.weight"
    for shape in [(16, 16), (16, 64), ()]:  # the first is that of a part
        save_file({**tensors, name: torch.zeros(shape)}, file, metadata)
        with pytest.raises(UserError, match=f"{name} has shape"):
            load_model(tmp_path / "model", ranks=ChannelThreadRanks(0, 2, None))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
@pytest.mark.parametrize(("dim", "groups"), [(0, 1), (1, 1), (0, 3)])
def test_parts_of_tensors_join_to_the_whole(count, dim, groups):
    shape = [3, 3]
    shape[dim] = count * groups
    tensor, how = torch.arange(float(torch.Size(shape).numel())).view(shape), Divided(dim, groups)
    if count % 3 and groups > 1:
        return  # never filled up
    parts = [how.part(tensor, shape, ChannelThreadRanks(rank, 3, None)) for rank in range(3)]
    assert {tuple(part.shape) for part in parts} == {how.shape(shape, 3)}
    if groups > 1:
        chunks = [part.chunk(groups, dim) for part in parts]
        parts = [torch.cat([own[group] for own in chunks], dim) for group in range(groups)]
    joined = torch.cat(parts, dim)
    torch.testing.assert_close(joined.narrow(dim, 0, shape[dim]), tensor)
    assert not joined.narrow(dim, shape[dim], joined.shape[dim] - shape[dim]).any()


def test_parts_of_8_bits_have_the_scales_of_whole_outputs(directories):
    whole = load_model(directories("hybrid"), weights="int8")

    def compute(ranks):
        model = load_model(directories("hybrid"), weights="int8", ranks=ranks)
        block = model.blocks[0].mlp.inner
        assert isinstance(block.down, QuantizedLinear)
        return block.down.values, block.down.scales, block.up.scales

    found = in_ranks(2, compute)
    mlp = whole.blocks[0].mlp
    assert torch.equal(torch.cat([values for values, _, _ in found], 1), mlp.down.values)
    assert all(torch.equal(scales, mlp.down.scales) for _, scales, _ in found)
    assert torch.equal(torch.cat([scales for _, _, scales in found]), mlp.up.scales)
