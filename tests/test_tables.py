"""The documents' tables are what the benchmarks' results say."""

import json

import pytest

from benchmarks import tables


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_tables_are_those_of_the_results(name):
    text = (tables.ROOT / name).read_text(encoding="utf-8")
    assert tables.PLACE.search(text), "no table is left there"
    assert tables.with_tables(text) == text, "run python -m benchmarks.tables"


def test_a_result_that_changes_changes_its_table(tmp_path, monkeypatch):
    result = json.loads((tables.RESULTS / "memory.json").read_text(encoding="utf-8"))
    result["runs"][0]["measured_gib"] = 123.456
    (tmp_path / "memory.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    changed = tables.with_tables("before\n<!-- stu-bench memory -->\nold\n<!-- end -->\nafter\n")
    assert "| 123.46 |" in changed
    assert "old" not in changed
    assert changed.startswith("before\n<!--")
    assert changed.endswith("<!-- end -->\nafter\n")


def test_every_result_is_of_a_commit():
    """With machine and versions; not of files that nobody has."""
    for path in tables.RESULTS.glob("*.json"):
        machine = json.loads(path.read_text(encoding="utf-8"))["machine"]
        assert {"processor", "torch", "python", "date"} <= machine.keys()
        assert len(machine["commit"]) == 40, path
