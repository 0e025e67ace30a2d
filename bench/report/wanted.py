"""What was wanted of the CPU's benchmarks, beside what the tables say."""

from __future__ import annotations

import re
from typing import NamedTuple

from .tables import Table, lost

OF_FUSED, LOOP, LIBRARY = "of torch fused (floor)", "vs careful loop", "vs pytorch_optimizer"


class Bound(NamedTuple):
    """A cell of a table, by its row's first cells, and what its number should be: at most that, or at least."""

    table: str
    row: tuple[str, ...]
    column: str
    bound: float
    at_most: bool = True


WANTED = [
    Bound("resnet50-sgd", ("m-RWP",), OF_FUSED, 2.2),
    Bound("resnet50-sgd", ("m-RWP",), LOOP, 7.0, at_most=False),
    Bound("resnet50-sgd", ("mixed SAM",), OF_FUSED, 2.6),
    Bound("resnet50-sgd", ("GSAM",), OF_FUSED, 3.1),
    Bound("resnet50-sgd", ("Friendly-SAM",), OF_FUSED, 3.1),
    Bound("resnet50-sgd", ("rolling Momentum-SAM",), OF_FUSED, 2.1),
    Bound("resnet50-sgd", ("LookSAM, mean of 5",), OF_FUSED, 2.0),
    Bound("resnet50-sgd", ("Friendly-SAM",), LIBRARY, 2.0, at_most=False),
    Bound("resnet50-sgd", ("LookSAM, mean of 5",), LIBRARY, 2.0, at_most=False),
    Bound("resnet50-adamw", ("rolling RWP",), OF_FUSED, 1.4),
    Bound("gpt2-adamw", ("IRE, a mask per 10 steps",), OF_FUSED, 1.15),
    Bound("resnet50-dtypes", ("m-RWP", "bfloat16", "flatkern cpp"), "GB/s against float32", 0.7, at_most=False),
    Bound("calls", ("m-RWP", "sgd", "flatkern cpp"), "perturb()", 60),
    Bound("calls", ("plain", "sgd", "flatkern cpp"), "step()", 60),
]


def wanted_table(found: list[Table]) -> Table:
    """A row for each bound; what missed it is printed as a loss."""
    made = Table("wanted", "Wanted on a CPU", ["where", "method", "column", "wanted", "found"])
    by_name = {table.name: table for table in found}
    for want in WANTED:
        table = by_name.get(want.table)
        row = table and next((r for r in table.rows if tuple(r[: len(want.row)]) == want.row), None)
        if table is None or row is None or want.column not in table.header:
            continue  # a run of some cases only
        cell = row[table.header.index(want.column)]
        found_number = re.match(r"\**([\d.]+)", cell)
        if not found_number:
            continue
        number = found_number[1]
        unit = " us" if cell.endswith("us") else "x"
        text = number + unit
        held = float(number) <= want.bound if want.at_most else float(number) >= want.bound
        bound = f"at {'most' if want.at_most else 'least'} {want.bound:g}{unit}"
        made.rows.append(
            [table.title, ", ".join(want.row[:2]), want.column, bound, text if held else lost(text, "missed")]
        )
    return made
