"""Memory, speed and advice of `stu-plan`, against counts of another kind."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stu.config import ModelConfig
from stu.mixers import planned_mixers
from stu.model import FlashSTU
from train import loss
from train.flops import matrix_share, num_parameters, token_flops
from train.gpus import GPUS, known_gpu
from train.optimizer import OPTIMIZERS
from train.parallel.config import ParallelConfig
from train.plan import activations as counting
from train.plan import cli as plan
from train.plan.activations import RankStep, activation_bytes, fft_bytes, slice_bytes, step_memory
from train.plan.costs import step_seconds, update_bytes
from train.plan.memory import rank_memory
from train.plan.serving import Decoding, evaluation_bytes
from train.tasks.whole_model import room

SMALL = ModelConfig(vocab_size=500, width=64, num_layers=4, max_seq_len=256, window_tokens=32)


def activations(config=SMALL, seq_len=256, micro_batch=2, **parallel):
    settings = ParallelConfig(**parallel)
    return activation_bytes(config, RankStep(seq_len, micro_batch, settings))


@pytest.mark.slow
def test_activations_grow_with_micro_batch_and_layers():
    one, two, four = (activations(micro_batch=size) for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    six, eight = (activations(replace(SMALL, num_layers=count)) for count in (6, 8))
    assert eight - six == pytest.approx(six - two, rel=0.05)
    assert activations(checkpoint_activations=True) < 0.6 * two


@pytest.mark.parametrize(
    ("layout", "num_layers", "vocab_size", "recomputes", "kind"),
    [
        ("hybrid", 7, 300, False, "ddp"),
        pytest.param(
            "hybrid", 8, 20_000, True, "ddp", marks=pytest.mark.slow
        ),  # the embedding's gradient is the most
        ("hyena", 4, 300, False, "zero"),
    ],
)
def test_counting_two_periods_and_few_rows_equals_counting_all(
    monkeypatch, layout, num_layers, vocab_size, recomputes, kind
):
    config = replace(SMALL, layout=layout, num_layers=num_layers, vocab_size=vocab_size)
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * vocab_size * 30)
    settings = ParallelConfig(kind=kind, checkpoint_activations=recomputes)
    arguments = config, RankStep(128, 2, settings, is_half=not recomputes)
    counted = activation_bytes(*arguments)
    monkeypatch.setattr(counting, "LOSS_CHUNKS", 1000)
    assert counted == pytest.approx(step_memory(*arguments).peak, abs=64)  # single numbers
    with torch.device("meta"):
        assert num_parameters(config) == FlashSTU(config).num_parameters()


@pytest.mark.parametrize("layout", ["hybrid", "hyena", "attention"])
def test_activations_include_what_is_saved_for_the_backward_pass(layout):
    """Saved tensors are counted one by one in a real pass."""
    config = replace(SMALL, layout=layout)
    model = FlashSTU(config)
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(2, 256, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(tokens)
    assert sum(saved.values()) < activations(config) < 2 * sum(saved.values())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(replace(SMALL, layout="hyena"), marks=pytest.mark.slow),
        replace(SMALL, layout="stu", num_layers=2),
        pytest.param(SMALL, marks=pytest.mark.slow),
    ],
    ids=lambda config: config.layout,
)
def test_slices_divide_activations(config):
    """Each rank also holds keys before its slice, states, and Hyena's network for all lags."""
    long = replace(config, max_seq_len=4096)
    whole, half, quarter = (activations(long, 4096, context=count) for count in (1, 2, 4))
    assert whole / 2 < half < 0.6 * whole
    assert whole / 4 < quarter < 0.36 * whole


def test_bytes_between_slices_do_not_grow_with_the_length():
    sizes = {
        layout: [
            slice_bytes(replace(SMALL, layout=layout, max_seq_len=2048), length, 2, 4, False)
            for length in (1024, 2048)
        ]
        for layout in ("stu", "attention", "hyena")
    }
    states = 3 * 2 * 64 * 64 * 4 * 2  # two phases, rank x width, for 3 other ranks in both passes
    assert sizes["stu"] == [4 * states] * 2
    keys = 2 * 2 * 32 * 64 * 4 * 2  # window x width, to one rank in each pass
    assert sizes["attention"] == [4 * keys] * 2
    assert sizes["hyena"][1] == pytest.approx(2 * sizes["hyena"][0], rel=0.01)


