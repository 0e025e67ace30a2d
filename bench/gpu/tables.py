"""The findings of `make gpu` as tables in Markdown: that of the goals, and everything else in a GPU's report.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.methods import METHODS, is_plain
from bench.models import MODELS
from bench.report.tables import lost, speedup

from . import beside, goals, predictions

CORRECT = ("smoke", "tests", "sanitizer")  # stages
NOT_RUN = "not run on a GPU"
NOTHING = "-"
DIGITS = ".3g"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


# ---- correctness


def correctness(findings: list[dict]) -> dict[str, dict]:
    """Of each stage that looks for errors how it ended and what it said; stages that did not run are not there."""
    found: dict[str, dict] = {}
    for name in CORRECT:
        ends = [f for f in findings if f["kind"] == "stage" and f.get("stage") == name]
        if any(f["kind"] != "stage" and f.get("stage") == name for f in findings):
            # A run that was killed leaves findings without an end.
            last = ends[-1] if ends else {"status": "cut off", "sentence": ""}
            found[name] = {"status": last["status"], "sentence": last["sentence"]}
    # Of a run that was asked for some tests the others are those of before.
    failed = [f for f in findings if f["kind"] == "test" and f["outcome"] != "passed"]
    if failed and found["tests"]["status"] == "passed":
        found["tests"] = {"status": "FAILED", "sentence": f"{len(failed)} tests of an earlier run did not pass"}
    return found


def said(found: dict[str, dict]) -> str:
    """Correctness in a cell."""
    if not found:
        return NOT_RUN
    cells = [name if found[name]["status"] == "passed" else f"**{name} {found[name]['status']}**" for name in found]
    missing = [f"{name} not run" for name in CORRECT if name not in found]
    return ", ".join([*cells, *missing]) + (" passed" if all(f["status"] == "passed" for f in found.values()) else "")


# ---- the table of the goals


def measured_cell(goal: dict | None) -> str:
    """The figures of a goal; those that miss it in bold."""
    if goal is None or not any(goal["shown"]):
        return NOT_RUN
    pairs = zip(goal["shown"], goal["reached"], strict=True)
    return " / ".join(NOTHING if text is None else text if reached else f"**{text}**" for text, reached in pairs)


def model_says() -> str:
    triton = ".".join(predictions.oldest().split(".")[:2])
    return (
        f"*Model*: what `make gpu-model` says of the code that Triton {triton} compiles for sm_90, padded lanes and "
        "waiting included, with 80 % of all issue slots, 4 us a launch, and a copy's rate of 3.0 (H100) and 4.3 TB/s "
        "(H200); torch's fused steps by their bytes; where it says *by bytes*, bytes alone. Nothing in these columns "
        "was measured."
    )


def commit(run: dict) -> str:
    return run["commit"][:10] + (" with local changes" if run.get("dirty") else "")


def goal_table(gpus: list[str], measured: dict[str, dict]) -> str:
    """One row a goal; per GPU what the model says and what was measured."""
    names = [gpu.upper() for gpu in gpus]
    header = ["wanted", "bound", *(f"{n}, model" for n in names), *(f"{n}, measured" for n in names)]
    checked = [said(measured[gpu]["correctness"]) if gpu in measured else NOT_RUN for gpu in gpus]
    rows = [["smoke, all radii and angles, tests/test_gpu.py, compute-sanitizer's four tools", "all pass"]]
    rows[0] += [NOTHING] * len(gpus) + checked
    for k, goal in enumerate(goals.GOALS):
        cells = [measured_cell(measured[gpu]["goals"][k] if gpu in measured else None) for gpu in gpus]
        rows.append([goal.what, goal.wanted, *(goal.modelled(gpu) for gpu in gpus), *cells])
    note = [model_says()]
    for gpu in measured:
        last = measured[gpu]["runs"][-1]
        note.append(
            f"*Measured*, {gpu.upper()}: {last['date']}, {last['gpu']}, driver {last['driver']}, "
            f"torch {last['torch']}, triton {last['triton']}, commit "
            f"{', '.join(dict.fromkeys(map(commit, measured[gpu]['runs'])))}; "
            f"everything else, losing cases too, in [its report](bench/results/{gpu}/report.md)."
        )
    return markdown(header, rows) + "\n\n" + " ".join(note)


# ---- report.md


def title(row: dict) -> str:
    """Model, method, base and kind of weights of a race."""
    weights = row["dtype"] + (" + float32 masters" if row["masters"] else "")
    method = METHODS[row["method"]].title if row["method"] in METHODS else row["method"]
    model = MODELS[row["model"]].title if row["model"] in MODELS else row["model"]
    return f"{model}, {method}, {row['base']}, {weights}"


def number(value: float | None, digits: str = DIGITS, unit: str = "") -> str:
    if value is not None and digits == DIGITS and abs(value) >= 999.5:
        digits = ".0f"  # instead of 1.23e+03
    return NOTHING if value is None else f"{value:{digits}}{unit}"


def share(value: float | None) -> str:
    return number(None if value is None else 100 * value, ".0f", " %")


def race_rows(rows: list[dict]) -> list[list[str]]:
    found = []
    for row in rows:
        ours = row["candidate"] == goals.OURS
        fused = [r for r in rows if r["candidate"] == goals.FUSED and goals.same_race(r) == goals.same_race(row)]
        times = row["us"] / fused[0]["us"] if fused and fused[0]["dtype"] == row["dtype"] else None
        cell = number(times, ".2f", "x")
        if ours and row["method"] == "plain" and times is not None and round(times, 2) > 1:
            cell = lost(cell)  # the same work
        mine = [r for r in rows if r["candidate"] == goals.OURS and goals.same_race(r) == goals.same_race(row)]
        against = "" if ours or is_plain(row["candidate"]) or not mine else speedup(mine[0]["us"], row["us"])
        calls = ", ".join(f"{name} {number(call['us'])}" for name, call in row["calls"].items())
        found.append(
            [
                title(row),
                f"**{row['candidate']}**" if ours else row["candidate"],
                number(row["us"]),
                cell,
                against or NOTHING,
                number(row.get("gbs"), ".0f"),
                share(row.get("of_copy")),
                number(row.get("host_us")),
                number(row.get("loop_us")),
                share(row.get("spread")),
                str(row.get("turns", NOTHING)),
                calls,
            ]
        )
    return found


BESIDE = ["race", "Triton, us", "CUDA, us", "torch fused, us", "copy, us", "CUDA / Triton", "first", "spread"]


def beside_row(line: beside.Line) -> list[str]:
    """A copy is one that moves as many bytes as ours must."""
    times = [number(us) for us in (line.triton, line.cuda, line.fused, line.copy)]
    return [title(line.row), *times, number(line.ratio, ".2f", "x"), line.winner or NOTHING, share(line.spread)]


PARAMETERS = ["how", "bytes", "tensors", "launches", "host us", "device us", "turns", "remark"]


def parameter_row(f: dict) -> list[str]:
    numbers = [str(f[name]) if f.get(name) is not None else NOTHING for name in PARAMETERS[1:4]]
    times = [number(f.get(name)) for name in ("host_us", "device_us")]
    return [f["how"], *numbers, *times, str(f.get("turns", NOTHING)), f.get("reason") or NOTHING]


def of_stage(findings: list[dict], name: str) -> list[dict]:
    return [f for f in findings if f.get("stage") == name]


RACE = [
    "race",
    "candidate",
    "device us",
    "of torch fused",
    "we are faster by",
    "GB/s",
    "of copy",
    "host us",
    "loop us",
    "spread",
]
RACE += ["turns", "calls, us"]


def sections(found: dict) -> Iterable[tuple[str, str]]:
    """Titles and texts of report.md, those of which there is something."""
    findings = found["findings"]
    kinds = {kind: [f for f in findings if f["kind"] == kind] for kind in {f["kind"] for f in findings}}
    goal_rows = [
        [g["what"], g["wanted"], g["model"], measured_cell(g), measured_cell(by_cuda)]
        for g, by_cuda in zip(found["goals"], found["goals_by_cuda"], strict=True)
    ]
    yield "Wanted", markdown(["what", "wanted", "model, Triton", "measured, Triton", "measured, CUDA"], goal_rows)
    ends = kinds.get("stage", [])
    if ends:
        rows = [[f["stage"], f["run"], f["status"], number(f["seconds"], ".0f"), f["sentence"]] for f in ends]
        yield "Stages", markdown(["stage", "run", "status", "seconds", "what it said"], rows)
    wrong = [f for f in kinds.get("check", []) if not f["ok"]]
    wrong += [f for f in kinds.get("test", []) if f["outcome"] != "passed"]
    if wrong:
        rows = [[f["name"], f.get("outcome", "wrong"), f.get("detail", "")[:300]] for f in wrong]
        yield "What went wrong", markdown(["check", "outcome", "detail"], rows)
    side_by_side = [line for line in beside.lines(of_stage(findings, "keys")) if line.cuda is not None]
    if side_by_side:
        text = f"{beside.sentence(of_stage(findings, 'keys'))}.\n\n" + markdown(BESIDE, map(beside_row, side_by_side))
        yield "Triton's kernels and the CUDA kernels", text
    for stage, name in (("keys", "Key races"), ("rivals", "Rivals")):
        rows = race_rows([f for f in kinds.get("race", []) if f["stage"] == stage])
        if rows:
            yield name, markdown(RACE, rows)
    swept = [f for f in kinds.get("race", []) if "tuning" in f]
    if swept:
        rows = [
            [title(f), " / ".join(map(str, f["tuning"])), number(f["us"]), share(f.get("of_copy")),
             ", ".join(f"{n} {number(c['us'])}" for n, c in f["calls"].items())]
            for f in swept
        ]  # fmt: skip
        yield (
            "Tile sizes",
            markdown(["race", "tile / at most / warps / of a segment", "device us", "of copy", "calls, us"], rows),
        )
    yield from host_sections(kinds)
    if kinds.get("e2e"):
        rows = [
            [
                f["who"],
                number(f["step_us"]),
                number(f["ratio"], ".3f"),
                f"{f['q1']:.3f} to {f['q3']:.3f}",
                str(f["turns"]),
            ]
            for f in kinds["e2e"]
        ]
        yield (
            "A training step, end to end",
            markdown(["who", "step us", "of plain AdamW(fused)", "quartiles", "turns"], rows),
        )
    if kinds.get("parameters"):
        yield "Arguments by value", markdown(PARAMETERS, map(parameter_row, kinds["parameters"]))
    hinted = beside.gains(of_stage(findings, "hints"))
    if hinted:
        rows = [[title(f), number(f["us"]), f"{gain:+.1%}"] for f, gain in hinted]
        text = f"{beside.policy(of_stage(findings, 'hints'))}.\n\n"
        yield "Cache hints of the CUDA kernels", text + markdown(["race", "device us", "without hints"], rows)
    if kinds.get("counter"):
        header = ["kernel", "what", "us", "DRAM", "SM", "issue slots", "occupancy", "registers"]
        rows = [
            [f["kernel"], f["label"], number(f["us"]), *(number(f.get(k), ".0f", " %") for k in
             ("dram_percent", "sm_percent", "issue_percent", "occupancy_percent")), number(f.get("registers"), ".0f")]
            for f in kinds["counter"]
        ]  # fmt: skip
        yield "Counters", markdown(header, rows)
    if kinds.get("sanitizer"):
        rows = [
            [f["tool"], number(f["errors"], "d"), number(f["seconds"], ".0f"), f.get("reason") or NOTHING]
            for f in kinds["sanitizer"]
        ]
        yield "compute-sanitizer", markdown(["tool", "errors", "seconds", "remark"], rows)
    if kinds.get("miss"):
        rows = [
            [title({"dtype": "", "masters": False, **f}), f.get("candidate", ""), f["reason"][:300]]
            for f in kinds["miss"]
        ]
        yield "Did not run", markdown(["race", "candidate", "reason"], rows)


def host_sections(kinds: dict[str, list[dict]]) -> Iterable[tuple[str, str]]:
    """What calls cost the host, and the functions that it is in."""
    if kinds.get("host"):
        header = ["race", "candidate", "call", "us in a loop", "us on an idle device", "calls", "Python's loop, us"]
        rows = [
            [host_title(f), f["candidate"], f["call"], number(f["us"]), number(f["alone_us"]), str(f["calls"]),
             number(f["arithmetic_us"])]
            for f in kinds["host"]
        ]  # fmt: skip
        text = "Medians. *gradients* is what hands them over, and no call of an optimizer.\n\n"
        yield "The host's time", text + markdown(header, rows)
    if kinds.get("function"):
        header = ["race", "candidate", "function", "calls a step", "own us a step", "with its callees"]
        rows = [
            [host_title(f), f["candidate"], f["function"], number(f["calls"]), number(f["own_us"]),
             number(f["whole_us"])]
            for f in kinds["function"]
        ]  # fmt: skip
        text = "By cProfile, whose own price is in them.\n\n"
        yield "Functions that the host is in", text + markdown(header, rows)


def host_title(row: dict) -> str:
    return title({"dtype": "float32", "masters": False, **row})


def report(found: dict) -> str:
    """report.md."""
    lines = [f"# {found['runs'][-1]['gpu']}", "", "Written by `make gpu-report`; raw files are in `raw/`.", ""]
    for run in found["runs"]:
        lines.append(
            f"- `raw/{run['folder']}`: {run['date']}, {run['gpu']}, driver {run['driver']}, CUDA {run['cuda']}, Python "
            f"{run['python']}, torch {run['torch']}, triton {run['triton']}, flatkern {run['flatkern']}, commit "
            f"{commit(run)}"
        )
    lines += ["", f"Correctness: {said(found['correctness'])}.", ""]
    for name, text in sections(found):
        lines += [f"## {name}", "", text, ""]
    return "\n".join(lines)
