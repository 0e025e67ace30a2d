"""Tables of the suite `train`: whole training steps by network, and the same with an allocator that keeps memory."""

from __future__ import annotations

from ..candidates import FLOOR
from ..methods import METHODS
from ..training.networks import NETWORKS
from ..training.processes import KEEPING
from ..training.race import TABLE
from .tables import NOTHING, VERSUS, Table, duration, lost, median, of_plain, pick, speedup, values

OURS = "flatkern"
KINDS = "system", "keeping"  # the allocators; columns call the second one kept
GAPS = 8e6  # bytes: gaps in the heap make as much of a difference between two peaks of the same tensors


def training_tables(results: dict) -> list[Table]:
    """One table per network, and one about the allocator."""
    found = [network_table(results, name) for name in values(pick(results, TABLE), "model")]
    return [table for table in [*found, allocator_table(results)] if table.rows]


# ---- reading rows


def label(b: dict) -> str:
    candidate = b["params"]["candidate"]
    return VERSUS.get(candidate, candidate)


def is_ours(b: dict) -> bool:
    return b["params"]["candidate"].startswith(OURS)


def rivals(b: dict, rows: list[dict]) -> list[dict]:
    """Who else takes steps of this method on this network."""
    same = {key: b["params"][key] for key in ("model", "method")}
    return [r for r in rows if r["params"] | same == r["params"] and not is_ours(r)]


def alone(b: dict, allocator: str) -> dict | None:
    return b["extra_info"].get("alone", {}).get(allocator)


def step_with(b: dict, allocator: str) -> float:
    """Seconds: those of the race are with memory kept, and each candidate has been compared with itself."""
    return median(b) * (b["extra_info"]["system_of_keeping"] if allocator == "system" else 1)


def least(found: list[float | None]) -> float | None:
    return min((value for value in found if value is not None), default=None)


# ---- cells


def against(b: dict, rows: list[dict]) -> str:
    """A step in steps of torch's plain one; marked where somebody else takes less time for the same method."""
    times, best = b["extra_info"].get("times_plain"), least([median(r) for r in rivals(b, rows)])
    if times is None:
        return NOTHING
    if b["params"]["method"] == "plain":
        return of_plain(times) if is_ours(b) else f"{times:.2f}x"
    slower = is_ours(b) and best is not None and round(median(b) / best, 2) > 1
    return lost(f"{times:.2f}x") if slower else f"{times:.2f}x"


def pass_of_plain(b: dict, rows: list[dict]) -> str:
    """Forward and backward, the same for everybody, in those beside torch's plain step."""
    reference = pick({"benchmarks": rows}, TABLE, model=b["params"]["model"], candidate=FLOOR)
    return f"{b['extra_info']['pass'] / reference[0]['extra_info']['pass']:.2f}x" if reference else NOTHING


def count(b: dict, allocator: str) -> str:
    there = alone(b, allocator)
    return NOTHING if there is None else f"{there['faults']:.0f}"


def peak(b: dict, rows: list[dict], allocator: str = "system") -> str:
    """Megabytes; marked where somebody else takes less for the same method."""
    there = alone(b, allocator)
    if there is None:
        return NOTHING
    best = least([r["peak_bytes"] for r in (alone(other, allocator) for other in rivals(b, rows)) if r])
    more = is_ours(b) and best is not None and there["peak_bytes"] > best + GAPS
    text = f"{there['peak_bytes'] / 1e6:.0f} MB"
    return lost(text, "more") if more else text


def lead(b: dict, rows: list[dict], allocator: str) -> str:
    """How many times faster we are than the fastest of the others, with that allocator."""
    theirs = least([step_with(r, allocator) for r in rivals(b, rows)])
    return speedup(step_with(b, allocator), theirs) if is_ours(b) else NOTHING


# ---- tables


def network_table(results: dict, name: str) -> Table:
    rows = pick(results, TABLE, model=name)
    network, stats = NETWORKS[name], rows[0]["stats"]
    title = f"{network.title}, {network.numel / 1e6:.1f} million weights: whole training steps"
    header = ["method", "by", "step (quartiles)", "of torch fused's step", "optimizer's share", "a pass"]
    table = Table(f"train-{name}", title, [*header, "of torch fused's pass", "page faults", "peak memory"])
    for b in rows:
        info = b["extra_info"]
        spread = f"{1e3 * b['stats']['q1']:.1f} to {1e3 * b['stats']['q3']:.1f}"
        cells = [METHODS[b["params"]["method"]].title, label(b), f"{duration(median(b))} ({spread})", against(b, rows)]
        cells += [f"{100 * info['optimizer_share']:.0f} %", duration(info["pass"]), pass_of_plain(b, rows)]
        table.rows.append([*cells, count(b, "system"), peak(b, rows)])
    kept = " with an allocator that keeps memory" if any(alone(b, "keeping") for b in rows) else ""
    machine = results["machine_info"]
    table.note = (
        f"Medians of {stats['rounds']} interleaved steps{kept}; a pass is a forward and a backward, and m-RWP and SAM "
        "have two; page faults of a step and peak memory: by itself, with the system's allocator; "
        f"{machine['threads']} threads of {machine['processor']}; torch {machine['torch']}; {results['datetime'][:10]}."
    )
    return table


def allocator_table(results: dict) -> Table:
    """Every step with glibc's allocator as it is, and with one that keeps what is freed."""
    rows = [b for b in pick(results, TABLE) if alone(b, "system")]
    header = ["method", "by", "step, kept", "of it, system's", "faults, kept", "faults, system's"]
    columns = ["vs the fastest other, kept", "that, system's", "peak, kept", "peak, system's"]
    table = Table("train-allocator", "A training step with an allocator that keeps memory", [*header, *columns])
    kept_first = KINDS[::-1]
    for b in rows:
        what = f"{NETWORKS[b['params']['model']].title}, {METHODS[b['params']['method']].title}"
        cells = [what, label(b), duration(median(b)), f"{b['extra_info']['system_of_keeping']:.2f}x"]
        cells += [count(b, kind) for kind in kept_first] + [lead(b, rows, kind) for kind in kept_first]
        table.rows.append(cells + [peak(b, rows, kind) for kind in kept_first])
    if rows:
        settings = " ".join(f"{key}={value}" for key, value in KEEPING.items())
        turns = alone(rows[0], "system")["seconds"]["rounds"]
        table.note = (
            f"Kept: with {settings}, steps of the race. System's: without; a step in kept ones is the median of "
            f"{turns} turns of a candidate in processes of its own, by which the lead of the race is converted."
        )
    return table
