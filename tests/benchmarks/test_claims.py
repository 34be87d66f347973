"""Claims about speed and memory, and how they are measured anew."""

import json
import sys

import pytest

from benchmarks import comparisons, evidence
from benchmarks.claims import CLAIMS, CURVES, Claim
from benchmarks.comparisons import COMPARISONS, OURS, Comparison
from benchmarks.recorded import Run, recorded
from tests import forked


def test_claims_hold_within_their_bounds():
    least = Claim("speed", "x", lambda result: result["figure"], at_least=2)
    most = Claim("error", "x", lambda result: result["figure"], at_most=0.2)
    assert [least.holds(figure) for figure in (1.9, 2.0, 3.0)] == [False, True, True]
    assert [most.holds(figure) for figure in (0.1, 0.2, 0.3)] == [True, True, False]
    assert not least.holds(float("nan"))
    assert not most.holds(float("nan"))
    assert (least.bound(), most.bound()) == ("at least 2", "at most 0.2")


EVERY = [*(row.claim() for row in COMPARISONS), *CLAIMS]


def test_every_claim_holds_for_what_is_recorded():
    results = recorded()
    for claim in EVERY:
        figure = claim.figure(results[claim.benchmark])
        assert claim.holds(figure), (claim.text, figure)


def test_every_claim_has_one_bound_and_is_measured_anew():
    for claim in EVERY:
        assert (claim.at_least is None) != (claim.at_most is None), claim.text
        assert claim.benchmark in {name for name, _ in evidence.QUICK}, claim.text


@pytest.fixture
def forked_python(monkeypatch):
    """Let benchmarks run in forks of a process that has imported torch."""
    monkeypatch.setattr(sys, "executable", forked.python())


def recorded_benchmark(monkeypatch, changed: dict[str, Run]):
    """Replace measuring by the recorded results."""
    results = recorded() | changed

    def measure(name, options, folder):
        (folder / f"{name}.json").write_text(json.dumps(results[name]))

    monkeypatch.setattr(evidence, "measure", measure)


def test_a_claim_that_does_not_hold_fails_and_is_named(tmp_path, monkeypatch, capsys):
    recorded_benchmark(monkeypatch, {})
    assert evidence.main(["--folder", str(tmp_path / "good")]) == 0
    assert capsys.readouterr().out.count("holds: ") == len(EVERY)
    loss = recorded()["loss"]
    loss["runs"][-1]["memory_ratio"] = 4.9
    recorded_benchmark(monkeypatch, {"loss": loss})
    assert evidence.main(["--folder", str(tmp_path / "bad")]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "NOT" in line]
    assert len(failed) == 1
    assert "memory of full logits over ours: 4.9 (at least 5)" in failed[0]