@pytest.mark.parametrize("is_half", [False, True])
def test_stages_divide_weights_gradients_and_optimizer(is_half):
    count = num_parameters(SMALL)
    held = [
        rank_memory(
            SMALL, ParallelConfig(kind="zero", zero_stage=stage), 8, 0, is_half, True, state_bytes=8
        )
        for stage in range(4)
    ]
    width = 2 if is_half else 4
    filters = 4 * SMALL.max_seq_len * SMALL.num_filters
    assert [memory.weights - filters for memory in held[:3]] == [width * count] * 3
    assert held[3].weights - filters == pytest.approx(width * count / 8, rel=0.01)
    assert [memory.gradients for memory in held[:2]] == [width * count] * 2
    assert held[2].gradients == held[3].gradients == pytest.approx(width * count / 8, rel=0.01)
    assert held[1].optimizer == held[3].optimizer == pytest.approx(12 * count / 8, rel=0.01)
    assert held[0].optimizer == (12 if is_half else 8) * count


@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_lion_takes_half_the_state_of_adamw(kind):
    parallel = ParallelConfig(kind=kind, zero_stage=3 if kind == "zero" else 1)
    adamw, lion = (
        rank_memory(SMALL, parallel, 4, 0, False, True, OPTIMIZERS[name].state_bytes(0.5)).optimizer
        for name in ("adamw", "lion")
    )
    weights = 4 if kind == "zero" else 0  # DeepSpeed keeps its own copy of them
    assert (4 + weights) * adamw == pytest.approx((8 + weights) * lion)


@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_muon_keeps_one_moment_of_matrices_and_exchanges_their_updates(kind):
    parallel, count = ParallelConfig(kind=kind, zero_stage=1), num_parameters(SMALL)
    with torch.device("meta"):
        model = FlashSTU(SMALL)
    in_matrices = sum(model.get_parameter(name).numel() for name in model.linear_maps)
    assert 0.5 * count < in_matrices < count
    share = matrix_share(SMALL)
    adamw, muon = (
        rank_memory(SMALL, parallel, 4, 0, False, True, OPTIMIZERS[name].state_bytes(share))
        for name in ("adamw", "muon")
    )
    divided = 1 if kind == "ddp" else 4
    saved = 4 * in_matrices / divided
    assert adamw.optimizer - muon.optimizer == pytest.approx(saved, rel=1e-3)
    expected = 2 * in_matrices * 3 / 4 * (1 if kind == "ddp" else 2 / 4)
    assert update_bytes(SMALL, parallel, 4) == pytest.approx(expected)


@pytest.mark.parametrize("layout", ["hyena", "attention"])
def test_model_without_stu_holds_no_filters(layout):
    config = replace(SMALL, layout=layout)
    memory = rank_memory(config, ParallelConfig(), 1, 0, is_half=False, on_gpu=True, state_bytes=8)
    assert memory.weights == 4 * num_parameters(config)


def test_fsdp_divides_all_but_its_buffers():
    one, eight = (
        rank_memory(SMALL, ParallelConfig(kind="fsdp"), ranks, 0, True, True, state_bytes=8)
        for ranks in (1, 8)
    )
    count = num_parameters(SMALL)
    assert one.total - one.buffers - 4 * SMALL.max_seq_len * SMALL.num_filters == 16 * count
    assert one.total - eight.total == pytest.approx(16 * count * 7 / 8, rel=1e-3)


def test_ffts_work_in_spectra_and_padded_copies():
    """Of twice the padded length: two spectra and a padded copy, or the inverse transforms."""
    config = replace(SMALL, layout="stu")
    sequences = 2 * 2 * config.width  # phases, micro-batch
    padded = 4 * 256 * sequences  # bytes; each phase has 128 positions
    assert 2.5 * padded < fft_bytes(config, 256, 2) < 4.5 * padded
    assert fft_bytes(config, 256, 4) == pytest.approx(2 * fft_bytes(config, 256, 2), rel=0.1)
    assert fft_bytes(replace(SMALL, layout="attention"), 256, 2) == 0


