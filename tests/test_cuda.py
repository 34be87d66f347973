"""A CUDA device computes the same as the CPU in float64. Skipped without one.

Tests of commands are skipped where jsonargparse, which reads their options, is not installed.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.inference_model import FP8_CAPABILITY
from serve.sampling.features import EVERYTHING, FEW, GREEDY
from serve.sampling_params import SamplingParams
from stu import futurefill
from stu.attention import KERNEL_ON_CUDA, Scores, alibi_slopes, sliding_window_attention
from stu.config import ModelConfig
from stu.convolution import causal_convolution
from stu.futurefill import Continuous, Epoched
from stu.model import FlashSTU
from stu.model_dir import save_model
from stu.online_convolution import Naive
from stu.quantization import dequantize, quantize
from stu.sequences.documents import Documents
from stu.tokenizers.sentence_piece import train_bpe
from tests.models import float64_model
from tests.serve.requests import make_request
from tests.serve.sampling.test_device_sampler import ALL_ROWS, random_logits, sampler_of_everything
from train.checkpoint.folder import CHECKPOINTS, LAST, CheckpointFolder
from train.loss import next_token_loss
from train.optimizer import OptimizerConfig, make_optimizer
from train.optimizer.muon import Muon
from train.parallel.config import ParallelConfig, prepare_blocks

try:
    from tests.train.conftest import data, train_settings  # noqa: F401 (fixtures)
except ModuleNotFoundError as missing:
    if missing.name not in ("jsonargparse", "docstring_parser"):
        raise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCAB_SIZE = 280
LAYOUTS = {
    "stu": {"layout": "stu"},
    "full": {"layout": "stu", "stu_form": "full", "num_filters": 3, "num_layers": 2},
    "hybrid": {"layout": "hybrid", "window_tokens": 37},
    "hyena": {"layout": "hyena"},
    "attention": {"layout": "attention", "window_tokens": 37},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["the cat sat on the mat\n", "a dog and a cat\n"] * 5
    return train_bpe(texts, VOCAB_SIZE, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def build(kind, **settings):
    torch.manual_seed(1)
    shape = {"width": 32, "num_layers": 4, "num_heads": 4, "mlp_ratio": 2, "num_filters": 6}
    shape |= {"vocab_size": VOCAB_SIZE, "max_seq_len": 600}
    return float64_model(ModelConfig(**{**shape, **LAYOUTS[kind], **settings}))


def copy_to_cuda(model, dtype):
    copied = FlashSTU(model.config).to(dtype)
    copied.load_state_dict(model.state_dict())
    return copied.cuda().eval()


def requests(num_new=90):
    """Prompts of odd lengths; every second one is sampled."""
    source = torch.Generator().manual_seed(2)
    for number, length in enumerate([1, 2, 31, 32, 33, 100, 257]):
        tokens = torch.randint(0, VOCAB_SIZE, (length,), generator=source).tolist()
        sampling = SamplingParams(temperature=number % 2, seed=number, logprobs=1)
        yield make_request(tokens, num_new + 5 * number, sampling=sampling)


def decode(model, tokenizer, wanted, **settings):
    """Return the tokens of each request and their log probabilities."""
    engine = Engine(model, tokenizer, EngineConfig(**{"cache_gib": 0.02, **settings}))
    results = {engine.add(request): ([], []) for request in wanted}
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs = results[output.request_id]
            tokens += output.new_token_ids
            logprobs += [token.logprob for token in output.logprobs]
        engine.check_integrity()
    return list(results.values())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_logits_and_gradients(kind, dtype, tolerance):
    model = build(kind)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 131), generator=torch.manual_seed(3))
    copied = copy_to_cuda(model, dtype)
    expected, found = model(tokens), copied(tokens.cuda())
    assert distance(found, expected) < tolerance
    for logits in expected, found:
        logits.logsumexp(-1).sum().backward()
    gradients = zip(copied.parameters(), model.parameters(), strict=True)
    assert all(distance(mine.grad, theirs.grad) < 10 * tolerance for mine, theirs in gradients)


def distance(found, expected):
    """Return the norm of the difference relative to the expected norm."""
    expected = expected.detach()
    return ((found.detach().cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", [Naive, Epoched, Continuous])
@pytest.mark.parametrize("lag_step", [1, 2])
@pytest.mark.parametrize("block", [2**26, 2**12])
def test_online_convolutions(kind, lag_step, block, monkeypatch):
    monkeypatch.setattr(futurefill, "GPU_BLOCK_ELEMENTS", block)
    source = torch.Generator().manual_seed(4)
    length, num_new = 70, 301
    taps = torch.randn(2, 400 // lag_step, 5, generator=source, dtype=torch.float64)
    inputs = torch.randn(3, length + num_new, 5, generator=source, dtype=torch.float64)
    online = kind(taps.float().cuda(), 3, num_new, lag_step)
    found = [[online.prefill(layer, inputs[:, :length].float().cuda())] for layer in range(2)]
    for position in range(length, length + num_new):
        for layer in range(2):
            step = online.step(layer, inputs[:, position].float().cuda())
            found[layer].append(step[:, None].clone())
        online.advance()
    for layer in range(2):
        expected = causal_convolution(inputs, taps[layer], lag_step)
        assert distance(torch.cat(found[layer], 1), expected) < 1e-6


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(
    ("page_len", "overlap", "enforce_eager"),  # all pairs of values
    [(32, True, False), (4, False, False), (4, True, True), (32, False, True)],
)
def test_a_batch_decodes_the_same_tokens_as_the_cpu(
    kind, page_len, overlap, enforce_eager, tokenizer
):
    model = build(kind)
    settings = {"page_len": page_len, "prompt_tokens_per_step": 50}
    settings |= {"overlap": overlap, "enforce_eager": enforce_eager}
    expected = decode(model, tokenizer, requests(), **settings)
    found = decode(copy_to_cuda(model, torch.float64), tokenizer, requests(), **settings)
    for (tokens, logprobs), (their_tokens, their_logprobs) in zip(found, expected, strict=True):
        assert tokens == their_tokens
        assert logprobs == pytest.approx(their_logprobs, abs=1e-8)


SAMPLING = {
    "greedy": {},
    "random": {"temperature": 0.9},
    "few": {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
    "truncated": {"temperature": 1.2, "top_p": 0.8, "min_p": 0.01},
    "penalties, not captured": {"temperature": 1.0, "frequency_penalty": 0.5},
}


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_engines_sample_the_same_tokens_as_on_the_cpu(sampling, enforce_eager, tokenizer):
    """Every second request is greedy; none asks for log probabilities, which are not captured."""
    model, wanted = build("hybrid"), []
    for number, request in enumerate(requests()):
        params = SamplingParams(seed=number, **SAMPLING[sampling] if number % 2 else {})
        wanted.append(make_request(request.prompt_token_ids, 60 + 5 * number, sampling=params))
    expected = decode(model, tokenizer, wanted)
    cuda, settings = copy_to_cuda(model, torch.float64), {"enforce_eager": enforce_eager}
    assert decode(cuda, tokenizer, wanted, **settings) == expected


@pytest.mark.parametrize("kind", LAYOUTS)
def test_bfloat16_stays_near_float64(kind, tokenizer):
    model = build(kind)
    found = decode(copy_to_cuda(model, torch.bfloat16), tokenizer, requests())
    for request, (tokens, logprobs) in zip(requests(), found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_token_ids, *tokens]]))[
                0, len(request.prompt_token_ids) - 1 : -1
            ]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(logprobs) == len(tokens)
        assert (torch.tensor(logprobs).double() - expected).abs().mean() < 0.03


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_weights_of_8_bits_decode_as_the_numbers_that_they_are(
    weights, dtype, tolerance, tokenizer
):
    if weights == "fp8" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("the GPU has no floats of 8 bits")
    model = build("hybrid").to(dtype)
    found = decode(copy_to_cuda(model, dtype), tokenizer, requests(), weights=weights)
    unembedding = dequantize(quantize(model.embedding.weight, weights)).double()
    for name, dim in model.matrices.items():
        weight = model.get_parameter(name).data
        model.get_parameter(name).data = (
            dequantize(quantize(weight.movedim(dim, 0), weights)).movedim(0, dim).double()
        )
    model = model.double()
    for request, (tokens, logprobs) in zip(requests(), found, strict=True):
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([[*request.prompt_token_ids, *tokens]]))
        logits = hidden[0, len(request.prompt_token_ids) - 1 : -1] @ unembedding.T
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(logprobs) == len(tokens)
        assert (torch.tensor(logprobs).double() - expected).abs().mean() < tolerance


@pytest.mark.parametrize("features", [GREEDY, EVERYTHING, replace(EVERYTHING, most_kept=FEW)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_sampling_draws_the_tokens_of_the_cpu(features, dtype):
    """Of rows of all kinds and one of padding, over steps that count their tokens."""
    vocab_size, num_rows = 200, len(ALL_ROWS)
    cpu, gpu = (sampler_of_everything(device, vocab_size) for device in ("cpu", "cuda"))
    rows = torch.tensor([*ALL_ROWS, cpu.null_row])
    places, uniform = rows.cuda(), torch.zeros(num_rows + 1, dtype=torch.float64, device="cuda")
    logits = torch.full((num_rows + 1, vocab_size), torch.nan, dtype=dtype, device="cuda")
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        gpu.sample(logits, places, uniform, features)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=warm_up):  # whose workspaces are there
        sampled = gpu.sample(logits, places, uniform, features)
    for mine, others in zip(gpu.tables.tensors, cpu.tables.tensors, strict=True):
        mine.copy_(others)  # without the tokens counted until now
    for seed in range(20):
        own = random_logits(num_rows, seed, [None, 0.3][seed % 2], vocab_size).to(dtype)
        numbers = torch.rand(num_rows + 1, generator=torch.manual_seed(seed)).double()
        logits[:num_rows].copy_(own)
        uniform.copy_(numbers)
        graph.replay()
        padded = torch.cat([own, torch.full_like(own[:1], torch.nan)])
        expected = cpu.sample(padded, rows, numbers, features)
        assert sampled.tokens[:num_rows].tolist() == expected.tokens[:num_rows].tolist()
        assert sampled.is_finite.tolist() == [True] * num_rows + [False]
        assert sampled.is_allowed[:num_rows].all()
        if expected.logprobs is not None:
            for found, wanted in zip(sampled.logprobs, expected.logprobs, strict=True):
                torch.testing.assert_close(found[:num_rows].cpu(), wanted[:num_rows])


@pytest.mark.parametrize("kind", ["stu", "hybrid", "hyena"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_invariant_batches_do_not_depend_on_their_composition(kind, dtype, tokenizer):
    model = copy_to_cuda(build(kind), dtype)
    together = decode(model, tokenizer, requests(), batch_invariant=True)
    alone = [decode(model, tokenizer, [request], batch_invariant=True)[0] for request in requests()]
    assert together == alone


@pytest.mark.parametrize(
    ("length", "earlier", "window"), [(256, 0, 100), (300, 0, 37), (519, 0, 512), (700, 443, 300)]
)
def test_attention_in_bfloat16_stays_near_float64(length, earlier, window):
    """With gradients, by whichever kernel is installed."""
    source = torch.Generator().manual_seed(5)
    shape = 2, length, 4, 64
    exact = [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(3)]
    exact[0] = 4 * exact[0][:, earlier:]  # the softcap bends the scores
    half = [x.cuda().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().cpu().double().requires_grad_() for x in half]
    results = []
    for inputs in exact, half:
        scores = Scores(alibi_slopes(4).to(inputs[0].device), window, 5.0)
        out = sliding_window_attention(*inputs, scores)
        upstream = torch.arange(out.numel(), device=out.device).view(out.shape) % 7 - 3.0
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))])
    for expected, found in zip(*results, strict=True):
        assert distance(found, expected) < 0.01


def test_documents_kept_apart_stay_near_float64():
    """In bfloat16, with gradients, and to the bit the same whatever another document holds."""
    source = torch.Generator().manual_seed(5)
    shape = 2, 700, 4, 64
    exact = [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(3)]
    half = [x.cuda().bfloat16().requires_grad_() for x in exact]
    changed = [x.detach().clone() for x in half]
    for tensor in changed:
        tensor[0, 300:310] += 1
    exact = [x.detach().cpu().double().requires_grad_() for x in half]
    results = []
    for inputs in exact, half, [x.requires_grad_() for x in changed]:
        documents = Documents([[300, 10, 390], [1, 128, 571]], inputs[0].device)
        scores = Scores(alibi_slopes(4).to(inputs[0].device), 200, 5.0)
        out = sliding_window_attention(*inputs, scores, documents)
        upstream = torch.arange(out.numel(), device=out.device).view(out.shape) % 7 - 3.0
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))])
    for expected, found, other in zip(*results, strict=True):
        assert distance(found, expected) < 0.01
        if KERNEL_ON_CUDA == "flash-attn" and found is not results[1][0]:
            continue  # sums in the backward pass have no fixed order
        assert torch.equal(found[1], other[1])
        assert torch.equal(found[0, :300], other[0, :300])
        assert torch.equal(found[0, 310:], other[0, 310:])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_model_keeps_documents_apart_as_on_the_cpu(kind):
    model = build(kind)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 300), generator=torch.manual_seed(6))
    lengths = [[100, 7, 193], [300]]
    expected = model(tokens, Documents(lengths))
    found = copy_to_cuda(model, torch.float32)(tokens.cuda(), Documents(lengths, "cuda"))
    assert distance(found, expected) < 1e-4


def test_attention_is_compiled_for_two_lengths_at_most():
    if KERNEL_ON_CUDA != "flex_attention":
        pytest.skip("another kernel runs")
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for length in (256, 300, 512, 700, 1024, 2050):
        inputs = torch.randn(3, 1, length, 2, 32, device="cuda", dtype=torch.bfloat16)
        sliding_window_attention(*inputs, Scores(alibi_slopes(2).cuda(), 200, 50.0))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("compiles", [False, True])
def test_training_steps_follow_those_of_the_cpu(kind, compiles):
    """Three steps in float32 and in bf16-mixed, with fused AdamW, against float64 on the CPU."""
    if compiles and kind not in ("stu", "hybrid"):
        pytest.skip("compiling takes long")
    wide = {"num_heads": 2, "window_tokens": 300} if kind in ("hybrid", "attention") else {}
    model = build(kind, **wide)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 301), generator=torch.manual_seed(6))
    half, single = copy_to_cuda(model, torch.float32), copy_to_cuda(model, torch.float32)
    for own in half, single:
        prepare_blocks(own, ParallelConfig(compile=compiles))
    expected = train_steps(model, tokens)
    assert train_steps(single, tokens.cuda()) == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        found = train_steps(half, tokens.cuda())
    assert found == pytest.approx(expected, rel=0.02)


def test_muon_orthogonalizes_in_bfloat16_as_the_cpu_does():
    weight = torch.nn.Parameter(torch.zeros(3 * 64, 40))
    weight.grad = torch.randn(weight.shape, generator=torch.manual_seed(7))
    on_gpu = torch.nn.Parameter(weight.detach().cuda())
    on_gpu.grad = weight.grad.cuda()
    for parameter in weight, on_gpu:
        groups = [{"params": [parameter], "matrices": [3]}]
        Muon(groups, lr=1.0, momentum=0.9, weight_decay=0.0).step()
    assert distance(on_gpu, weight) < 0.05


def train_steps(model, tokens):
    """Take three steps on one batch, and return their losses."""
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1e-3))
    assert bool(optimizer.param_groups[0]["fused"]) == tokens.is_cuda
    losses = []
    for _ in range(3):
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        loss, _ = next_token_loss(hidden, model.embedding.weight, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("layout", ["stu", "hybrid", "hyena"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_lowers_the_loss(layout, precision, train):
    losses = train({"model.config.layout": layout, "trainer.precision": precision})
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("parallel", [{"kind": "zero", "zero_stage": 2}, {"kind": "fsdp"}])
def test_sharded_training_equals_unsharded_training(parallel, train, tmp_path):
    """With fused AdamW too."""
    if parallel["kind"] == "zero":
        pytest.importorskip("deepspeed")
    expected = train({})
    found = train({f"parallel.{name}": value for name, value in parallel.items()})
    assert found == pytest.approx(expected, abs=1e-3)
    for run in tmp_path.glob("run*"):
        groups = CheckpointFolder(run / CHECKPOINTS / LAST).training["optimizer_groups"]
        assert all(group["fused"] for group in groups)


@pytest.fixture
def train(request, tmp_path):
    """Train 40 steps on the device, and return their losses."""
    pytest.importorskip("jsonargparse")
    from train.report import read_curves

    settings = request.getfixturevalue("settings")

    def call(changes):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        kept = [name for name in settings if not name.startswith("--trainer.accelerator")]
        values = {"trainer.accelerator": "gpu", "trainer.devices": 1, "trainer.max_steps": 40}
        values |= {"run-dir": run} | changes
        command = [sys.executable, "-m", "train.cli", *kept]
        command += [f"--{name}={value}" for name, value in values.items()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return read_curves(run)["train/loss"][1]

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stu_generate_uses_the_first_device_by_default(dtype, tokenizer, tmp_path):
    pytest.importorskip("jsonargparse")
    from serve.batch import cli as batch

    save_model(tmp_path / "model", build("hybrid").to(getattr(torch, dtype)), tokenizer)
    rows = [{"id": str(number), "prompt": "a cat " * number} for number in range(1, 20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    options = [f"--dtype={dtype}", "--max-new-tokens=40"]
    assert batch.main([str(tmp_path / "model"), *files, *options]) == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)
    assert not any("error" in json.loads(line) for line in lines)
