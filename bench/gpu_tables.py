"""The tables of a GPU's result file: device time, host time, the loop that sees both, launches, and what was wanted.

Their names begin with the GPU's, so that one document can show several machines.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from .goals import goals
from .gpu import slug
from .methods import METHODS, floor_bytes, is_plain
from .models import MODELS
from .tables import (
    KIND,
    NOTHING,
    PLAIN,
    Table,
    bandwidth,
    copy_rate,
    dtype_table,
    failure_table,
    heading,
    lost,
    median,
    multiple,
    of_one_kind,
    pick,
    speedup,
    values,
)

CLOCKS = "device: CUDA events, launches queued ahead, L2 without the operands; host: until the calls return"


def gpu_tables(results: dict) -> list[Table]:
    """Everything that a GPU's result file has to show."""
    found = [goal_table(results), perturb_table(results), *method_tables(results), compiler_table(results)]
    for model in values(pick(results, "dtypes"), "model"):
        table = dtype_table(results, model, duration)
        table.note = footnote(results, "dtypes", model)
        found.append(table)
    found += [call_table(results), copy_table(results), failure_table(results)]
    start = slug(results["machine_info"]["gpu"]["name"])
    for table in found:
        table.name = f"{start}-{table.name}"
    return [table for table in found if table.rows]


# ---- cells


def duration(seconds: float) -> str:
    """Three digits."""
    return f"{seconds * 1e6:.3g} us" if seconds < 999.5e-6 else f"{seconds * 1e3:#.3g} ms".replace(". ", " ")


def host(b: dict, call: str | None = None) -> str:
    """Host time of a step, or of one of its calls."""
    found = b["extra_info"].get("host")
    seconds = found and (found["median"] if call is None else found["calls"].get(call))
    return NOTHING if seconds is None else duration(seconds)


def device(b: dict, call: str) -> str:
    seconds = b["extra_info"]["calls"].get(call)
    return NOTHING if seconds is None else duration(seconds)


def loop(b: dict | None) -> float | None:
    """Seconds per step of a loop."""
    return b["extra_info"]["loop"]["median"] if b and "loop" in b["extra_info"] else None


def launches(b: dict, call: str | None = None) -> str:
    """What a step, or one of its calls, starts on the device; without autograd's additions."""
    found = b["extra_info"].get("launches")
    if not found:
        return NOTHING
    counts = [n for name, n in found.items() if name != "accumulate" and call in (None, name)]
    return f"{sum(counts):.4g}" if counts else NOTHING


def call_rate(b: dict, call: str) -> tuple[float, float | None]:
    """GB/s of one call by its own floor, and its share of what a copy reaches."""
    info = b["extra_info"]
    rate = info["call_floors"][call] * MODELS[b["params"]["model"]].numel / info["calls"][call] / 1e9
    return rate, rate / info["copy_gigabytes_per_second"] if "copy_gigabytes_per_second" in info else None


def footnote(results: dict, table: str, model: str) -> str:
    """Where the numbers come from, in one line."""
    shown = pick(results, table, model=model)
    machine, rate = results["machine_info"], copy_rate(shown)
    turns = sorted({shown[0]["stats"]["rounds"], *(b["stats"]["rounds"] for b in shown)})
    parts = [
        f"Medians of {' to '.join(str(n) for n in dict.fromkeys((turns[0], turns[-1])))} interleaved turns",
        CLOCKS,
        f"{machine['gpu']['name']}, driver {machine['gpu']['driver']}",
        f"torch {machine['torch']}, triton {machine['triton']}",
        f"a copy runs at {rate:.0f} GB/s" if rate else "",
        results["datetime"][:10],
    ]
    return "; ".join(filter(None, parts)) + "."


# ---- tables


def goal_table(results: dict) -> Table:
    """What was wanted of the GPU kernels, and what was measured."""
    table = Table("goals", "Wanted, and measured", ["what", "wanted", "measured"])
    for goal in goals(results):
        measured = NOTHING if goal.value is None else goal.show(goal.value)
        missed = goal.value is not None and not goal.reached
        table.rows.append([goal.what, goal.wanted, f"**{measured} (missed)**" if missed else measured])
    return table


def perturb_table(results: dict) -> Table:
    """perturb() alone, by its own floor."""
    header = ["model", "method", "candidate", "device", "floor B/param", "GB/s", "of copy", "launches", "host"]
    table = Table("perturb", "perturb() alone, float32 weights", header)
    rows = [b for b in pick(results, "methods", dtype="float32") if "perturb" in b["extra_info"]["calls"]]
    for b in (b for b in rows if not MODELS[b["params"]["model"]].small):
        p, (rate, share) = b["params"], call_rate(b, "perturb")
        title = f"{METHODS[p['method']].title} ({p['base']})"
        cells = [device(b, "perturb"), f"{b['extra_info']['call_floors']['perturb']:g}", f"{rate:.0f}"]
        cells += [NOTHING if share is None else f"{100 * share:.0f} %", launches(b, "perturb"), host(b, "perturb")]
        table.rows.append([MODELS[p["model"]].title, title, p["candidate"], *cells])
    if table.rows:
        table.note = footnote(results, "methods", rows[0]["params"]["model"])
    return table


