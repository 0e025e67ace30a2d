"""What was wanted of the CPU's benchmarks, beside what the tables say."""

from __future__ import annotations

import re
from itertools import product
from typing import NamedTuple

from .tables import Table, lost

OF_FUSED, LOOP, LIBRARY = "of torch fused (floor)", "vs careful loop", "vs pytorch_optimizer"
LIMIT, FASTER = "of the limit", "ours is faster"


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
    Bound("resnet50-adamw", ("rolling RWP",), OF_FUSED, 1.4),
    Bound("limits", ("GPT-2 124M", "adamw", "rolling RWP", "step()"), "of torch fused", 1.4),
    Bound("limits", ("GPT-2 124M", "adamw", "IRE, a mask per 10 steps", "whole step"), "of torch fused", 1.15),
    Bound("resnet50-dtypes", ("plain", "bfloat16", "flatkern cpp"), "GB/s against float32", 0.75, at_most=False),
    Bound("resnet50-dtypes", ("m-RWP", "bfloat16", "flatkern cpp"), "GB/s against float32", 0.75, at_most=False),
    *(
        Bound("limits", (model, base, *what), LIMIT, bound, at_most=False)
        for model, base in product(("ResNet-50", "GPT-2 124M"), ("sgd", "adamw"))
        for what, bound in (
            (("plain", "step()"), 93),
            (("m-RWP", "whole step"), 90),
            (("rolling RWP", "step()"), 88),
            (("SAM", "whole step"), 92),
        )
    ),
    *(
        Bound("rivals", ("ResNet-50", "SAM", base, rival, how), FASTER, 2.5, at_most=False)
        for base, rival, how in product(
            ("sgd", "adamw"), ("the usual loop (davda54/sam)", "pytorch_optimizer.SAM"), ("torch's fused", "by name")
        )
    ),
    *(
        Bound("settings", (method, base, "flatkern cpp, avx2"), "of the usual time", 1.3)
        for method, base in product(("m-RWP", "rolling RWP"), ("sgd", "adamw"))
    ),
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
        read = re.match(r"\**([\d.]+)(x| us| %)", cell)
        if not read:
            continue  # something else is computed there
        number, unit = read.groups()
        text = number + unit
        held = float(number) <= want.bound if want.at_most else float(number) >= want.bound
        bound = f"at {'most' if want.at_most else 'least'} {want.bound:g}{unit}"
        made.rows.append([table.title, ", ".join(want.row), want.column, bound, text if held else lost(text, "missed")])
    return made
