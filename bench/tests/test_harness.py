"""The harness itself: fair orders, failing candidates, traffic, files and tables. No test looks at a clock."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch

import flatkern
from bench.candidates import DTYPES, untouched_optimizer
from bench.methods import BASES, METHODS, call_floors, floor_bytes
from bench.models import MODELS
from bench.report import render, results, speed
from bench.report.tables import tables
from bench.timing.harness import Timings, balanced_orders, interleave, takes_part
from bench.timing.stats import Stats


@pytest.mark.parametrize("model", MODELS)
def test_counts_are_those_everybody_quotes(model):
    MODELS[model].shapes()


@pytest.mark.parametrize("n", range(1, 9))
def test_orders_are_balanced(n):
    """Everybody is in every place, and follows everybody else, equally often."""
    orders = balanced_orders(n)
    places = Counter((i, place) for order in orders for place, i in enumerate(order))
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(places) == n * n and len(set(places.values())) == 1
    assert len(pairs) == n * (n - 1) and len(set(pairs.values())) <= 1


@pytest.mark.parametrize("wanted, rounds", [(5, 15), (15, 15), (7, 20), (1, 4)])
def test_turns_are_spread(wanted, rounds):
    turns = [t for t in range(rounds) if takes_part(t, wanted, rounds)]
    gaps = {b - a for a, b in itertools.pairwise(turns)}
    assert len(turns) == wanted and (not gaps or max(gaps) - min(gaps) <= 1)


def test_a_failure_costs_one_candidate():
    def breaks(count):
        if count == 3:
            raise RuntimeError("no more")
        return {"step": 1}

    timings, failures = interleave({"good": lambda count: {"step": 5}, "bad": breaks}, rounds=6)

    assert failures == {"bad": "RuntimeError: no more"}
    assert list(timings) == ["good"] and timings["good"].stats().median == 5e-9


def test_calls_floors_add_up_to_the_steps():
    for method in METHODS.values():
        for base, param, masters in itertools.product(("sgd", "adamw"), (2, 4), (False, True)):
            floors = call_floors(method, base, param, masters)
            assert set(floors) == {turn.call for turn in method.cycle}
            assert sum(floors.values()) == floor_bytes(method, base, param, masters)
    assert call_floors(METHODS["m-rwp"], "sgd", 4) == {"perturb": 12, "step": 24}
    assert call_floors(METHODS["sam"], "sgd", 4) == {"perturb": 20, "step": 20}


@pytest.mark.parametrize("count", [*range(1, 10), 15, 75])
def test_statistics_are_pytest_benchmarks(count):
    """Files are compared with its tools; they are written where it is not installed."""
    theirs = pytest.importorskip("pytest_benchmark.stats").Stats()
    data = [((7 * i + 3) % 11 + i / 100) ** 2 for i in range(count)]
    for seconds in data:
        theirs.update(seconds)
    assert Stats(data).as_dict() == pytest.approx(theirs.as_dict())


def test_floors():
    """Bytes per float32 parameter, SGD with momentum and AdamW; and with float32 masters behind bfloat16."""
    expected = {
        "plain": (20, 28), "rwp": (32, 40), "arwp": (32, 40), "m-rwp": (36, 44), "m-arwp": (36, 44),
        "sam": (40, 48), "asam": (44, 52), "msam": (24 * 4 + 16, 24 * 4 + 24), "rolling": (24, 32),
        "absolute": (32, 40), "absolute-rolling": (32, 40), "mixed": (44, 52), "sam-5": (24, 32), "gsam": (52, 60),
        "friendly": (52, 60), "looksam": (34.4, 42.4), "momentum": (40, 48), "momentum-rolling": (36, 44),
        "ire": (20 + 1 / 8 + 16.125 / 10, 28 + 1 / 8 + 16.125 / 10),
    }  # fmt: skip
    found = {m: (floor_bytes(METHODS[m], "sgd", 4), floor_bytes(METHODS[m], "adamw", 4)) for m in METHODS}
    assert found == {m: pytest.approx(floors) for m, floors in expected.items()}
    assert [floor_bytes(METHODS[m], "sgd", 2, True) for m in ("plain", "sam", "rolling")] == [20, 30, 20]


@pytest.mark.parametrize("dtype, masters", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "msam"])
def test_floors_are_what_flatkern_says_a_step_costs(name, base, dtype, masters):
    """But of mSAM's further rounds, which it leaves out."""
    params = [torch.nn.Parameter(torch.ones(16, 80, dtype=DTYPES[dtype]))]
    optimizer = untouched_optimizer(params, METHODS[name], base, backend="eager", masters=masters)
    width = DTYPES[dtype].itemsize
    assert flatkern.cost(optimizer).bytes_moved / 1280 == pytest.approx(
        floor_bytes(METHODS[name], base, width, masters), abs=1 / 1280
    )


