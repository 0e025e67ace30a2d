"""What the instructions of SASS compute (sass.py): integers, predicates, numbers."""

from __future__ import annotations

import re

import numpy as np

from bench.gpu.sass import COMPARISONS, JOINS, Array, Block, Unknown, op, to_odd, u32

SMALLEST = np.finfo(np.float32).tiny  # normal number


def u64(x: Array) -> Array:
    return x.astype(np.uint64)


def low(x: Array) -> Array:
    return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


# ---- integers


def carries(b: Block, o: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Predicates that are written, numbers, predicates that are read."""
    after = next(i for i in range(1, len(o)) if not is_predicate(o[i]))
    end = next((i for i in range(after, len(o)) if is_predicate(o[i])), len(o))
    return o[1:after], o[after:end], o[end:]


def extended(b: Block, text: str) -> Array:
    """A word as a number of 64 bits, so that adding -x carries as adding ~x and 1 does."""
    if re.match(r"-[UR]", text):
        return np.uint64(1 << 32) - u64(b.word(text[1:]))
    return u64(b.word(text))


def set_sum(
    b: Block, suffixes: list[str], target: str, total: Array, predicates: tuple[list[str], list[str]], active: Array
) -> None:
    """A sum of 32 bits, which takes carries in with .X, and the carries that it writes."""
    written, taken = predicates
    if "X" in suffixes:
        for text in taken:
            total = total + u64(b.predicate(text))
    b.set(target, low(total), active)
    for text in written:
        b.set_predicate(text, total >> np.uint64(32) > 0, active)


@op("IADD3", "UIADD3", "IADD", "VIADD")
def add(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    written, numbers, taken = carries(b, o)
    total = sum((extended(b, text) for text in numbers), np.zeros(b.threads, np.uint64))
    if "X" in suffixes:
        for text in taken:
            total = total + u64(b.predicate(text))
    b.set(o[0], low(total), active)
    for i, text in enumerate(written):
        b.set_predicate(text, total >> np.uint64(32) > i, active)


@op("IMAD", "UIMAD")
def multiply_add(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    written, numbers, taken = carries(b, o)
    first, second, third = numbers
    signed = "U32" not in suffixes
    if "WIDE" in suffixes or "HI" in suffixes:
        if signed:
            product = (b.word(first).view(np.int32).astype(np.int64) * b.word(second).view(np.int32)).view(np.uint64)
        else:
            product = u64(b.word(first)) * u64(b.word(second))
        if "WIDE" in suffixes:
            b.set_pair(o[0], product + b.pair(third), active)
            if written:
                raise Unknown("a carry of a wide product")
        else:
            b.set(o[0], low((product >> np.uint64(32)) + u64(b.word(third))), active)
        return
    total = u64(low(u64(b.word(first)) * u64(b.word(second)))) + extended(b, third)
    set_sum(b, suffixes, o[0], total, (written, taken), active)


@op("LEA", "ULEA")
def shift_add(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    written, numbers, taken = carries(b, o)
    shift = np.uint64(int(numbers[-1], 0))
    first, second = b.word(numbers[0]), extended(b, numbers[1])
    if "HI" in suffixes:
        if "SX32" in suffixes:
            whole = first.view(np.int32).astype(np.int64).view(np.uint64)
        else:
            whole = u64(first) | u64(b.word(numbers[2])) << np.uint64(32)
        total = u64(low((whole << shift) >> np.uint64(32))) + second
    else:
        total = u64(low(u64(first) << shift)) + second
    set_sum(b, suffixes, o[0], total, (written, taken), active)


@op("SHF", "USHF")
def shift_by(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    lower, upper = b.word(o[1]), b.word(o[3])
    wide = "S64" in suffixes or "U64" in suffixes
    amount = b.word(o[2])
    amount = u64(amount % (64 if wide else 32) if "W" in suffixes else np.minimum(amount, 64 if wide else 32))
    whole, signed = u64(lower) | u64(upper) << np.uint64(32), "S32" in suffixes or "S64" in suffixes
    most = np.uint64(63)
    if "L" in suffixes:
        shifted = np.where(amount > most, np.uint64(0), whole << np.minimum(amount, most))
    elif signed:
        shifted = (whole.view(np.int64) >> np.minimum(amount, most).astype(np.int64)).view(np.uint64)
    else:
        shifted = np.where(amount > most, np.uint64(0), whole >> np.minimum(amount, most))
    b.set(o[0], low(shifted >> np.uint64(32)) if "HI" in suffixes else low(shifted), active)


def look_up(table: int, a: Array, c: Array, d: Array) -> Array:
    """Bit by bit, what a table of eight says of three."""
    result = a ^ a
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (c if i & 2 else ~c) & (d if i & 1 else ~d))
    return result


@op("LOP3", "ULOP3")
def logic(b: Block, _: list[str], o: list[str], active: Array) -> None:
    written, numbers, taken = carries(b, ["", *o] if is_predicate(o[0]) else o)
    target = o[len(written)] if is_predicate(o[0]) else o[0]
    if is_predicate(o[0]):
        numbers = numbers[1:]
    value = look_up(int(numbers[3], 0), *(b.word(text) for text in numbers[:3]))
    holds = np.logical_or.reduce([value != 0, *(b.predicate(text) for text in taken)])
    b.set(target, value, active)
    for text in written:
        b.set_predicate(text, holds, active)


@op("PLOP3", "UPLOP3")
def logic_of_predicates(b: Block, _: list[str], o: list[str], active: Array) -> None:
    value = look_up(int(o[5], 0), *(b.predicate(text) for text in o[2:5]))
    b.set_predicate(o[0], value, active)
    b.set_predicate(o[1], look_up(int(o[6], 0), *(b.predicate(text) for text in o[2:5])), active)


def compare(b: Block, suffixes: list[str], o: list[str], active: Array, x: Array, y: Array) -> None:
    holds, join = COMPARISONS[suffixes[0]](x, y), JOINS[next(s for s in suffixes if s in JOINS)]
    if "EX" in suffixes:  # of two words the upper one; the last predicate is what the lower ones said
        lower = b.predicate(o[5])
        holds = (
            holds & lower
            if suffixes[0] == "EQ"
            else holds | lower
            if suffixes[0] == "NE"
            else np.where(x == y, lower, holds)
        )
    other = b.predicate(o[4])
    b.set_predicate(o[0], join(holds, other), active)
    b.set_predicate(o[1], join(~holds, other), active)


@op("ISETP", "UISETP")
def compare_integers(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    x, y = b.word(o[2]), b.word(o[3])
    if "U32" not in suffixes:
        x, y = x.view(np.int32), y.view(np.int32)
    compare(b, suffixes, o, active, x, y)


@op("SGXT")
def extend_sign(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    up = np.uint32(32) - np.minimum(b.word(o[2]), 32)
    shifted = u64(b.word(o[1])) << u64(up)
    value = low(shifted) if "U32" in suffixes else low(shifted).view(np.int32)
    b.set(o[0], (u64(value) >> u64(up) if "U32" in suffixes else value >> up.view(np.int32)).astype(np.uint32), active)


@op("POPC", "UPOPC")
def count_bits(b: Block, _: list[str], o: list[str], active: Array) -> None:
    bits = np.unpackbits(b.word(o[1])[:, None].copy().view(np.uint8), axis=1)
    b.set(o[0], bits.sum(axis=1, dtype=np.uint32), active)


@op("FLO", "UFLO")
def find_leading_one(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    word = b.word(o[1])
    if suffixes != ["U32"]:
        raise Unknown("a leading bit of another kind")
    place = np.frexp(word.astype(np.float64))[1] - 1  # -1 of zero
    b.set(o[0], place.astype(np.int32).view(np.uint32), active)


@op("VIMNMX", "VIADDMNMX")
def least(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    words = [b.word(text) for text in o[1:-1]]
    if len(words) == 3:
        words = [words[0] + words[1], words[2]]
    if "U32" not in suffixes:
        words = [word.view(np.int32) for word in words]
    value = np.where(b.predicate(o[-1]), np.minimum(*words), np.maximum(*words))
    b.set(o[0], value.view(np.uint32), active)


# ---- numbers


def flushed(x: Array, suffixes: list[str]) -> Array:
    """With .FTZ, zero instead of what is not a normal number, before and after."""
    return np.where(np.abs(x) < SMALLEST, x * 0, x) if "FTZ" in suffixes else x


def singles(b: Block, suffixes: list[str], operands: list[str]) -> list[Array]:
    return [flushed(b.single(text), suffixes) for text in operands]


def directed(rounded: Array, exact: Array, suffixes: list[str]) -> Array:
    """What was rounded to nearest; with .RM, .RP or .RZ the number on the other side of the exact one, if need be."""
    down, up = rounded > exact, rounded < exact
    if "RZ" in suffixes:
        down, up = down & (exact > 0), up & (exact < 0)
    else:
        down, up = down & ("RM" in suffixes), up & ("RP" in suffixes)
    inf = rounded.dtype.type(np.inf)
    return np.where(down, np.nextafter(rounded, -inf), np.where(up, np.nextafter(rounded, inf), rounded))


@op("FFMA")
def fused_multiply_add(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    exact = to_odd(*singles(b, suffixes, o[1:4]))
    b.set(o[0], u32(flushed(directed(exact.astype(np.float32), exact, suffixes), suffixes)), active)


@op("FMUL")
def multiply(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    x, y = singles(b, suffixes, o[1:3])
    b.set(o[0], u32(flushed(x * y, suffixes)), active)


@op("FADD")
def add_numbers(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    x, y = singles(b, suffixes, o[1:3])
    b.set(o[0], u32(flushed(x + y, suffixes)), active)


@op("FCHK")
def check_division(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    """Whether a quotient needs more than a reciprocal and its corrections; when is not documented. Here, where a
    number or the quotient is not normal, or nearly so; a dividend of zero is not."""
    exponents = [(b.word(text) >> np.uint32(23) & np.uint32(0xFF)).astype(np.int32) for text in o[1:3]]
    ordinary = (exponents[0] > 24) & (exponents[0] < 255) & (exponents[1] > 0) & (exponents[1] < 253)
    between = exponents[0] - exponents[1]
    b.set_predicate(o[0], ~(ordinary & (between > -126) & (between < 127)), active)


@op("FSETP")
def compare_numbers(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    compare(b, suffixes, o, active, *singles(b, suffixes, o[2:4]))


@op("DSETP")
def compare_doubles(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    compare(b, suffixes, o, active, b.double(o[2]), b.double(o[3]))


@op("DADD")
def add_doubles(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set_pair(o[0], b.double(o[1]) + b.double(o[2]), active)


@op("DMUL", "DFMA")
def fused_multiply_add_doubles(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    x, y, *z = (b.double(text).astype(np.longdouble) for text in o[1:])
    exact = x * y + z[0] if z else x * y  # of 64 bits instead of all, which is hardly ever seen
    b.set_pair(o[0], directed(exact.astype(np.float64), exact, suffixes), active)


@op("MUFU")
def estimate(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    name = suffixes[0]
    if name.endswith("64H"):  # the upper word of a double
        x = (u64(b.word(o[1])) << np.uint64(32)).view(np.float64)
        value = 1.0 / x if name == "RCP64H" else 1.0 / np.sqrt(x)
        return b.set(o[0], low(value.view(np.uint64) >> np.uint64(32)), active)
    x = b.single(o[1])
    value = {"RCP": lambda: 1 / x, "RSQ": lambda: 1 / np.sqrt(x), "SQRT": lambda: np.sqrt(x)}[name]()
    b.set(o[0], u32(value), active)


@op("I2FP", "I2F")
def from_integer(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    word = b.word(o[1])
    b.set(o[0], u32((word.view(np.int32) if "S32" in suffixes else word).astype(np.float32)), active)


@op("F2F")
def convert(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if suffixes[:2] == ["F64", "F32"]:
        return b.set_pair(o[0], b.single(o[1]).astype(np.float64), active)
    if suffixes[:2] == ["F32", "F64"]:
        return b.set(o[0], u32(b.double(o[1]).astype(np.float32)), active)
    if suffixes[:2] == ["F16", "F32"]:
        return b.set(o[0], b.single(o[1]).astype(np.float16).view(np.uint16).astype(np.uint32), active)
    raise Unknown("no such conversion is known")


def bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16)


@op("F2FP")
def pack(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    upper, lower = b.single(o[1]), b.single(o[2])
    if suffixes[0] == "BF16":
        value = bfloat16(upper) << np.uint32(16) | bfloat16(lower)
    else:
        halves = [x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (upper, lower)]
        value = halves[0] << np.uint32(16) | halves[1]
    b.set(o[0], value, active)


def halves(b: Block, text: str) -> list[Array]:
    """Two numbers of float16, the lower one first; .H0_H0 and .H1_H1 take one of them twice."""
    word = b.word(text.split(".")[0])
    pair = [(word >> np.uint32(shift)).astype(np.uint16).view(np.float16) for shift in (0, 16)]
    return [pair[int(name)] for name in re.findall(r"H(\d)", text)] or pair


@op("HSETP2")
def compare_halves(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if o[4] != "PT" or suffixes[1:] != ["AND"]:
        raise Unknown("halves that are compared otherwise")
    for target, x, y in zip(o[:2], halves(b, o[2]), halves(b, o[3]), strict=True):
        b.set_predicate(target, COMPARISONS[suffixes[0]](x, y), active)


@op("HADD2")
def from_half(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if "F32" not in suffixes or o[1] != "-RZ":
        raise Unknown("arithmetic of float16")
    register = o[2].lstrip("-").strip("|").split(".")[0].strip("|")
    word = b.word(register) >> np.uint32(16 if "H1" in o[2] else 0)
    number = word.astype(np.uint16).view(np.float16).astype(np.float32)
    number = np.abs(number) if "|" in o[2] else number
    b.set(o[0], u32(-number if o[2].startswith("-") else number), active)


@op("HFMA2")
def constant(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    """A constant of two halves, which is moved so."""
    if o[1] != "-RZ" or o[2] != "RZ":
        raise Unknown("arithmetic of float16")
    bits = [int(np.float16(float(text.replace("QNAN", "nan"))).view(np.uint16)) for text in o[3:5]]
    b.set(o[0], np.full(b.threads, bits[0] << 16 | bits[1], np.uint32), active)
