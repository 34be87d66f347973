"""Claims of the README, and how they are measured anew."""

import json
import sys

import pytest

from benchmarks import claims, evidence
from benchmarks.claims import CLAIMS, CURVES, Claim
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


def test_every_claim_holds_for_what_is_recorded():
    results = recorded()
    for claim in CLAIMS:
        figure = claim.figure(results[claim.benchmark])
        assert claim.holds(figure), (claim.text, figure)


def test_every_claim_has_one_bound_and_is_measured_anew():
    for claim in CLAIMS:
        assert (claim.at_least is None) != (claim.at_most is None), claim.text
        assert claim.benchmark in evidence.QUICK, claim.text


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
    assert capsys.readouterr().out.count("holds: ") == len(CLAIMS)
    loss = recorded()["loss"]
    loss["runs"][-1]["memory_ratio"] = 4.9
    recorded_benchmark(monkeypatch, {"loss": loss})
    assert evidence.main(["--folder", str(tmp_path / "bad")]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "NOT" in line]
    assert len(failed) == 1
    assert "memory of whole logits over ours: 4.9 (at least 5)" in failed[0]


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


def test_claims_are_about_the_figures_that_they_name():
    def run(cache, step, convolution):
        head = {"layout": "stu", "mlp_ratio": 4, "batch": 8, "new_tokens": 8192, "threads": 1}
        return head | {
            "cache": cache,
            "step_over_ours": step,
            "convolution_over_ours": convolution,
        }

    machine = {"date": "2026-01-02T03:04", "commit": 40 * "f"}
    results = {
        "decode": {"runs": [run("ours", 1, 1), run("naive", 2.5, 33.0), run("epoched", 1.2, 3.5)]},
        "model": {"largest_error": dict.fromkeys(CURVES, 0.05) | {"s4": 0.15, "ours": 0.1}},
        "convolution": {"runs": [{"threads": 1, "training": [{"ratio": 6.5}, {"ratio": 9.0}]}]},
        "train": {"runs": [{"threads": 1, "ratios": {"stu_over_two_branch": 1.6}}]},
        "loss": {"runs": [{"memory_ratio": 7.0, "speed_ratio": 1.1}] * 2},
        "memory": {"runs": [{"planned_over_measured": ratio} for ratio in (0.92, 1.03)]},
        "load": {"runs": [{"threads": 1, "overhead_share": 0.04}]},
    }
    for result in results.values():
        result["machine"] = machine
    lines = claims.claims(results).splitlines()[2:]
    figures = [line.split(" | ")[1] for line in lines]
    assert figures == ["33", "2.5", "3.5", "0.15", "6.5", "1.6", "7", "1.1", "0.08", "0.04"]
    assert all(line.endswith(", 2026-01-02, fffffff |") for line in lines)


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
