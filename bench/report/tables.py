"""Result files as tables: what is shown beside what, and how a loss looks. No measuring and no files here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..baselines.libraries import LIBRARIES, PEERS
from ..candidates import DOCUMENTED, DOCUMENTED_PAPERS
from ..candidates import FLOOR as REFERENCE
from ..methods import BASES, METHODS, floor_bytes, is_plain
from ..models import MODELS
from ..races import ONE_THREAD
from .results import spread

VERSUS = {
    "papers": "papers' loop",
    "loop": "careful loop",
    "foreach": "foreach",
    "compiled": "torch.compile",
    **{library: library for library in LIBRARIES},
}
PLAIN = {"loop": "torch loop", "foreach": "torch foreach"}  # who stands in these columns in the plain row
SLOWER = "slower"
NOTHING = "-"
OTHER = "something else"  # in place of a speed-up over what computes something else


@dataclass
class Table:
    """A table under the name by which documents embed it."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        rule = ["---"] + ["---:"] * (len(self.header) - 1)
        body = "\n".join("| " + " | ".join(line) + " |" for line in [self.header, rule, *self.rows])
        return f"{body}\n\n{self.note}" if self.note else body


def loud(cell: str) -> bool:
    """Whether a cell is a loss, which is shown in red, and in Markdown in bold."""
    return cell.startswith("**")


def tables(results: dict) -> list[Table]:
    """Everything that a result file has to show."""
    from .training import training_tables

    found = list(method_tables(results))
    found += [limit_table(results), rival_table(results), *training_tables(results)]
    found += [dtype_table(results, model) for model in values(pick(results, "dtypes"), "model")]
    found += [
        setting_table(results),
        call_table(results),
        copy_table(results),
        rank_table(results),
        failure_table(results),
    ]
    return [table for table in found if table.rows]


# ---- reading a result file


def pick(results: dict, table: str, **params) -> list[dict]:
    """Benchmarks of one table with these parameters, in the order they ran."""
    rows = [b for b in results["benchmarks"] if b["extra_info"]["table"] == table]
    return [b for b in rows if all(b["params"][k] == v for k, v in params.items())]


def values(benchmarks: list[dict], key: str) -> list:
    """Distinct values of a parameter, in order."""
    return list(dict.fromkeys(b["params"][key] for b in benchmarks))


def median(b: dict) -> float:
    return b["stats"]["median"]


def accumulation(b: dict) -> float:
    """Seconds that autograd needs to add a step's gradients up (mSAM)."""
    return b["extra_info"]["calls"].get("accumulate", 0.0)


def copy_rates(benchmarks: list[dict]) -> str:
    """GB/s of copies of the weights in these races; empty where the model fits into a cache."""
    rates = [b["extra_info"].get("copy_gigabytes_per_second") for b in benchmarks]
    if not benchmarks or MODELS[benchmarks[0]["params"]["model"]].small or not all(rates):
        return ""
    least, most = f"{min(rates):.0f}", f"{max(rates):.0f}"
    return f"copies run at {least} GB/s" if least == most else f"copies run at {least} to {most} GB/s"


# ---- cells


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"


def with_spread(b: dict) -> str:
    """The median, and half of the interquartile range in percent of it."""
    return f"{duration(median(b))} ±{100 * spread(b['stats']):.0f} %"


def lost(text: str, how: str = SLOWER) -> str:
    return f"**{text} ({how})**"


def speedup(ours: float, theirs: float | None) -> str:
    """How many times faster we are; a loss is printed as one."""
    if theirs is None:
        return NOTHING
    ratio = theirs / ours
    text = f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"
    return lost(text) if round(ratio, 2) < 1 else text


def over(ours: dict, theirs: dict | None, also: Callable[[dict], float] = lambda b: 0.0) -> str:
    """How many times faster a row of ours is than a rival's, if that computes the same."""
    if theirs is None:
        return NOTHING
    if theirs["extra_info"].get("differs"):
        return OTHER
    return speedup(median(ours) + also(ours), median(theirs) + also(theirs))


