"""What is wanted of the kernels on a GPU, as data: each row of the documents' table with its bounds, what a model says,
and where the measured figures are among the findings of `make gpu`.

Times are device times, medians, of candidates that took turns; a share of copy is against a copy of the same minute on
the same card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import predictions

Finding = dict
Values = tuple["float | None", ...]

OURS = "flatkern triton"
PLAIN_OURS = "plain flatkern triton"
CUDA = "flatkern cuda"
PLAIN_CUDA = "plain flatkern cuda"
NO_HINTS = f"{CUDA}, no hints"  # those of another library
FUSED = "torch fused"
# In stage e2e.
ROLLING, ROLLING_CUDA = "rolling RWP", "rolling RWP, cuda"


@dataclass(frozen=True)
class Goal:
    """A row: one measure on one or more lists. Where several numbers stand in a row, so do several bounds."""

    what: str
    bounds: tuple[float, ...]
    least: bool  # whether a bound is the least that will do, or the most
    show: Callable[[float], str]
    measure: Callable[[Sequence[Finding]], Values]
    model: predictions.Says  # of a GPU: what arithmetic and compiled code say, before anything has run

    @property
    def wanted(self) -> str:
        bounds = self.bounds if len(set(self.bounds)) > 1 else self.bounds[:1]
        return f"{'at least' if self.least else 'at most'} {' / '.join(map(self.show, bounds))}"

    def reached(self, values: Values) -> list[bool]:
        """For each number whether it will do; one that was not measured does not."""
        pairs = zip(values, self.bounds, strict=True)
        return [v is not None and (v >= bound if self.least else v <= bound) for v, bound in pairs]

    def modelled(self, gpu: str) -> str:
        return self.model(gpu) or "-"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def times(value: float) -> str:
    return f"{value:.2f}x"


def microseconds(value: float) -> str:
    return f"{value:.0f} us"


# ---- reading findings


def races(findings: Sequence[Finding], **fields: object) -> Iterator[Finding]:
    """Candidates of races with these fields; a sweep's are not among them, as its tunings are no users'."""
    for found in findings:
        if found["kind"] == "race" and "tuning" not in found and all(found.get(k) == v for k, v in fields.items()):
            yield found


def by_cuda(findings: Sequence[Finding]) -> list[Finding]:
    """The same findings as if the CUDA kernels were ours, and Triton's nobody's."""
    named = {OURS: "", PLAIN_OURS: "", CUDA: OURS, PLAIN_CUDA: PLAIN_OURS}
    trained = {ROLLING: "", ROLLING_CUDA: ROLLING}
    return [
        {**f, **{key: names.get(f[key], f[key]) for key, names in (("candidate", named), ("who", trained)) if key in f}}
        for f in findings
    ]


def same_race(row: Finding) -> dict[str, object]:
    return {name: row.get(name) for name in ("stage", "race", "model", "method", "base")}


def ours_against(findings: Sequence[Finding], rival: str, **fields: object) -> float | None:
    """Our time as a multiple of a rival's in the same race; None where one of them is missing."""
    for row in races(findings, candidate=OURS, **fields):
        for other in races(findings, candidate=rival, **same_race(row)):
            if rival == FUSED and other["dtype"] != row["dtype"]:
                continue
            return row["us"] / other["us"]
    return None


def share_of_copy(findings: Sequence[Finding], model: str) -> float | None:
    for row in races(findings, candidate=OURS, model=model, method="m-rwp", dtype="float32"):
        share = row["calls"].get("perturb", {}).get("of_copy")
        if share is not None:
            return share
    return None


def faster_than(findings: Sequence[Finding], rival: str, **fields: object) -> float | None:
    """How many times faster we are than a rival, on the list where that is least."""
    found = [
        other["us"] / row["us"]
        for row in races(findings, candidate=OURS, stage="rivals", method="m-rwp", **fields)
        for other in races(findings, candidate=rival, **same_race(row))
    ]
    return min(found, default=None)


def host_time(findings: Sequence[Finding]) -> float | None:
    """The dearest call of m-RWP on ResNet-50's 161 tensors, microseconds of the host."""
    rows = races(findings, candidate=OURS, stage="keys", model="resnet50", method="m-rwp", base="sgd")
    spent = [call["host_us"] for row in rows for call in row["calls"].values() if call.get("host_us") is not None]
    return max(spent, default=None)


def end_to_end(findings: Sequence[Finding]) -> float | None:
    found = [f["ratio"] for f in findings if f["kind"] == "e2e" and f["who"] == ROLLING]
    return found[-1] if found else None