def test_flops_of_dense_layers_and_attention():
    """The usual count is six for each weight and token."""
    flops = token_flops(SMALL, 256, 2, recomputes=False)
    assert flops.dense == 6 * num_parameters(SMALL)
    assert flops.attention == pytest.approx(2 * 3.5 * 4 * 64 * 32, rel=0.1)
    again = token_flops(SMALL, 256, 2, recomputes=True)
    head = SMALL.vocab_size * SMALL.width
    assert again.dense == 8 * (num_parameters(SMALL) - head) + 6 * head


def test_flops_of_other_mixers():
    """Attention has no FFTs. Hyena has half as many as STU, of twice the length, and computes its
    filters once for a batch."""
    stu, hyena, attention = (
        replace(SMALL, layout=layout) for layout in ("stu", "hyena", "attention")
    )
    flops = token_flops(attention, 256, 2, recomputes=False)
    assert flops.convolution == 0
    assert flops.dense == 6 * num_parameters(attention)
    assert flops.attention == pytest.approx(4 * 3.5 * 4 * 64 * 32, rel=0.1)
    assert token_flops(hyena, 256, 2, recomputes=False).attention == 0
    fft_stu, fft_hyena = (
        token_flops(config, 256, 64, False).convolution for config in (stu, hyena)
    )
    assert fft_hyena / fft_stu == pytest.approx(9 / 8, rel=0.02)  # log2 of 512 and of 256
    network = 4 * (33 * 64 + 2 * 64 * 64 + 3 * 64 + 64 + 64 * 64 + 64)
    made = planned_mixers(hyena)[0].filter_modules
    assert 4 * sum(p.numel() for module in made for p in module.parameters()) == network
    for batch in (1, 2, 8):
        dense = token_flops(hyena, 256, batch, recomputes=False).dense
        assert dense == 6 * (num_parameters(hyena) - network + network / batch)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
def test_evaluation_takes_a_copy_of_the_model_and_caches(layout, precision):
    config, is_half = replace(SMALL, layout=layout), precision == "bf16-mixed"
    with torch.device("meta"):
        model = FlashSTU(config)
    with FakeTensorMode():
        model.filters = torch.empty(model.filters.shape, device="cuda")
        copied = sum(t.nbytes for t in room(SimpleNamespace(precision=precision), model).values())
    rank = None if layout == "hyena" else 8
    own = Decoding(config, 256, 1, 1, 16 if is_half else 32, rank)
    planned = evaluation_bytes(config, is_half, 0.5, rows=8)
    assert planned == copied + 2**29 + own.other_bytes(8)
    memory = rank_memory(config, ParallelConfig(), 1, 2**30, is_half, True, state_bytes=8)
    assert replace(memory, evaluation=planned).total == memory.total
    larger = replace(memory, evaluation=2**31)
    assert larger.total == memory.total + 2**30