def multiple(b: dict, floor: float) -> str:
    """Time as a multiple of the plain fused torch optimizer; in brackets what the bytes allow."""
    times = b["extra_info"].get("times_plain")
    if times is None:
        return NOTHING
    return of_plain(times) if b["params"]["method"] == "plain" else f"{times:.2f}x ({floor:.2f}x)"


def of_plain(times: float) -> str:
    """Our plain step in torch's, which does the same: more than one is a loss."""
    return lost(f"{times:.2f}x") if round(times, 2) > 1 else f"{times:.2f}x"


def bandwidth(b: dict) -> list[str]:
    """GB/s and share of copy; both mean nothing where the model fits into a cache."""
    info = b["extra_info"]
    if MODELS[b["params"]["model"]].small or "share_of_copy" not in info:
        return [NOTHING, NOTHING]
    return [f"{info['gigabytes_per_second']:.0f}", percent(info["share_of_copy"])]


def rates(b: dict) -> list[str]:
    """GB/s, share of the limit, share of copy."""
    rate, copied = bandwidth(b)
    return [rate, percent(share_of_limit(b)), copied]


def share_of_limit(b: dict) -> float | None:
    """Of the time that the step's reads and writes take when nothing is computed; None where that was not measured."""
    limits = b["extra_info"].get("limits")
    return sum(limits.values()) / median(b) if limits else None


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f} %"


def footnote(results: dict, table: str, model: str) -> str:
    """Where the numbers come from, in one line."""
    shown = pick(results, table, model=model)
    machine = results["machine_info"]
    turns = sorted(b["stats"]["rounds"] for b in shown)
    steps = f"{turns[0]}" if turns[0] == turns[-1] else f"{turns[0]} to {turns[-1]}"
    isa, threads = machine["flatkern_cpp"].get("isa", ""), machine["threads"]
    parts = [
        f"Medians of {steps} interleaved {'bursts of steps' if MODELS[model].small else 'steps'}",
        f"{threads} thread{'s' * (threads > 1)} of {machine['processor']}{f' ({isa})' if isa else ''}",
        f"torch {machine['torch']}",
        copy_rates(shown),
        results["datetime"][:10],
    ]
    return "; ".join(filter(None, parts)) + "."


def about_libraries(rows: list[dict], base: str) -> str:
    """Whose classes the columns of libraries are about, and what else some of them compute."""
    said = []
    for library in LIBRARIES:
        methods = values([b for b in rows if b["params"]["candidate"] == library], "method")
        said += [f"{METHODS[m].title}: {PEERS[m, base, library].title}" for m in methods]
    return f" Libraries: {'; '.join(said)}." if said else ""


# ---- tables


KIND = "model", "base", "dtype", "masters"


def of_one_kind(results: dict) -> Iterator[tuple[list[dict], str]]:
    """Benchmarks per model, base and kind of weights, with each of our candidates among them."""
    for kind in dict.fromkeys(tuple(b["params"][k] for k in KIND) for b in pick(results, "methods")):
        rows = pick(results, "methods", **dict(zip(KIND, kind, strict=True)))
        for ours in values(rows, "candidate"):
            if ours.startswith("flatkern"):
                yield rows, ours


def heading(rows: list[dict], ours: str) -> tuple[str, str, dict[str, str]]:
    """Name and title of such a table, which need not name the usual backend, and who it is against."""
    model, base, dtype, masters = (rows[0]["params"][k] for k in KIND)
    present, backend = values(rows, "candidate"), ours.removeprefix("flatkern ")
    versus = {k: v for k, v in VERSUS.items() if k in present or PLAIN.get(k) in present}
    marks = [dtype] * (dtype != "float32") + ["masters"] * masters + [backend] * (backend != "cpp")
    title = f"{MODELS[model].title}, {BASES[base]}" + "".join(f", {mark}" for mark in marks)
    return "-".join([model, base, *marks]), title, versus


def method_tables(results: dict) -> Iterator[Table]:
    """One table per model, base, kind of weights and backend: flatkern against what users write."""
    for rows, ours in of_one_kind(results):
        yield method_table(results, rows, ours)


