"""The suite `ranks`: what its rows say, and its table."""

from __future__ import annotations

import json

import pytest

from bench import ranks
from bench.report import render, results
from bench.report.tables import tables

BLOCK = "<!-- bench: {} -->\n{}\n<!-- /bench -->\n"
MIB = 2**20


@pytest.fixture
def found():
    seconds = {"plain": [0.1, 0.2, 0.3], "m-rwp-ranks": [0.21, 0.19, 0.2], "sam": [0.4, 0.4, 0.5]}
    sent = {"plain": (MIB, 1), "m-rwp-ranks": (MIB, 1), "sam": (2 * MIB, 2)}
    return json.loads(json.dumps(results.document(ranks.entries(seconds, sent), [], 1, 1.0, command="python x.py")))


def test_the_table_compares_with_plain_ddp(found):
    (table,) = tables(found)
    assert table.name == "ranks" and "Medians of 3" in table.note
    assert [row[2:] for row in table.rows] == [
        ["200 ms", "1.00x", "1.049 MB", "1.000x"],
        ["200 ms", "1.00x", "1.049 MB", "1.000x"],
        ["400 ms", "2.00x", "2.097 MB", "2.000x"],
    ]
    assert found["command"].startswith("python x.py")


def test_a_document_has_its_block(found):
    text = BLOCK.format("ranks", "old") + BLOCK.format("gpu", "kept")
    once = render.embed(text, found)
    assert "old" not in once and once.count("kept") == 1 and "1.049 MB" in once
    assert render.embed(once, found) == once


@pytest.mark.matrix
def test_two_processes_are_measured():
    """One round of every method; plain DDP and parallel m-RWP send the same."""
    ticks = []
    rows = {b["params"]["method"]: b for b in ranks.measured(1, lambda done, total: ticks.append((done, total)))}
    assert set(rows) == set(ranks.METHODS) and ticks[-1] == (1 + ranks.WARM, 1 + ranks.WARM)
    assert rows["plain"]["extra_info"]["bytes_sent"] == rows["m-rwp-ranks"]["extra_info"]["bytes_sent"] > 0