def test_run_whose_evaluation_does_not_fit(settings, capsys, monkeypatch):
    monkeypatch.setattr("train.plan.fits.activation_bytes", lambda *_: 2**20)
    given = ["--gpus", "1", "--gpu", "a100-40g", *settings, "--evaluation.cache_gib=38"]
    assert plan.main(given) == 0
    assert "evaluation" not in capsys.readouterr().out
    assert plan.main([*given, "--evaluation.tasks=recall"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "an evaluation on tasks, 38." in printed
    assert "The run alone would: lower evaluation.cache_gib" in printed


def test_ranks_of_one_node_exchange_by_its_links():
    config = ModelConfig(vocab_size=1000, width=64, num_layers=2, num_heads=4, max_seq_len=64)
    work = config, GPUS["h100-80g"], ParallelConfig(), 64, 1, 1, 8
    alone = step_seconds(*work[:-1], 1, 1)
    within, between = (step_seconds(*work, nodes) - alone for nodes in (1, 2))
    gpu = GPUS["h100-80g"]
    ratio = gpu.link_bytes_per_second / gpu.network_bytes_per_second
    assert between / within == pytest.approx(ratio)


def test_run_that_fits(settings, capsys):
    assert plan.main(["--nodes", "2", "--gpus", "4", "--gpu", "a100-40g", *settings]) == 0
    shown = capsys.readouterr().out
    assert "GiB on each of 8 a100-40g" in shown
    assert re.search(r"tokens per second, [\d.]+ days", shown.replace("\n", " "))


@pytest.mark.slow
def test_plan_of_divided_sequences(settings, capsys):
    assert plan.main(["--gpus", "8", *settings, "--parallel.context=4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "16 tokens x 2 on 4 ranks" in shown
    assert "64 tokens per step" in shown  # two groups of ranks, micro-batches of two samples
    assert plan.main(["--gpus", "6", *settings, "--parallel.context=4"]) == 2
    assert "a divisor of the number of ranks (6 ranks)" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_follows_the_precision(settings, capsys):
    """The default is float32, as in `stu-train`."""
    totals = {}
    for name, more in {"float32": [], "bfloat16": ["--trainer.precision=bf16-mixed"]}.items():
        large = ["--model.config.width=512", "--data.micro_batch_size=512"]  # more than weights
        assert plan.main(["--gpus", "1", *settings, *large, *more]) == 0
        shown = capsys.readouterr().out
        assert f"{name}; 73.6 are usable" in " ".join(shown.split())
        assert ("float32 is slower" in shown) == (name == "float32")
        totals[name] = float(re.search(r"ddp <-.*", shown)[0].split("\u2502")[7])
    assert totals["float32"] > 1.2 * totals["bfloat16"]


def test_advice_for_a_run_that_does_not_fit_fits(settings, capsys):
    large = {"layout": "stu", "width": 6144, "num_layers": 4, "mlp_ratio": 12}
    large |= {"num_heads": 8, "max_seq_len": 8192, "vocab_size": 200_064, "num_filters": 24}
    given = [*settings, *(f"--model.config.{name}={value}" for name, value in large.items())]
    given += ["--data.seq_len=8192", "--trainer.precision=bf16-mixed", "--data.dir=/not/yet"]
    assert plan.main(["--gpus", "8", "--gpu", "l40s-48g", *given]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    advice = re.search(r"This would: zero (\d), micro-batch (\d+)(.*)\.", shown)
    assert advice, shown
    again = ["--parallel.kind=zero", f"--parallel.zero_stage={advice[1]}"]
    again += [f"--data.micro_batch_size={advice[2]}"]
    if "checkpoint_activations" in advice[3]:
        again.append("--parallel.checkpoint_activations=true")
    assert plan.main(["--gpus", "8", "--gpu", "l40s-48g", *given, *again]) == 0


def test_unknown_machine_gets_only_a_check_of_the_settings(settings, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan.main(["--gpu", "this", *settings]) == 0
    assert "the settings are valid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80g"),
        ("NVIDIA H200", 139.8, "h200-141g"),
        ("NVIDIA GH200 480GB", 95.1, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA T4", 15, None),
    ],
)
def test_gpus_are_identified_by_name_and_memory(monkeypatch, name, gib, known):
    properties = SimpleNamespace(name=name, total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert known_gpu(torch.device("cuda", 0)) == known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.dir=/nowhere", "--model.config.vocab_size=0"], "/nowhere: no index.json"),
        (["--model.config.vocab_size=9999"], "=9999, but the token shards were made with"),
    ],
)
def test_wrong_data_is_named(settings, capsys, arguments, message):
    assert plan.main([*settings, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("layout", [pytest.param("hybrid", marks=pytest.mark.slow), "hyena"])
def test_documents_kept_apart_take_a_little_more(layout):
    """Their inputs are padded where a mixer keeps them for the backward pass."""
    config = ModelConfig(vocab_size=50, width=64, num_layers=4, num_heads=2, layout=layout)
    together, apart = (
        activation_bytes(config, RankStep(1024, 2, ParallelConfig(), is_apart=is_apart))
        for is_apart in (False, True)
    )
    assert together < apart < 1.3 * together