def method_table(results: dict, rows: list[dict], ours: str) -> Table:
    model, base, dtype, masters = (rows[0]["params"][k] for k in KIND)
    name, title, versus = heading(rows, ours)
    table = Table(
        name,
        title,
        ["method", "time", "of torch fused (floor)", "GB/s", "of the limit", "of copy"]
        + [f"vs {v}" for v in versus.values()]
        + ["extra B/param"],
        note=footnote(results, "methods", model) + about_libraries(rows, base),
    )
    width = {"float32": 4, "bfloat16": 2}[dtype]
    for method in values(rows, "method"):
        here = {b["params"]["candidate"]: b for b in rows if b["params"]["method"] == method}
        if ours not in here:
            continue
        b, does = here[ours], METHODS[method]
        rivals = [here.get(PLAIN.get(k, "") if method == "plain" else k) for k in versus]
        floor = floor_bytes(does, base, width, masters) / floor_bytes(METHODS["plain"], base, width)
        table.rows.append(
            [does.title, with_spread(b), multiple(b, floor), *rates(b)]
            + [over(b, rival) for rival in rivals]
            + [f"{b['extra_info']['held_bytes']:.1f}"]
        )
        if accumulation(b):
            whole = median(b) + accumulation(b)
            table.rows.append(
                [f"{does.title}, with autograd's sums", duration(whole), *4 * [NOTHING]]
                + [over(b, rival, accumulation) for rival in rivals]
                + [NOTHING]
            )
    return table


def limit_table(results: dict) -> Table:
    """Calls of ours beside a kernel with the same streams and no arithmetic."""
    rows = [b for b in pick(results, "limits") if "limits" in b["extra_info"]]
    header = ["model", "base", "method", "call", "time", "GB/s", "of the limit", "of copy", "of torch fused"]
    table = Table("limits", "Calls, and what memory allows them", header)
    for b in rows:
        p, info = b["params"], b["extra_info"]
        whole = [MODELS[p["model"]].title, p["base"], METHODS[p["method"]].title]
        of_fused = NOTHING if "times_plain" not in info else multiple_of(info["times_plain"], p["method"])
        parts = info["limits"] if len(info["limits"]) > 1 else {}
        for call, limit in parts.items():
            table.rows.append([*whole, f"{call}()", *shares(b, info["calls"][call], limit, info["call_floors"][call])])
            table.rows[-1].append(NOTHING)
        name = "step()" if not parts else "whole step"
        _, *cells = shares(b, median(b), sum(info["limits"].values()), info["floor_bytes"])
        table.rows.append([*whole, name, with_spread(b), *cells, of_fused])
    table.note = footnote(results, "limits", rows[0]["params"]["model"]) if rows else ""
    return table


def shares(b: dict, seconds: float, limit: float, floor: float) -> list[str]:
    """Time, GB/s, and its shares of the limit and of a copy's rate."""
    rate = floor * MODELS[b["params"]["model"]].numel / max(seconds, 1e-9) / 1e9
    copied = b["extra_info"].get("copy_gigabytes_per_second")
    return [duration(seconds), f"{rate:.0f}", percent(limit / seconds), percent(copied and rate / copied)]


def multiple_of(times: float, method: str) -> str:
    return of_plain(times) if method == "plain" else f"{times:.2f}x"


def rival_table(results: dict) -> Table:
    """Named libraries and widespread code, with the base optimizer as their pages show it, too."""
    header = ["model", "method", "base", "rival", "its base optimizer", "its step", "ours", "ours is faster"]
    table = Table("rivals", "Named rivals", header)
    for b in pick(results, "methods", dtype="float32", masters=False):
        p = b["params"]
        who = p["candidate"].removeprefix(DOCUMENTED)
        documented = who != p["candidate"]
        if not (documented or who in LIBRARIES or (who == "papers" and p["method"] == DOCUMENTED_PAPERS)):
            continue
        same = {k: p[k] for k in ("model", "method", "base", "dtype", "masters")}
        race = pick(results, "methods", **same)
        ours = next((r for r in race if r["params"]["candidate"].startswith("flatkern")), None)
        if ours is None:
            continue
        name = "the usual loop (davda54/sam)" if who == "papers" else PEERS[p["method"], p["base"], who].name
        base = "its own" if who == "heavyball" else "by name" if documented else "torch's fused"
        cells = [MODELS[p["model"]].title, METHODS[p["method"]].title, p["base"], name, base]
        table.rows.append([*cells, duration(median(b)), duration(median(ours)), over(ours, b)])
    return table


