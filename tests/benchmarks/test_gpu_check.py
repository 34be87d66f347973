"""The check of a GPU runs whole on a CPU, without packages that a GPU machine may lack."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import correctness, run_part
from benchmarks.gpu_check.llama import LlamaLike
from benchmarks.gpu_check.measuring import energy
from benchmarks.gpu_check.peer import make_peer
from benchmarks.gpu_check.sizes import full_sizes, tiny_sizes
from benchmarks.recorded import ROOT
from stu.config import ModelConfig
from stu.model import FlashSTU

MISSING = ("jsonargparse", "docstring_parser", "platformdirs", "pydantic", "fastapi", "llguidance")
MISSING += ("deepspeed", "uvicorn")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def without_packages(tmp_path, monkeypatch):
    (tmp_path / "blocker").mkdir()
    (tmp_path / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocker"))


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu(without_packages, tmp_path, capfd):
    output = tmp_path / "check.json"
    options = ["--device", "cpu", "--sizes", "tiny", "--output", str(output), "--minutes", "30"]
    assert gpu_check.main(options) == 0, capfd.readouterr().err
    result = json.loads(output.read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert list(result["parts"]) == list(gpu_check.PARTS)
    printed = capfd.readouterr()
    for name, part in result["parts"].items():
        assert part["measures"], name
        for row in part["measures"]:
            assert row["setting"] in printed.out
            assert row["setting"] in printed.err
    rows = {
        name: {row["setting"]: row for row in part["measures"]}
        for name, part in result["parts"].items()
    }
    assert rows["kernels"]["test_near_field"]["passed"] > 0
    assert rows["correctness"]["test_bfloat16_stays_near_float64"]["passed"] >= 0
    assert rows["captured"]["stu-2.7b, batch 3"]["times_reading"] > 0
    assert rows["eager"]["hybrid-550m, batch 2"]["times_reading"] > 0
    assert rows["peer"]["size of stu-2.7b, batch 3"]["step_ms"] > 0
    assert rows["prefill"]["peer of hybrid-2.7b"]["prefill_seconds"] > 0
    quality = rows["weights"]["bits per byte"]
    assert 4 < quality["float"] < 9
    assert abs(quality["int8_increase"]) < 0.05
    assert rows["weights"]["product of 32 x 32, 3 rows"]["int8_us"] > 0
    assert rows["weights"]["stu-2.7b, int8, batch 3"]["times_reading"] > 0
    for name in ("add_norm", "gated_product", "near_field"):
        assert rows["compiled"][name]["largest_difference"] < 1e-6
        assert rows["compiled"][name]["compiled_us"] > 0
    shares = rows["training"]["hybrid-2.7b, defaults"]["shares"]
    assert all(0 < share < 1 for share in shares.values())
    assert sum(shares.values()) < 1


def test_what_fails_leaves_its_traceback_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def measures(device, sizes):
        yield "good", lambda: {"step_ms": 1.5}
        yield "bad", lambda: 1 / 0
        yield "good again", lambda: {"step_ms": 2.5}
        raise KeyError("between two measures")

    monkeypatch.setattr("benchmarks.gpu_check.prefill.measures", measures)
    file = tmp_path / "part.json"
    run_part.main("prefill.measures", "cpu", "tiny", str(file), str(tmp_path / "trace"), "60")
    result = json.loads(file.read_text())
    assert [row["setting"] for row in result["measures"]] == ["good", "bad", "good again"]
    assert "ZeroDivisionError" in result["measures"][1]["error"]
    assert result["measures"][2]["step_ms"] == 2.5
    assert "between two measures" in result["error"]
    assert len(gpu_check.errors(result)) == 2
    shown = gpu_check.tables({"parts": {"prefill": result}})
    assert "| bad |" in shown
    assert "ZeroDivisionError: division by zero |" in shown
    assert "prefill FAILED" in shown


def test_a_part_that_takes_too_long_leaves_its_figures_and_where_it_was(tmp_path, capfd):
    """Importing torch takes longer than the limit."""
    output = tmp_path / "check.json"
    options = ["--device", "cpu", "--only", "captured", "--minutes", "0.02"]
    assert gpu_check.main([*options, "--output", str(output)]) == 1
    (captured,) = json.loads(output.read_text())["parts"].values()
    # Another thread writes the calls down while Python runs, which may end them early.
    assert re.search(r"ended with -?\d+ after", captured["error"])
    assert "Timeout (0:00:01)!" in captured["error"]
    assert "most recent call first" in captured["error"]
    assert "captured FAILED" in capfd.readouterr().out


def test_parts_share_the_time_that_is_left(tmp_path, monkeypatch):
    """A part gets its share of what earlier ones have left over."""
    now, limits = [0.0], []

    def run(part, options, seconds):
        limits.append(seconds)
        now[0] += 10
        return {"measures": []}

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    shares = {"a": 1, "b": 2, "c": 3}
    parts = {name: gpu_check.Part("", share, "") for name, share in shares.items()}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main(["--minutes", "2", "--output", str(tmp_path / "check.json")]) == 0
    assert limits == [20, 44, 100]
    limits.clear()
    options = ["--only", "b", "--minutes", "1", "--output", str(tmp_path / "check.json")]
    assert gpu_check.main(options) == 0
    assert limits == [60]


def test_the_machine_is_that_of_the_first_part_that_knows_it(tmp_path, monkeypatch):
    """A fault can end a part before it has written anything."""
    parts = iter([{"error": "ended with -6"}, {"machine": {"gpu": "H200"}}, {"machine": {}}])
    monkeypatch.setattr(gpu_check, "run", lambda part, options, seconds: next(parts))
    output = tmp_path / "check.json"
    assert gpu_check.main(["--only", "kernels,captured,sync", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["machine"] == {"gpu": "H200"}


def test_shares_are_seconds_of_a_whole_check():
    assert sum(part.share for part in gpu_check.PARTS.values()) == 8 * 60


def test_parts_beyond_the_limit_of_the_check_are_named(tmp_path):
    output = tmp_path / "check.json"
    options = ["--only", "sync", "--minutes", "0", "--output", str(output)]
    assert gpu_check.main(options) == 1
    parts = json.loads(output.read_text())["parts"]
    assert parts["sync"]["error"] == "no time was left"


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(["--only", "sync,sinc"])
    assert refused.value.code == 2
    assert "sinc: known are kernels, captured, correctness" in capsys.readouterr().err


RUN_ONE_FILE = """
import faulthandler, json, sys
faulthandler.cancel_dump_traceback_later = lambda: print("the limit was disarmed")
from benchmarks.gpu_check.correctness import run_tests
print(json.dumps(run_tests(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_failing_test_is_kept_and_leaves_the_limit_armed(tmp_path):
    file = tmp_path / "test_own.py"
    file.write_text("def test_bad():\n    assert 1 + 1 == 3\n\ndef test_good():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ONE_FILE, str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "disarmed" not in done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert (figures["passed"], figures["failed"]) == (1, 1)
    for text in (figures["error"], done.stderr):
        assert "assert (1 + 1) == 3" in text


def test_all_test_functions_of_cuda_are_run():
    names = correctness.test_functions(correctness.CUDA_TESTS)
    assert len(names) == (ROOT / correctness.CUDA_TESTS).read_text().count("\ndef test_") > 10


class NVMLError(Exception):
    pass


def fail():
    raise NVMLError("Not Supported")


@pytest.mark.parametrize(
    ("pynvml", "reason"),
    [
        (SimpleNamespace(NVMLError=NVMLError, nvmlInit=fail), "Not Supported"),
        (None, "import of pynvml halted; None in sys.modules"),
    ],
)
def test_energy_that_cannot_be_counted_is_said_and_fails_nothing(pynvml, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    assert energy(lambda: None, 1.0) == {"energy_error": reason}
    assert energy(lambda: None, 0.0) == {}, "of tiny sizes"


def test_steps_of_the_peer_continue_its_prefill():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, width=32, num_layers=2, num_heads=2, max_seq_len=40)
    peer = LlamaLike(config, 60_000).double()
    tokens = torch.randint(50, (3, 12))
    whole = [peer.prefill(tokens[:, :n], peer.make_cache(3, 20)) for n in range(7, 13)]
    caches = peer.make_cache(3, 20)
    for keys, values in caches:
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
        values[:, :, 7:] = 0  # a weight of zero does not hide NaN
    torch.testing.assert_close(peer.prefill(tokens[:, :7], caches), whole[0])
    for keys, _ in caches:
        keys[:, :, 7:] = 100.0
    for number, place in enumerate(range(7, 12), 1):
        found = peer.step(tokens[:, place], caches, torch.tensor([place]))
        torch.testing.assert_close(found, whole[number])


def test_layers_of_the_peer_share_what_is_compiled():
    """Once for each batch: else most layers would soon run uncompiled."""
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    config = ModelConfig(vocab_size=50, width=32, num_layers=12, num_heads=2, max_seq_len=40)
    peer = LlamaLike(config, 60_000).requires_grad_(False)
    for layer in peer.layers:
        layer.compile(dynamic=False, backend=count)
    for batch in (1, 3):
        caches = peer.make_cache(batch, 20)
        for place in range(3):
            peer.step(torch.arange(batch), caches, torch.tensor([place]))
    torch.compiler.reset()
    assert len(graphs) == 2


def test_the_peer_is_as_large_as_the_model():
    for name, config in full_sizes().models.items():
        with torch.device("meta"):
            model = FlashSTU(config)
        peer = make_peer(config, "meta")
        count = sum(parameter.numel() for parameter in peer.parameters())
        assert count == pytest.approx(model.num_parameters(), rel=0.01), name
        assert config.head_dim <= 256, "torch has no fast attention for more"


def test_tiny_sizes_have_the_parts_of_full_ones():
    tiny, full = tiny_sizes(), full_sizes()
    assert tiny.models.keys() == full.models.keys()
    assert tiny.training.keys() == full.training.keys() <= full.models.keys()
    assert os.sep not in "".join(full.models)
