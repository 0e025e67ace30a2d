"""Reading whole lists of tensors in one compiled pass: nothing beyond an end, and refused is what is no tensor."""

import pytest
import torch
from compare import copies

SHAPES = [(3, 5), (0,), (), (4, 0), (2, 3, 4, 5)]


@pytest.fixture
def lists():
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    return params, None, copies(params)


def test_what_did_not_change_is_the_object_given(native, lists):
    noise = torch.zeros(3, dtype=torch.int64)
    for given in ((*lists, noise, None), lists[1:], ([], None), (noise, lists[0]), (noise, lists[0], noise)):
        reading = native.describe(given, b"", b"", b"")
        again = native.describe(given, *reading)
        assert all(a is b for a, b in zip(again, reading, strict=True))
        # Pieces of earlier results, and what never was one.
        pointers, singles, layouts = reading
        for wrong in (layouts[:8], layouts[:-8], layouts + bytes(8), b"abc"):
            assert native.describe(given, pointers[:8], singles + bytes(8), wrong) == reading


def test_what_is_read(native, lists):
    """Pointers list by list and those of single tensors, apart; and which argument is which is part of the layouts."""
    a, _, b = lists
    single = torch.zeros(())
    pointers, singles, layouts = native.describe((a, single, None, b), b"", b"", b"")
    assert memoryview(pointers).cast("q").tolist() == [t.data_ptr() for t in [*a, *b]]
    assert memoryview(singles).cast("q").tolist() == [single.data_ptr()]
    for other in ((a, None, single, b), (a, single, b), (a, [single] * len(a), None, b)):
        assert native.describe(other, b"", b"", b"")[2] != layouts
    one = [single]
    assert native.describe((one, single), b"", b"", b"")[2] != native.describe((single, one), b"", b"", b"")[2]


BAD = {
    "lists of two lengths": lambda lists: (lists[0], lists[2][:-1]),
    "no list at all": lambda lists: (None, lists[0][0]),
    "a number for a list": lambda lists: (lists[0], 3),
    "a string for a tensor": lambda lists: (["weights"],),
    "sparse": lambda lists: ([lists[2][0].to_sparse()],),
    "no tuple": lambda lists: [lists[0]],
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_what_is_refused(spoil, native, lists):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        native.describe(spoil(lists), b"", b"", b"")


def test_memory_that_was_taken_away(native):
    t = torch.randn(7)
    t.untyped_storage().resize_(0)
    for given in (([t],), ([torch.zeros(2)], t)):
        with pytest.raises(ValueError, match="no memory"):
            native.describe(given, b"", b"", b"")


def test_same_items_compares_objects(native):
    lists = ([1.5, 2.5], (3,))
    assert native.same_items(lists, tuple(x[:] for x in lists))
    for other in (([1.5], (3,)), ([1.5, float("2.5")], (3,)), lists[:1], ([1.5, 2.5], 3), [*lists]):
        assert not native.same_items(lists, other)
    assert native.same_items(([],), ([],)) and not native.same_items((3,), (3,))