def dtype_table(results: dict, model: str) -> Table:
    """Half-precision weights, interleaved with float32."""
    rows = pick(results, "dtypes", model=model)
    table = Table(
        f"{model}-dtypes",
        f"{MODELS[model].title}, {BASES[values(rows, 'base')[0]]}: weights in half precision",
        [
            "method",
            "weights",
            "candidate",
            "time",
            "floor B/param",
            "GB/s",
            "of copy",
            "GB/s against float32",
            "of torch",
        ],
        note=footnote(results, "dtypes", model),
    )
    for b in rows:
        p, info = b["params"], b["extra_info"]
        same = {k: p[k] for k in ("model", "method", "candidate")}
        full = pick(results, "dtypes", **same, dtype="float32")
        against = info["gigabytes_per_second"] / full[0]["extra_info"]["gigabytes_per_second"] if full else None
        method = METHODS["plain" if is_plain(p["candidate"]) else p["method"]].title
        weights = p["dtype"] + " + float32 masters" * p["masters"]
        relative = NOTHING if against is None else f"{against:.2f}x"
        floor = str(info["floor_bytes"])
        cells = [method, weights, p["candidate"], duration(median(b)), floor, *bandwidth(b), relative]
        table.rows.append([*cells, of_torch(b, rows)])
    return table


def setting_table(results: dict) -> Table:
    """With an older instruction set, and with one thread."""
    rows = pick(results, "settings")
    header = ["method", "base", "candidate", "time", "of the usual time", "of torch fused, likewise"]
    model = MODELS[rows[0]["params"]["model"]].title if rows else ""
    table = Table("settings", f"{model}: an older instruction set, and one thread", header)
    for b in rows:
        p = b["params"]
        who, _, setting = p["candidate"].partition(", ")
        same = {k: p[k] for k in ("method", "base")}
        likewise = f"{REFERENCE}, {setting}" if setting == ONE_THREAD else REFERENCE
        usual, theirs = (pick(results, "settings", **same, candidate=c) for c in (who, likewise))
        if who == REFERENCE:
            continue  # they are what the others are compared with
        slower = f"{median(b) / median(usual[0]):.2f}x" if usual and setting else NOTHING
        against = multiple_of(median(b) / median(theirs[0]), p["method"]) if theirs else NOTHING
        table.rows.append([METHODS[p["method"]].title, p["base"], p["candidate"], duration(median(b)), slower, against])
    table.note = footnote(results, "settings", rows[0]["params"]["model"]) if rows else ""
    return table


def of_torch(b: dict, rows: list[dict]) -> str:
    """The plain optimizer's time in steps of torch's fused one with weights of the same dtype."""
    p = b["params"]
    same = {k: p[k] for k in ("method", "dtype", "masters")}
    theirs = [r for r in rows if r["params"] | same == r["params"] and r["params"]["candidate"] == REFERENCE]
    if p["method"] != "plain" or p["candidate"] == REFERENCE or not theirs:
        return NOTHING
    return of_plain(median(b) / median(theirs[0]))


def call_table(results: dict) -> Table:
    """Microseconds per call where there is nothing to compute."""
    rows = pick(results, "calls")
    header = ["method", "base", "candidate", "perturb()", "step()", "step of torch fused's"]
    table = Table("calls", "Time of a call on 160 tensors of 10 elements", header)
    for b in rows:
        p, calls = b["params"], b["extra_info"]["calls"]
        if p["candidate"] == REFERENCE and p["method"] != "plain":
            continue  # in these races it is only what the others are compared with
        fused = pick(results, "calls", method=p["method"], base=p["base"], candidate=REFERENCE)
        against = f"{calls['step'] / median(fused[0]):.2f}x" if fused else NOTHING
        each = [duration(calls[c]) if c in calls else NOTHING for c in ("perturb", "step")]
        table.rows.append([METHODS[p["method"]].title, p["base"], p["candidate"], *each, against])
    table.note = footnote(results, "calls", rows[0]["params"]["model"]) if rows else ""
    return table


