"""The documents' tables are what the benchmarks' results say."""

import json
import subprocess

import pytest
import torch

from benchmarks import decoding_tables, tables, train_serve_tables
from benchmarks.decoding import realisation
from benchmarks.recorded import RESULTS, ROOT, recorded, shown
from stu.realisation import LARGEST_ERRORS, RANKS


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_tables_are_those_of_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables.PLACE.search(text) or tables.COMPARISONS.search(text), "no table is left there"
    assert tables.with_tables(text) == text, "run python -m benchmarks.tables"
    assert "e+0" not in text, "a table shows a figure with an exponent"


@pytest.mark.parametrize(
    ("figure", "two", "three"),
    [
        (0.02308, "0.023", "0.0231"),
        (9.996, "10", "10"),
        (99.6, "100", "99.6"),
        (1026, "1,026", "1,026"),
    ],
)
def test_figures_have_two_or_three_digits_and_no_exponent(figure, two, three):
    assert [shown(figure, 2), shown(figure)] == [two, three]


def test_a_result_that_changes_changes_its_table(tmp_path, monkeypatch):
    result = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))
    result["runs"][0]["measured_gib"] = 123.456
    (tmp_path / "memory.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(tables, "recorded", lambda: recorded(tmp_path))
    changed = tables.with_tables("before\n<!-- benchmark memory -->\nold\n<!-- end -->\nafter\n")
    assert "| 123.46 |" in changed
    assert "old" not in changed
    assert changed.startswith("before\n<!--")
    assert changed.endswith("<!-- end -->\nafter\n")


def test_every_result_names_machine_versions_and_commit():
    for path in RESULTS.glob("*.json"):
        machine = json.loads(path.read_text(encoding="utf-8"))["machine"]
        assert {"processor", "torch", "python", "date"} <= machine.keys()
        assert len(machine["commit"]) == 40, path


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_every_result_is_of_a_commit_in_this_history():
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("needs the whole history of a git checkout")
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts = [result["machine"], *result.get("earlier_machines", [])]
        parts += [run for run in result.get("runs", []) if "commit" in run]
        for commit in {part["commit"] for part in parts}:
            done = git("merge-base", "--is-ancestor", commit, "HEAD")
            assert not done.returncode, f"{path.name} is of {commit}: {done.stderr}"


def decode_run(cache, step, convolution, mib, **others):
    run = {"layout": "stu", "mlp_ratio": 4, "batch": 8, "new_tokens": 8192, "threads": 1}
    run |= {"prompt_tokens": 512, "cache": cache, "cache_bytes": mib * 2**20, "step_ms": step}
    run |= {"convolution_share": convolution / step, "step_over_ours": step / 10.0}
    run["step_over_ours_by_round"] = [step / 10.0, step / 8.0, step / 16.0]
    run |= {"convolution_ms": convolution, "tokens_per_second": 8e3 / step} | others
    return run


def rows(text):
    """Return the cells of a table below its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def decode_result():
    adds = {"dense": 7e6, "convolution": 2e6, "fft": 1e6, "total": 10e6}
    moved = {"weights": 11e6, "filters": 2e6, "cache_read": 3e6, "total": 16e6}
    counted = {"multiply_adds_per_token": adds, "bytes_moved_per_token": moved}
    ours = decode_run("ours", 10.0, 1.0, 100, **counted)
    naive = decode_run("naive", 40.0, 30.0, 120, convolution_over_ours=30.0)
    others = [
        decode_run("epoched", 13.0, 4.0, 130),
        decode_run("continuous", 12.0, 3.0, 105),
        decode_run("flashinference", 12.5, 3.5, 145),
    ]
    two_threads = [run | {"threads": 2, "step_ms": 99.0, "convolution_ms": 98.0} for run in others]
    missing = decode_run("naive", 1, 1, 900, batch=32)
    for name in ("step_ms", "convolution_ms", "tokens_per_second", "threads"):
        del missing[name]
    return {"runs": [ours, *two_threads, naive, *others, missing | {"not_run": "does not fit"}]}


def test_decoding_tables_show_the_runs_of_one_thread():
    result = decode_result()
    costs = rows(decoding_tables.decode_costs(result))
    assert costs == [["ours", "7.0", "3.00", "11.0", "5.00"]]
    shares = rows(decoding_tables.decode_shares(result))
    assert shares == [["8, 8,192", "75%", "10.0%", "4.00 (2.50 to 5.00)", "4.00"]]
    peers = rows(decoding_tables.decode_peers(result))
    assert ["direct sums", "32", "does not fit (900)"] in peers
    assert [row[0] for row in peers] == 2 * ["ours", "direct sums"]


def test_tables_of_a_gpu_show_steps_and_their_operations():
    counted = {"operations_per_step": 77}
    runs = [decode_run(name, 10.0, 2.0, 100, **counted) for name in ("ours", "naive")]
    missing = decode_run("naive", 1, 1, 900, batch=64)
    for name in ("step_ms", "convolution_ms", "threads"):
        del missing[name]
    result = {"runs": [*runs, missing | {"not_run": "does not fit"}]}
    assert rows(decoding_tables.gpu_launches(result)) == [["8, 8,192", "10", "77", "10", "77"]]
    assert rows(decoding_tables.gpu_steps(result)) == [
        ["ours", "10 (2)", "-"],
        ["direct sums", "10 (2)", "does not fit"],
    ]


def test_a_table_of_mixers_shows_each_of_them():
    runs = [
        decode_run("ours", 10.0, 1.0, 100),
        decode_run("naive", 40.0, 30.0, 120),
        decode_run("ours", 12.0, 2.5, 100, layout="hyena"),
        decode_run("continuous", 13.0, 3.5, 100, layout="hyena"),
    ]
    assert rows(decoding_tables.layouts({"runs": runs})) == [
        ["stu", "8, 8,192", "10", "-", "40", "1", "-", "30"],
        ["hyena", "8, 8,192", "12", "13", "-", "2.5", "3.5", "-"],
    ]


def test_training_and_serving_tables_show_the_results():
    run = {"threads": 1, "targets": 2048, "width": 512, "plain_gib": 9.0, "chunked_gib": 1.5}
    run |= {"memory_ratio": 6.0, "plain_seconds": 8.0, "chunked_seconds": 4.0, "speed_ratio": 2.0}
    loss = rows(train_serve_tables.loss({"runs": [run, run | {"threads": 2, "plain_gib": 99.0}]}))
    assert loss == [["2,048 x 512", "1.50", "9.00", "6.0", "4.0", "8.0", "2.00"]]
    run = {"threads": 1, "batch_invariant": True, "greedy_prompts_changed": 1}
    run |= {"temperature_1_prompts_changed": 4, "greedy_tokens_per_second": 1000.4}
    run["temperature_1_tokens_per_second"] = 900.0
    assert rows(train_serve_tables.invariance({"runs": [run]})) == [
        ["yes", "1", "4", "1,000", "900"]
    ]


def test_realisations_are_measured_and_shown():
    options = realisation.Options(max_seq_len=(64, 600), filters=4, width=5, layers=2)
    result = realisation.measure(options)
    for run in result["runs"]:
        assert run["rank"] in RANKS
        assert 0 < run["channel_error"] <= LARGEST_ERRORS[torch.float32]
        assert run["filter_error"] > 0
        assert min(run["state_seconds"], run["filters_seconds"]) > 0
        assert min(run["state_gib"], run["filters_gib"]) >= 0
    result["runs"][1] |= {"rank": 77, "channel_error": 1.25e-8, "state_gib": 0.345}
    shown = rows(decoding_tables.realisation(result))
    assert [row[0] for row in shown] == ["64", "600"]
    assert (shown[1][1], shown[1][3], shown[1][5]) == ("77", "1.2e-08", "0.34")
