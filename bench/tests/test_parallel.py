"""bench/parallel.py: what its file says, and that its table has a place beside those of bench/run.py."""

from __future__ import annotations

import json

import pytest

from bench import parallel
from bench.report import render, results
from bench.report.tables import tables

BLOCK = "<!-- bench: {} -->\n{}\n<!-- /bench -->\n"
MIB = 2**20


@pytest.fixture
def found():
    seconds = {"plain": [0.1, 0.2, 0.3], "m-rwp-ranks": [0.21, 0.19, 0.2], "sam": [0.4, 0.4, 0.5]}
    sent = {"plain": (MIB, 1), "m-rwp-ranks": (MIB, 1), "sam": (2 * MIB, 2)}
    return json.loads(json.dumps(results.document(parallel.entries(seconds, sent), [], 1, 1.0, command="python x.py")))


def test_the_table_compares_with_plain_ddp(found):
    (table,) = tables(found)
    assert table.name == "ranks" and "Medians of 3" in table.note
    assert [row[2:] for row in table.rows] == [
        ["200 ms", "1.00x", "1.049 MB", "1.000x"],
        ["200 ms", "1.00x", "1.049 MB", "1.000x"],
        ["400 ms", "2.00x", "2.097 MB", "2.000x"],
    ]
    assert found["command"].startswith("python x.py")


def test_each_file_rewrites_its_own_blocks(found):
    text = BLOCK.format("ranks", "old") + BLOCK.format("resnet50-sgd", "kept") + BLOCK.format("gpu", "kept")
    once = render.embed(text, found)
    assert "old" not in once and once.count("kept") == 2 and "1.049 MB" in once
    assert render.embed(once, found) == once
