"""The places that hold an operation agree: table, reference, compiled modules, registered ops, cases and variants."""

import copy
import importlib
import inspect
import re

import cases
import laws
import pytest
import test_mask  # noqa: F401  (these note their laws)
import test_reference  # noqa: F401
import test_reference_updates  # noqa: F401
import torch
from compare import bits
from conftest import compiled

import flatkern
from flatkern.dispatch import PREFERENCE, compiled_module
from flatkern.ops import OPS

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
REDUCTIONS = {"filter_norms_", "ascent_norm_", "gradient_norm_", "gradient_products_"}


def expected(op):
    return [(a.name, a.keyword_only) for a in op.arguments]


def reference(op):
    return getattr(importlib.import_module(f"flatkern.reference.{op.family}"), op.name)


def test_names():
    """An op's name ends in `_`, because it mutates, and is the key of its row."""
    assert all(name == op.name and name.endswith("_") for name, op in OPS.items())


@every_op
def test_the_schema_is_one_of_torch(op):
    schema = torch._C.parse_schema(f"flatkern::{op.name}{op.schema}")
    assert [(a.name, a.kwarg_only) for a in schema.arguments] == expected(op)
    assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == list(op.writes)
    for ours, torchs in zip(op.arguments, schema.arguments, strict=True):
        names = {"Tensor": "Tensor", "Tensor[]": "List[Tensor]", "float[]": "List[float]", "int[]": "List[int]"}
        names |= {"bool[]": "List[bool]"}
        plain = names[ours.type.removesuffix("?")]
        assert str(torchs.type) == (f"Optional[{plain}]" if ours.type.endswith("?") else plain)
    assert not schema.returns


@every_op
def test_the_order_of_arguments(op):
    """Mutated tensors, inputs, device scalars, host scalars; the last keyword-only."""
    kinds = [
        3 if a.keyword_only else 0 if a.mutated else 1 if a.type.startswith("Tensor[]") else 2 for a in op.arguments
    ]
    assert kinds == sorted(kinds)
    assert all(a.type in ("float[]", "int[]", "bool[]") for a in op.arguments if a.keyword_only)


@every_op
def test_the_reference_takes_these_arguments(op):
    parameters = inspect.signature(reference(op)).parameters.values()
    assert [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters] == expected(op)
    assert all(p.default is p.empty for p in parameters)


@every_op
def test_the_reference_says_what_it_does(op):
    """The first line in words, then the equation, which names what is written."""
    first, _, rest = inspect.getdoc(reference(op)).partition("\n\n")
    assert first.endswith(".")
    assert re.search(r"<-|=", rest), "no equation"


@every_op
def test_compiled_modules_take_these_arguments(op):
    for backend in compiled(op):
        if not flatkern.backends()[backend]["live"]:
            pytest.skip(f"{backend} is not live: {flatkern.backends()[backend]['reason']}")
        first = getattr(compiled_module(backend), op.name).__doc__.splitlines()[0]
        inside = re.fullmatch(rf"{op.name}\((.*)\) -> None", first)[1]
        positional, _, keywords = inside.partition("*, ")
        found = [(name, False) for name in re.findall(r"(\w+):", positional)]
        found += [(name, True) for name in re.findall(r"(\w+):", keywords)]
        assert found == expected(op)
        optional = {name for name in re.findall(r"(\w+): [^:]* \| None", inside)}
        assert optional == {a.name for a in op.arguments if a.type.endswith("?")}


@every_op
def test_backends_are_known(op):
    known = {name for names in PREFERENCE.values() for name in names}
    assert set(op.backends.split()) <= known - {"eager"}


@every_op
def test_the_registered_op_has_the_schema(op):
    registered = getattr(torch.ops.flatkern, op.name).default._schema
    assert str(registered) == str(torch._C.parse_schema(f"flatkern::{op.name}{op.schema}"))


@every_op
def test_cases_make_these_arguments(op):
    """In the schema's order, each optional argument in at least one variant, and the same values twice."""
    present = set()
    for words in ("", *cases.VARIANTS[op.name]):
        values = getattr(cases, op.name)([(3, 5), (4,), ()], torch.float32, variant=words)
        assert list(values) == [a.name for a in op.arguments]
        for argument in op.arguments:
            value = values[argument.name]
            assert value is not None or argument.type.endswith("?")
            assert value is None or isinstance(value, list) == ("[]" in argument.type)
        present |= {name for name, value in values.items() if value is not None}
    assert present == {a.name for a in op.arguments}


@every_op
def test_cases_are_reproducible_and_not_trivial(op):
    once, again = (
        getattr(cases, op.name)(cases.SHAPES["vector ends"], cases.FLOATS, variant=cases.VARIANTS[op.name][0])
        for _ in range(2)
    )
    for argument in op.arguments:
        a, b = once[argument.name], again[argument.name]
        if a is None or not argument.type.startswith("Tensor"):
            assert a == b
            continue
        for x, y in zip(*(v if isinstance(v, list) else [v] for v in (a, b)), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())
            assert x.data_ptr() != y.data_ptr() or x.numel() == 0
        if isinstance(a, list) and argument.name not in ("norms", "history", "steps", "masters", "masks"):
            assert {t.dtype for t in a} == set(cases.FLOATS)
    for argument in op.arguments:
        # A kernel that takes the scalar of another entry has to be seen.
        if argument.keyword_only and argument.name not in ("offset", "grad_weight", "clean_weight", "eta"):
            assert len(set(once[argument.name])) > 1, argument.name


@every_op
def test_reads_and_tolerances(op):
    """`reads` names tensor arguments; only reductions may differ from eager."""
    assert set(op.reads.split()) <= {a.name for a in op.arguments if a.type.startswith("Tensor[]")}
    assert (op.ulp > 0) == (op.name in REDUCTIONS)


@every_op
def test_the_reference_writes_what_the_schema_says(op):
    """Over all variants, every marked argument changes, and no other one does."""
    written = set()
    for words in cases.VARIANTS[op.name]:
        values = getattr(cases, op.name)([(3, 5), (4,)], torch.float32, variant=words)
        before = copy.deepcopy(values)
        cases.call(torch.no_grad()(reference(op)), op, values)
        for argument in op.arguments:
            a, b = values[argument.name], before[argument.name]
            if argument.type.startswith("Tensor") and a is not None:
                pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
                if any(not torch.equal(bits(x), bits(y)) for x, y in pairs):
                    written.add(argument.name)
    assert written == set(op.writes)


def test_every_op_has_a_law():
    """An op of which tests know no more than that backends agree is not understood."""
    assert set(laws.LAWS) == set(OPS)
