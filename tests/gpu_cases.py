"""Which calls test_gpu.py makes: of Triton few, as every mixture of arguments, dtypes and shapes compiles its kernels.

Each two optional arguments of an op meet, and each meets both kinds of tensors; test_gpu_plan.py counts the kernels.
The CUDA kernels are there already, so that they have all variants of cases.py besides, on rows of every length.
"""

import itertools
from typing import NamedTuple

import cases
import pairwise
from emulated import CUDA
from walks import EVERY_WAY, variants

from flatkern.checks import WALKS_FILTERS
from flatkern.ops import OPS, Op

TRITON = [op for op in OPS.values() if "triton" in op.backends.split()]
# Rows, vectors, and what is too long for a program, three positions apart: in one call each of them has one mixture of
# dtypes, and others in other calls. No length but the last is a multiple of eight.
ANY_SHAPES = [(3, 5), (33,), (3, 70001), (63, 2, 2, 3), (), (300000,)]
# What is empty is a multiple of everything.
EVEN_SHAPES = [(64, 64, 3, 3), (256, 16), (64,), (8, 8192), (0,), (4, 0), (2, 65536)]
# More than the arguments of a launch have room for, with few elements.
MANY_SHAPES = [(3, 16), (33,)] * 1000
EVEN, ANY = "multiples of 16 bytes", "any"
ROWS, MIXED, MANY, MANY_MIXED = "every row", "every row, mixed", "many", "many, mixed"
SHAPES = {EVEN: EVEN_SHAPES, ANY: ANY_SHAPES} | dict.fromkeys((ROWS, MIXED), EVERY_WAY["cuda"])
SHAPES |= dict.fromkeys((MANY, MANY_MIXED), MANY_SHAPES)
# Words of which a call has one at most; the others are there or not.
EITHER = [("found_inf", "skip"), ("second", "third"), ("zero", "infinite")]
# What a test captures; noise, gradients and device scalars are read where they lie.
REPLAYED = {
    "sgd_update_": "momentum_buffers backups history lrs sigmas noise captured grad_scale found_inf",
    "adamw_update_": "backups history lrs sigmas noise captured grad_scale found_inf",
}


class Case(NamedTuple):
    """One call."""

    op: Op
    words: str
    kind: str
    turn: int  # by which the dtypes of a mixture are turned

    def __str__(self):
        return f"{self.op.name}-{self.kind}-{self.words or 'nothing'}"

    @property
    def repeats(self):
        """Whether more tensors of the same shapes are launched alike: what a vector draws begins elsewhere in each."""
        return self.kind == EVEN and "offset" not in self.words.split()

    def make(self, device, times=1, shapes=None):
        """Its arguments; `shapes` instead of its own, or those `times` over."""
        dtypes = cases.FLOATS[:1]
        if self.kind in (ANY, MIXED, MANY_MIXED):
            dtypes = cases.FLOATS[self.turn :] + cases.FLOATS[: self.turn]
        return getattr(cases, self.op.name)((shapes or SHAPES[self.kind]) * times, dtypes, device, self.words)


def factors_of(op):
    """What a call of `op` may have: optional arguments, as the schema names them, and words of cases.VARIANTS."""
    words = dict.fromkeys(a.name for a in op.arguments if a.type.endswith("?"))
    words |= dict.fromkeys(word for variant in cases.VARIANTS[op.name] for word in variant.split())
    factors = {}
    for word in words:
        either = next((group for group in EITHER if word in group), (word,))
        factors[either[0]] = ("", *(w for w in either if w in words))
    return factors


def allowed(op):
    """Where a norm is measured inside, the clean weights are known; what concerns noise alone comes with noise, and a
    component or new means with what they are made of; the first digit of NaNs is not compared, as their bits are
    nobody's."""
    names = {a.name for a in op.arguments}

    def is_allowed(row):
        def is_absent(name):
            return name in names and row.get(name) == ""

        if (row.get("component") and is_absent("clean_grads")) or (row.get("new_means") and is_absent("means")):
            return False
        if op.name == "count_magnitudes_":
            return not (row.get("specials") and row.get("second") == "")
        if op.name == "perturb_gaussian_":
            return not (is_absent("norms") and is_absent("backups") and is_absent("masters"))
        if is_absent("noise"):
            return not row.get("offset") and not row.get("captured")
        return not (row.get("noise") and is_absent("backups") and is_absent("masters"))

    return is_allowed


def first_of(op):
    """Rows that are written by hand: what is captured, and in cases.VARIANTS what is special."""
    variants = [set(words.split()) for words in cases.VARIANTS[op.name]]
    if op.name == "adam_update_":  # what is special there, is in AdamW
        variants = []
    elif op.family == "update":
        special = [words for words in variants if {"specials", "offset"} & words]
        variants = [words for words in special if not any(words < others for others in special)]
    chosen = [set(REPLAYED[op.name].split())] if op.name in REPLAYED else []
    for words in chosen + variants:
        yield {name: next((v for v in values if v in words), "") for name, values in factors_of(op).items()}


def cases_of(op):
    """Every op has both kinds, the one that needs fewer kernels more often: where calls go by rows, any tensors."""
    rows = pairwise.rows(factors_of(op), allowed(op), first_of(op)) or [{}]
    calls, turns = {True: 0, False: 0}, itertools.cycle(range(3))
    for row in rows if len(rows) > 1 else rows * 2:
        words = set(row.values()) - {""}
        by_rows = op.name in WALKS_FILTERS or bool({"noise", "history", "masks"} & words)
        k, calls[by_rows] = calls[by_rows], calls[by_rows] + 1
        kind = (EVEN, ANY)[(k % 3 > 0) == by_rows]
        yield Case(op, " ".join(filter(None, row.values())), kind, next(turns) if kind == ANY else 0)


CASES = [case for op in TRITON for case in cases_of(op)]
# Of the CUDA kernels alone.
CUDA_CASES = [Case(op, words, kind, 0) for op in CUDA for words in variants(op, "cuda") for kind in (ROWS, MIXED)]
CUDA_CASES += [Case(op, max(cases.VARIANTS[op.name], key=len), kind, 0) for op in CUDA for kind in (MANY, MANY_MIXED)]


def cases_by(backend):
    """All calls of a backend."""
    return [case for case in CASES if backend in case.op.backends.split()] + (CUDA_CASES if backend == "cuda" else [])


def replayed(name):
    words = set(REPLAYED[name].split())
    return next(case for case in CASES if case.op.name == name and set(case.words.split()) == words)