def test_claim_without_its_run_does_not_hold(tmp_path, monkeypatch, capsys):
    decode = recorded()["decode"]
    for run in decode["runs"]:
        if run["cache"] == "naive":
            for name in ("step_over_ours", "convolution_over_ours"):
                run.pop(name, None)
    recorded_benchmark(monkeypatch, {"decode": decode})
    assert evidence.main(["--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("DOES NOT HOLD") == 2


@pytest.mark.parametrize("missing", ["ours", "llama"])
def test_the_cost_model_is_held_to_every_cache_and_peer(missing, tmp_path, monkeypatch, capsys):
    model = recorded()["model"]
    del model["largest_error"][missing]
    recorded_benchmark(monkeypatch, {"model": model})
    assert evidence.main(["--folder", str(tmp_path)]) == 1
    assert "DOES NOT HOLD: cost model of decoding" in capsys.readouterr().out


def test_peers_that_are_not_installed_are_said_to_be_left_out(tmp_path, monkeypatch, capsys):
    peers = recorded()["peers"]
    peers["runs"] = [run for run in peers["runs"] if run["program"] in OURS]
    recorded_benchmark(monkeypatch, {"peers": peers})
    assert evidence.main(["--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    left_out = sum(row.benchmark == "peers" for row in COMPARISONS)
    assert printed.count("not known: ") == left_out > 1
    assert printed.count("holds: ") == len(EVERY) - left_out
    assert "ratio to the best peer: llama.cpp, F32 was not measured" in printed


def test_a_ratio_to_a_weaker_peer_is_not_held(tmp_path, monkeypatch, capsys):
    peers = recorded()["peers"]
    for run in peers["runs"]:
        if (run["program"], run.get("batch")) == ("vllm_int8", 32):
            run["program"] = "failed"
    recorded_benchmark(monkeypatch, {"peers": peers})
    assert evidence.main(["--folder", str(tmp_path)]) == 0
    (unknown,) = [line for line in capsys.readouterr().out.splitlines() if "not known" in line]
    assert unknown.startswith("not known: decode 32 sequences at ")
    assert unknown.endswith(": vLLM, int8 was not measured")


def test_a_peer_that_did_not_fit_is_named(tmp_path, monkeypatch, capsys):
    decode = recorded()["decode"]
    for number, run in enumerate(decode["runs"]):
        if run["cache"] == "s4":
            named = ("layout", "batch", "new_tokens", "cache", "threads")
            kept = {name: run[name] for name in named}
            decode["runs"][number] = kept | {"not_run": "does not fit: .."}
    recorded_benchmark(monkeypatch, {"decode": decode})
    assert evidence.main(["--folder", str(tmp_path)]) == 0
    unknown = [line for line in capsys.readouterr().out.splitlines() if "not known" in line]
    assert [line.endswith(": S4D was not measured") for line in unknown] == [True, True]


def test_ours_that_is_missing_does_not_hold(tmp_path, monkeypatch, capsys):
    peers = recorded()["peers"]
    peers["runs"] = [run for run in peers["runs"] if run["program"] not in OURS]
    recorded_benchmark(monkeypatch, {"peers": peers})
    assert evidence.main(["--folder", str(tmp_path)]) == 1
    rows = sum(row.benchmark == "peers" for row in COMPARISONS)
    assert capsys.readouterr().out.count("DOES NOT HOLD") == rows


def rounds(**figures):
    return {name: {"0": own} if isinstance(own, float) else own for name, own in figures.items()}


def test_comparisons_are_with_the_best_peer():
    result = rounds(ours=6.0, rwkv=8.0, s4=4.0)
    more = Comparison("speed", "decode", lambda result: result, 1, ("s4", "mamba2"))
    less = Comparison("memory", "decode", lambda result: result, 1, (), less_is_better=True)
    assert more.best(result, ours=False) == (8.0, "rwkv")
    assert less.best(result, ours=False) == (4.0, "s4")
    assert more.best(result | rounds(ours_int8=7.0), ours=True) == (7.0, "ours_int8")
    assert more.ratio(result) == 6 / 8
    assert less.ratio(result) == 4 / 6
    assert comparisons.times(more, result) == "0.75 (peer is better)"
    assert comparisons.times(more, rounds(ours=3.0, s4=2.0)) == "1.5"
    assert more.missing(result) == ["mamba2"]
    with pytest.raises(KeyError):
        more.ratio(rounds(s4=1.0))
    with pytest.raises(IndexError):
        more.ratio(rounds(ours=1.0))


def test_ratios_have_the_range_of_the_rounds_that_both_have():
    more = Comparison("speed", "decode", lambda result: result, 1, ())
    ours = {"0": 6.0, "1": 8.0, "2": 7.0, "3": 100.0}
    result = rounds(ours=ours, s4={"0": 8.0, "1": 4.0, "2": 7.0})
    assert sorted(more.ratios(result)) == [0.75, 1, 2]
    assert comparisons.times(more, result) == "1.07 (0.75 to 2)", "of the medians, 7.5 and 7"
    assert (
        comparisons.times(more, rounds(ours=2.0, s4={"0": 4.0, "1": 2.0}))
        == "0.667 (peer is better)"
    )


def test_comparisons_are_about_the_figures_that_they_name():
    def program(name, speed, prefill, **others):
        setting = {"part": "decode", "context": 2048, "batch": 1}
        return (
            setting
            | {
                "program": name,
                "speed_by_round": {"0": speed},
                "prefill_seconds": prefill,
            }
            | others
        )

    server = {"part": "serve", "clients": 64}
    peers = [
        program("ours", 9, 10.24),
        program("vllm", 8, 2.048),
        program("llama_cpp_f32", 6, 20.48),
        program("ours_bf16", 12, 1.024),
        program("llama_cpp_bf16", 16, 4.096),
        program("llama_cpp_q8_0", 99, 4.096),
        program("ours_int8", 33, 1.28),
        program("ours", 90, 1, batch=32),
        program("llama_cpp_bf16", 30, 1, batch=32),
        program("ours_int8", 5, 1, batch=32),
        program("llama_cpp_q8_0", 50, 1, batch=32),
        program("vllm", 999, 1, context=512),
        server | {"program": "ours_int8", "speed_by_round": {"0": 70.0}},
        server | {"program": "ours", "speed_by_round": {"0": 60.0}},
        server | {"program": "vllm_bf16", "speed_by_round": {"0": 35.0}},
        server | {"program": "vllm", "speed_by_round": {"0": 99.0}, "clients": 8},
    ]
    model = {"layout": "stu", "batch": 8, "new_tokens": 8192, "threads": 1}
    decode = [
        model | {"cache": name, "step_ms_by_round": [8e3 / speed], "cache_bytes": mib * 2**23}
        for name, speed, mib in [("ours", 20, 6), ("naive", 1, 99), ("s4", 10, 2), ("llama", 99, 1)]
    ]
    ways = {"stu": 3.0, "stu_two_branch": 2.0, "attention_sdpa": 4.0, "attention_windowed": 1.0}
    ways["hybrid"] = 9.0
    train = {"threads": 1, "ways": {name: {"tokens_per_second": ways[name]} for name in ways}}
    learned = [
        {"text": text, "context": context, "layout": layout, "optimizer": optimizer}
        | {"seed": seed, "bits_per_byte": bits}
        for text, context, layout, optimizer, seed, bits in [
            ("code", 512, "stu", "adamw", 0, 3.0),
            ("code", 512, "hybrid", "adamw", 0, 2.0),
            ("code", 512, "hybrid", "adamw", 1, 3.0),
            ("code", 512, "rope", "adamw", 0, 2.0),
            ("code", 512, "hyena", "adamw", 0, 4.0),
            ("code", 512, "hybrid", "muon", 0, 1.0),
            ("code", 4096, "hybrid", "adamw", 0, 1.0),
            ("prose", 512, "hybrid", "adamw", 0, 1.0),
        ]
    ]
    results = {
        "peers": {"runs": peers},
        "decode": {"runs": decode},
        "train": {"runs": [train]},
        "quality": {"runs": learned},
    }
    for result in results.values():
        result["machine"] = {"date": "2026-01-02T03:04", "commit": 40 * "f"}
        result["machine"] |= {"processor": "Intel(R) Xeon(R) Processor", "cpu_capability": "AVX2"}
    lines = comparisons.comparisons(results).splitlines()[2:]
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["9, float32", "8, vLLM, float32", "1.12"],
        ["12, bfloat16", "16, llama.cpp, BF16", "0.75 (peer is better)"],
        ["33, int8", "99, llama.cpp, Q8_0", "0.333 (peer is better)"],
        ["90, float32", "50, llama.cpp, Q8_0", "1.8"],
        ["2,000, bfloat16", "1,000, vLLM, float32", "2"],
        ["70, int8", "35, vLLM, bfloat16", "2"],
        ["20, float32", "10, S4D", "2"],
        ["6, float32", "2, S4D", "0.333 (peer is better)"],
        ["3", "4, attention", "0.75 (peer is better)"],
        ["2.5, hybrid", "2, attention, RoPE", "0.8 (peer is better)"],
    ]
    assert lines[0].endswith("| `peers`, Intel Xeon, AVX2, 2026-01-02, fffffff |")


def test_the_readme_compares_in_at_most_ten_rows():
    assert len(COMPARISONS) <= 10


def test_claims_are_about_the_figures_that_they_name():
    def run(cache, step, convolution):
        head = {"layout": "stu", "mlp_ratio": 4, "batch": 8, "new_tokens": 8192, "threads": 1}
        return head | {
            "cache": cache,
            "step_over_ours": step,
            "convolution_over_ours": convolution,
        }

    results = {
        "decode": {"runs": [run("ours", 1, 1), run("naive", 2.5, 33.0), run("epoched", 1.2, 3.5)]},
        "model": {"largest_error": dict.fromkeys(CURVES, 0.05) | {"s4": 0.15, "ours": 0.1}},
        "convolution": {"runs": [{"threads": 1, "training": [{"ratio": 6.5}, {"ratio": 9.0}]}]},
        "loss": {"runs": [{"memory_ratio": 7.0, "speed_ratio": 1.1}] * 2},
        "memory": {"runs": [{"planned_over_measured": ratio} for ratio in (0.92, 1.03)]},
        "load": {"runs": [{"threads": 1, "overhead_share": 0.04}]},
    }
    figures = [comparisons.shown(claim.figure(results[claim.benchmark])) for claim in CLAIMS]
    assert figures == ["33", "2.5", "3.5", "0.15", "6.5", "7", "1.1", "0.08", "0.04"]


@pytest.mark.usefixtures("forked_python")
def test_a_benchmark_that_fails_leaves_no_result_and_names_its_log(tmp_path):
    (tmp_path / "decode.json").write_text('{"runs": "damaged"')
    with pytest.raises(SystemExit, match=r"model failed: see .*model\.log"):
        evidence.measure("model", ["--decode", "[decode.json]"], tmp_path)
    assert not (tmp_path / "model.json").exists()
    assert "error: decode.json: not JSON (" in (tmp_path / "model.log").read_text()


@pytest.mark.usefixtures("forked_python")
def test_a_benchmark_writes_its_result_where_it_is_looked_for(tmp_path):
    runs = recorded()["decode"]["runs"][:1]
    decoded = {"machine": {"commit": "of the decoding"}, "runs": runs}
    (tmp_path / "decode.json").write_text(json.dumps(decoded))
    evidence.measure("model", ["--decode", "[decode.json]"], tmp_path)
    result = recorded(tmp_path)["model"]
    assert result["measured_on"] == [decoded["machine"]]
    assert [curve["cache"] for curve in result["curves"]] == ["ours"]
    assert not list(tmp_path.glob("*.part"))
