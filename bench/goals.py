"""What is wanted of the kernels on a GPU, as data, and what a result file says about each.

Ratios of device times, unless a goal says otherwise; a goal over several lists takes the worst of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .methods import METHODS
from .models import MODELS
from .tables import median, pick


@dataclass(frozen=True)
class Goal:
    """A number that is wanted, and the measured one; None where a race did not run."""

    what: str
    bound: float
    least: bool  # whether the bound is the least that will do, or the most
    show: Callable[[float], str]
    value: float | None

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.least else 'at most'} {self.show(self.bound)}"

    @property
    def reached(self) -> bool:
        return self.value is not None and (self.value >= self.bound if self.least else self.value <= self.bound)


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def times(value: float) -> str:
    return f"{value:.2f}x"


def goals(results: dict) -> Iterator[Goal]:
    """Every goal, whether it could be measured or not."""
    for model in ("gpt2", "llama_1b"):
        value = perturb_share(results, model)
        yield Goal(f"{MODELS[model].title}: perturb() of RWP, of copy bandwidth", 0.9, True, percent, value)
    for model in ("gpt2", "resnet50"):
        # An eighth above what the bytes allow: 1.80, 2.00, 2.20.
        for method, bound in (("m-rwp", 2.0), ("sam", 2.25), ("asam", 2.5)):
            what = f"{MODELS[model].title}: {METHODS[method].title}, in steps of torch's fused SGD"
            yield Goal(what, bound, False, times, times_plain(results, model, method, "sgd"))
    for model in ("gpt2", "llama_1b"):
        what = f"{MODELS[model].title}: rolling RWP, bfloat16 + float32 masters, in plain AdamW steps of that layout"
        yield Goal(what, 1.1, False, times, times_same_layout(results, model))
    for method in ("m-rwp", "sam", "asam"):
        what = f"ResNet-50: {METHODS[method].title}, faster than the papers' loop"
        yield Goal(f"{what}, device", 10.0, True, times, faster(results, "papers", "resnet50", method))
        yield Goal(f"{what}, in a loop", 10.0, True, times, faster(results, "papers", "resnet50", method, loop=True))
    for model in dict.fromkeys(b["params"]["model"] for b in pick(results, "methods")):
        what = f"{MODELS[model].title}: every method, faster than _foreach around torch's fused optimizer"
        yield Goal(f"{what}, device", 2.0, True, times, faster(results, "foreach", model))
        yield Goal(f"{what}, in a loop", 2.0, True, times, faster(results, "foreach", model, loop=True))


def ours(results: dict, table: str, **params) -> list[dict]:
    return [b for b in pick(results, table, **params) if b["params"]["candidate"].startswith("flatkern ")]


def perturb_share(results: dict, model: str) -> float | None:
    """The slower of RWP's and m-RWP's perturb(), which is the same call."""
    shares = []
    for b in ours(results, "methods", model=model, dtype="float32"):
        info = b["extra_info"]
        if b["params"]["method"] in ("rwp", "m-rwp") and "copy_gigabytes_per_second" in info:
            rate = info["call_floors"]["perturb"] * MODELS[model].numel / info["calls"]["perturb"] / 1e9
            shares.append(rate / info["copy_gigabytes_per_second"])
    return min(shares, default=None)


def times_plain(results: dict, model: str, method: str, base: str) -> float | None:
    found = ours(results, "methods", model=model, method=method, base=base, dtype="float32")
    return found[0]["extra_info"].get("times_plain") if found else None


def times_same_layout(results: dict, model: str) -> float | None:
    same = dict(model=model, method="rolling", dtype="bfloat16", masters=True)
    rolling = ours(results, "dtypes", **same)
    plain = [b for b in pick(results, "dtypes", **same) if b["params"]["candidate"].startswith("plain ")]
    return median(rolling[0]) / median(plain[0]) if rolling and plain else None


def faster(results: dict, rival: str, model: str, method: str | None = None, loop: bool = False) -> float | None:
    """How many times faster than a rival we are, in the worst case."""
    found = []
    for b in ours(results, "methods", model=model, **({"method": method} if method else {})):
        same = {k: v for k, v in b["params"].items() if k != "candidate"}
        for other in pick(results, "methods", **same, candidate=rival):
            if not loop:
                found.append(median(other) / median(b))
            elif "loop" in b["extra_info"] and "loop" in other["extra_info"]:
                found.append(other["extra_info"]["loop"]["median"] / b["extra_info"]["loop"]["median"])
    return min(found, default=None)
