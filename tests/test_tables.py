"""The tables of the docs are those that the records in bench/ give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_of_the_docs_are_those_of_the_records():
    checked = subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_table_that_differs_from_its_record_is_found(tmp_path):
    for name in ("tables.py", "lib/records.py", "records/needles-smollm2-aware.json"):
        copy = tmp_path / "bench" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / "bench" / name).read_bytes())
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    name = "needles-smollm2-aware:methods"
    page.write_text(f"Text.\n\n<!-- table:{name} -->\n<!-- /table:{name} -->\n")
    (tmp_path / "README.md").write_text("")
    tables = [sys.executable, tmp_path / "bench" / "tables.py"]
    subprocess.run(tables, check=True)
    assert "| evolved |" in page.read_text()
    assert subprocess.run([*tables, "--check"]).returncode == 0
    page.write_text(page.read_text().replace("| evolved |", "| evolved, by hand |"))
    assert subprocess.run([*tables, "--check"]).returncode == 1


def test_a_record_and_its_caption_name_the_haystack_where_rows_do(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from results import condensed
    from tables import Record

    row = {"task": "niah", "method": "full", "budget": None, "score": 1.0, "n": 2}
    facts = {"model": "m", "n": 2, "seed": 0, "dtype": "float32", "machine": {"processor": "p"}, "date": "2026-11-30"}
    captions = [
        Record("r", {**facts, "tables": [condensed([{**row, **used}], [], [64])]}, ROOT / "README.md").caption
        for used in ({}, {"haystack": "generated prose"})
    ]
    assert ["haystack: generated prose" in caption for caption in captions] == [False, True]