@pytest.fixture
def found():
    """Results of two candidates on one model, as run.py writes them."""
    rows = []
    race = {"model": "resnet50", "method": "m-rwp", "base": "sgd", "dtype": "float32", "masters": False}
    info = {"floor_bytes": 36, "call_floors": {"perturb": 12, "step": 24}, "held_bytes": 8.0}
    for candidate, ns in {"flatkern cpp": 20_000_000, "foreach": 10_000_000, "torch fused": 8_000_000}.items():
        params = {**race, "candidate": candidate}
        timings = Timings([{"perturb": ns // 2, "step": ns // 2}] * 3)
        rows.append(results.entry("methods", params, timings, 25_557_032, **info))
    results.compare(rows, "torch fused", Stats([8 * 25_557_032 / 50e9] * 3), 25_557_032)
    failure = {**rows[0]["params"], "table": "methods", "candidate": "papers", "reason": "ValueError: no"}
    return json.loads(json.dumps(results.document(rows, [failure], threads=2, seconds=1.0)))


def test_tables_say_what_was_measured(found):
    methods, failures = tables(found)
    assert methods.name == "resnet50-sgd" and failures.name == "failures"
    (row,) = methods.rows
    assert row[:6] == ["m-RWP", "20.0 ms ±0 %", "2.50x (1.80x)", "46", "-", "92 %"]
    assert row[6] == "**0.50x (slower)**"  # a loss is marked
    assert "no" in failures.rows[0][-1]


def test_documents_embed_tables(found):
    text = "# T\n<!-- bench: resnet50-sgd -->\nold\n<!-- /bench -->\nrest\n"
    once = render.embed(text, found)
    assert "m-RWP" in once and "old" not in once and once.endswith("rest\n")
    assert render.embed(once, found) == once
    with pytest.raises(KeyError, match="no table"):
        render.embed(text.replace("resnet50", "alexnet"), found)


def test_documents_list_what_is_lost(found):
    text = render.embed("<!-- bench: losing -->\n<!-- /bench -->\n", found)
    assert "| m-RWP | vs foreach | **0.50x (slower)** |" in text


def test_the_chart_of_the_start_page_needs_all_of_its_methods(found):
    with pytest.raises(ValueError, match="the results have no plain"):
        speed.speed(found)


def test_documents_keep_the_table_of_the_gpus(found):
    """It is made of other files."""
    block = "<!-- bench: {} -->\n{}\n<!-- /bench -->\n"
    text = render.embed(block.format("resnet50-sgd", "old") + block.format("gpu", "kept"), found)
    assert block.format("gpu", "kept") in text and "old" not in text


def test_pytest_benchmark_reads_the_file(found, tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "results.json"
    results.write(path, found)
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "flatkern cpp" in done.stdout, done.stderr


def test_the_chart_is_drawn(found, tmp_path):
    """Bars end at 2.5x and 1.25x of a logarithmic axis, and the tick of what the bytes allow is at 1.8x."""
    pytest.importorskip("matplotlib")
    from matplotlib import colors, image

    from bench.report.chart import COLORS, plot

    plot(found, tmp_path / "chart.png")
    pixels = torch.from_numpy(image.imread(tmp_path / "chart.png"))[..., :3]

    def longest_row(candidate):
        """The columns of a bar, which is longer than its patch in the legend."""
        rows = (pixels - torch.tensor(colors.to_rgb(COLORS[candidate]))).abs().amax(2) < 0.01
        return rows[rows.sum(1).argmax()].nonzero().flatten()

    ours, foreach = longest_row("flatkern cpp"), longest_row("foreach")
    inside = torch.arange(int(ours[0]), int(ours[-1]))
    tick = inside[~torch.isin(inside, ours)].double().mean()
    per_pixel = math.log(2.5 / 1.25) / float(ours[-1] - foreach[-1])
    assert math.log(2.5 / 1.8) == pytest.approx(float(ours[-1] - tick) * per_pixel, abs=4 * per_pixel)
    assert len(foreach) > 100
    assert not any(len(longest_row(name)) for name in ("loop", "papers", "pytorch_optimizer", "compiled"))