def method_tables(results: dict) -> Iterator[Table]:
    """Two tables per model, base, kind of weights and backend: by device time, and by what a loop sees."""
    for rows, ours in of_one_kind(results):
        yield method_table(results, rows, ours, looped=False)
        yield method_table(results, rows, ours, looped=True)


def method_table(results: dict, rows: list[dict], ours: str, looped: bool) -> Table:
    model, base, dtype, masters = (rows[0]["params"][k] for k in KIND)
    name, title, versus = heading(rows, ours, "triton")
    against = [f"vs {v}" for v in versus.values()]
    note = footnote(results, "methods", model)
    if looped:
        header = ["method", "loop, per step", "of torch fused", *against, "device", "host", "launches"]
        table = Table(f"{name}-loop", f"{title}: steps in a loop, nothing between them", header, note=note)
    else:
        header = ["method", "device", "of torch fused (floor)", "GB/s", "of copy", *against]
        header += ["launches", "host", "loop, per step", "extra B/param"]
        table = Table(name, f"{title}: device time", header, note=note)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    for method in values(rows, "method"):
        here = {b["params"]["candidate"]: b for b in rows if b["params"]["method"] == method}
        if ours not in here:
            continue
        b, does = here[ours], METHODS[method]
        rivals = [here.get(PLAIN.get(k, "") if method == "plain" else k) for k in versus]
        if looped:
            times = b["extra_info"].get("loop_times_plain")
            ratio = NOTHING if times is None else f"{times:.2f}x"
            if method == "plain" and times is not None and round(times, 2) > 1:
                ratio = lost(ratio)
            cells = [duration(loop(b)), ratio, *(speedup(loop(b), loop(r)) for r in rivals)]
            table.rows.append([does.title, *cells, duration(median(b)), host(b), launches(b)])
        else:
            floor = floor_bytes(does, base, width, masters) / floor_bytes(METHODS["plain"], base, width)
            cells = [duration(median(b)), multiple(b, floor), *bandwidth(b)]
            cells += [speedup(median(b), r and median(r)) for r in rivals]
            rest = [launches(b), host(b), duration(loop(b)), f"{b['extra_info']['held_bytes']:.1f}"]
            table.rows.append([does.title, *cells, *rest])
    return table


def compiler_table(results: dict) -> Table:
    """torch.compile beside the others, in races of its own."""
    header = ["model", "method", "candidate", "device", "of torch fused", "host", "loop, per step", "launches"]
    table = Table("compiled", "torch.compile of perturb() and step()", header)
    rows = pick(results, "compiled")
    for b in rows:
        p, times = b["params"], b["extra_info"].get("times_plain")
        method = METHODS["plain" if is_plain(p["candidate"]) else p["method"]].title
        ratio = NOTHING if times is None else f"{times:.2f}x"
        cells = [duration(median(b)), ratio, host(b), duration(loop(b)), launches(b)]
        table.rows.append([f"{MODELS[p['model']].title}, {p['base']}", method, p["candidate"], *cells])
    if rows:
        table.note = footnote(results, "compiled", rows[0]["params"]["model"])
    return table


def call_table(results: dict) -> Table:
    """What a call costs where there is nothing to compute."""
    header = ["method", "base", "candidate", "host: perturb()", "step()", "step of torch fused's"]
    header += ["device: perturb()", "step()", "launches"]
    table = Table("calls", "Time of a call on 160 tensors of 10 elements", header)
    rows = pick(results, "calls")
    for b in rows:
        p, spent = b["params"], b["extra_info"]["host"]["calls"]
        if p["candidate"] == "torch fused" and p["method"] != "plain":
            continue  # in these races it is only what the others are compared with
        fused = pick(results, "calls", method=p["method"], base=p["base"], candidate="torch fused")
        against = f"{spent['step'] / fused[0]['extra_info']['host']['median']:.2f}x" if fused else NOTHING
        cells = [host(b, "perturb"), host(b, "step"), against, device(b, "perturb"), device(b, "step"), launches(b)]
        table.rows.append([METHODS[p["method"]].title, p["base"], p["candidate"], *cells])
    if rows:
        table.note = footnote(results, "calls", rows[0]["params"]["model"])
    return table


def copy_table(results: dict) -> Table:
    """What the device's memory can do at each model's size, and the price of setting `.grad`, on the host."""
    header = ["model", "one copy_", "GB/s", "_foreach_copy_", "GB/s", "its host time", "setting .grad (host)"]
    table = Table("copy", "Copying the weights once", header)
    for model in values(pick(results, "copy"), "model"):
        cells = {b["params"]["candidate"]: b for b in pick(results, "copy", model=model)}
        row = [MODELS[model].title]
        for name in ("copy_", "foreach_copy_"):
            b = cells.get(name)
            row.append(duration(median(b)) if b else NOTHING)
            row.append(f"{b['extra_info']['gigabytes_per_second']:.0f}" if b and not MODELS[model].small else NOTHING)
        row += [host(cells[name]) if name in cells else NOTHING for name in ("foreach_copy_", "set .grad")]
        table.rows.append(row)
    rates = [
        b["extra_info"]["gigabytes_per_second"]
        for b in pick(results, "copy", candidate="copy_")
        if not MODELS[b["params"]["model"]].small
    ]
    if rates:
        table.note = f"One copy_: {statistics.median(rates):.0f} GB/s in the median of the lists; {CLOCKS}."
    return table