def copy_table(results: dict) -> Table:
    """What memory can do at each model's size, and the price of setting `.grad`."""
    header = ["model", "one copy_", "GB/s", "_foreach_copy_", "GB/s", "setting .grad"]
    table = Table("copy", "Copying the weights once", header)
    for model in values(pick(results, "copy"), "model"):
        cells = []
        for b in pick(results, "copy", model=model):
            rate = b["extra_info"].get("gigabytes_per_second")
            small = MODELS[model].small
            cells += [duration(median(b))] + ([NOTHING if small else f"{rate:.0f}"] if rate else [])
        table.rows.append([MODELS[model].title, *cells])
    return table


def rank_table(results: dict) -> Table:
    """The suite `ranks`: steps of a training under DDP."""
    rows = pick(results, "ranks")
    header = ["method", "passes of a rank", "step", "of plain DDP", "sent by a rank", "of plain DDP"]
    table = Table("ranks", "A training step under DDP, forward and backward included", header)
    for b in rows:
        info = b["extra_info"]
        table.rows.append(
            [
                b["params"]["title"],
                str(info["passes"]),
                duration(median(b)),
                f"{info['times_plain']:.2f}x",
                f"{info['bytes_sent'] / 1e6:.3f} MB",
                f"{info['bytes_times_plain']:.3f}x",
            ]
        )
    if rows:
        machine, (world, batch) = results["machine_info"], (rows[0]["params"][k] for k in ("world", "batch"))
        table.note = (
            f"Medians of {rows[0]['stats']['rounds']} interleaved steps; four convolutions, {batch} images a pass; "
            f"{world} processes of one thread on {machine['processor']}, gloo; torch {machine['torch']}; "
            f"{results['datetime'][:10]}."
        )
    return table


def failure_table(results: dict) -> Table:
    table = Table("failures", "Did not run", ["model", "method", "base", "candidate", "reason"])
    for f in results["failures"]:
        who = f["candidate"].removeprefix(DOCUMENTED)
        marks = [f["dtype"], *["masters"] * f["masters"], *["base by name"] * (who != f["candidate"])]
        candidate = ", ".join([who, *marks])
        reason = f["reason"].replace("|", "/").replace("\n", " ")
        table.rows.append([f["model"], METHODS[f["method"]].title, f["base"], candidate, reason])
    return table


# The README's rows and columns of a larger table.
BRIEF = "resnet50-sgd"
BRIEF_ROWS = ("plain", "rolling", "m-rwp", "sam", "asam", "sam-5", "gsam", "friendly", "looksam", "ire")
BRIEF_COLUMNS = (
    "method", "time", "of torch fused (floor)", "of the limit", "vs careful loop", "vs foreach", "vs pytorch_optimizer",
)  # fmt: skip


def brief_table(found: list[Table]) -> Table:
    """What the README shows: the main methods beside what a user would take instead."""
    whole = next((table for table in found if table.name == BRIEF), None)
    if whole is None:
        return Table("brief", "", [])
    columns = [whole.header.index(name) for name in BRIEF_COLUMNS if name in whole.header]
    titles = [METHODS[method].title for method in BRIEF_ROWS]
    rows = [[row[k] for k in columns] for row in whole.rows if row[0] in titles]
    return Table("brief", f"{whole.title}, in short", [whole.header[k] for k in columns], rows)


def losing_table(found: list[Table]) -> Table:
    """Every case that is lost, out of all tables."""
    table = Table("losing", "Losing cases", ["where", "method", "column", "figure"])
    for other in found:
        for row in other.rows:
            lost_cells = [(name, cell) for name, cell in zip(other.header, row, strict=True) if loud(cell)]
            what = f"{row[0]}, {row[1]}" if other.header[1] == "weights" else row[0]
            table.rows += [[other.title, what, name, cell] for name, cell in lost_cells]
    return table