def spread(findings: Sequence[Finding]) -> Finding | None:
    """The same training twice: what a ratio moves by when nothing differs."""
    found = [f for f in findings if f["kind"] == "e2e" and f["who"] == "plain again"]
    return found[-1] if found else None


# ---- the rows

ASCENTS = (("m-rwp", 2.0), ("sam", 2.25), ("asam", 2.5))
# The calls of a step, as the model has them.
ASCENT_CALLS = (("perturb", "sgd, two gradients"), ("sam", "sgd, restoring"), ("asam", "sgd, restoring"))
ROLLING_MASTERS, PLAIN_MASTERS = "adamw, rolling, masters", "adamw, masters"


def against_fused(*races: tuple[str, str, str]) -> Callable[[Sequence[Finding]], Values]:
    """Our time in steps of torch's fused optimizer, float32; of races of a model, a method and a base."""

    def measure(found: Sequence[Finding]) -> Values:
        return tuple(
            ours_against(found, FUSED, model=model, method=method, base=base, dtype="float32")
            for model, method, base in races
        )

    return measure


def ascents(model: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((model, method, "sgd") for method, _ in ASCENTS)


def modelled_ascents(model: str) -> predictions.Says:
    return predictions.in_steps(predictions.fused("sgd"), *((model, calls) for calls in ASCENT_CALLS))


def always(text: str) -> predictions.Says:
    """What no model computes."""
    return lambda gpu: text


GOALS = (
    Goal(
        "`perturb()`, float32, share of a copy's rate: GPT-2, Llama 1.1B",
        (0.9, 0.9), True, percent,
        lambda found: (share_of_copy(found, "gpt2"), share_of_copy(found, "llama_1b")),
        predictions.shares_of_copy("perturb", "gpt2", "llama_1b"),
    ),
    Goal(
        "m-RWP / SAM / ASAM on GPT-2, float32, in steps of torch's fused SGD",
        tuple(bound for _, bound in ASCENTS), False, times, against_fused(*ascents("gpt2")),
        modelled_ascents("gpt2"),
    ),
    Goal(
        "the same on ResNet-50",
        tuple(bound for _, bound in ASCENTS), False, times, against_fused(*ascents("resnet50")),
        modelled_ascents("resnet50"),
    ),
    Goal(
        "rolling RWP on GPT-2, bfloat16 + float32 masters, in our plain AdamW steps of that layout",
        (1.1,), False, times,
        lambda found: (ours_against(found, PLAIN_OURS, model="gpt2", method="rolling", base="adamw", masters=True),),
        predictions.in_steps(predictions.plain(PLAIN_MASTERS), ("gpt2", (ROLLING_MASTERS,))),
    ),
    Goal(
        "rolling RWP, float32, in steps of torch's fused SGD: GPT-2, ResNet-50",
        (1.25, 1.25), False, times,
        against_fused(("gpt2", "rolling", "sgd"), ("resnet50", "rolling", "sgd")),
        predictions.in_steps(
            predictions.fused("sgd"), *((model, ("sgd, rolling",)) for model in ("gpt2", "resnet50"))
        ),
    ),
    Goal(
        "AdamW with IRE, masks included, in steps of torch's fused AdamW: GPT-2, ResNet-50",
        (1.15, 1.15), False, times,
        against_fused(("gpt2", "ire", "adamw"), ("resnet50", "ire", "adamw")),
        predictions.in_steps(
            predictions.fused("adamw"), *((model, ("adamw, IRE", "mask")) for model in ("gpt2", "resnet50"))
        ),
    ),
    Goal(
        "m-RWP faster than the papers' loop, ResNet-50",
        (15.0,), True, times, lambda found: (faster_than(found, "papers", model="resnet50"),),
        always("2.4 by bytes, the rest is launches"),
    ),
    Goal(
        "m-RWP faster than `_foreach` around torch's fused step, worst list",
        (2.0,), True, times, lambda found: (faster_than(found, "foreach"),),
        always("2.4 by bytes at most"),
    ),
    Goal(
        "host time of a call on 161 tensors",
        (60.0,), False, microseconds, lambda found: (host_time(found),),
        always("12 to 50 us and the driver's part"),
    ),
    Goal(
        "a training step of a small GPT under bfloat16 autocast: rolling RWP against plain AdamW(fused)",
        (1.02,), False, times, lambda found: (end_to_end(found),),
        always("-"),
    ),
)  # fmt: skip
