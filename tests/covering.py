"""`make test` runs a covering choice of tests; `make test-matrix` runs the others, and pytest by itself runs all.

Tests with several parameters are the many. Of each, `--covering` keeps few combinations, in which every two values of
two parameters meet that meet in all of them: most faults that a combination shows need two of its values at most. A
mark says otherwise where a combination takes long: `covering(1)` keeps every value of every parameter, `matrix` none.
`covering(each="op")` chooses for each operation by itself: the same words may mean other code for another one.
"""

import heapq
from collections import defaultdict
from itertools import combinations

import pytest

OPTIONS = "covering", "left_out"
LEFT_OUT = pytest.StashKey[tuple[int, int]]()  # how many of how many tests


def pytest_addoption(parser):
    group = parser.getgroup("flatkern")
    group.addoption("--covering", action="store_true", help="few combinations of parameters, in which every two meet")
    group.addoption("--left-out", action="store_true", help="only what --covering leaves out")


def key(value):
    """Equal for equal values, within a process: what has no value of its own is only equal to itself."""
    if isinstance(value, (tuple, list)):
        return tuple(map(key, value))
    if isinstance(value, dict):
        return tuple((k, key(v)) for k, v in value.items())
    text = repr(value)
    return id(value) if " at 0x" in text else text


def chosen(rows, strength):
    """Numbers of few of the `rows` ({parameter: value}) that have each combination of `strength` values that one has.

    Greedy: always the one that has most of those that are missing, the first of several; the same in every process.
    """
    had = [set(combinations(sorted((name, key(value)) for name, value in row.items()), strength)) for row in rows]
    missing = set().union(*had)
    heap = [(-len(has), k) for k, has in enumerate(had)]
    heapq.heapify(heap)
    kept = []
    while missing:
        _, k = heapq.heappop(heap)
        news = len(had[k] & missing)
        if heap and (-news, k) > heap[0]:  # it was overtaken by others: what it has is no longer missing
            heapq.heappush(heap, (-news, k))
        elif news:
            kept.append(k)
            missing -= had[k]
    return kept


def also(*values):
    """Parameters that only `make test-matrix` runs with."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.matrix) for row in rows]


def also_of(named, further):
    """Named parameters; with the `further` ones only `make test-matrix` runs."""
    marks = {name: [pytest.mark.matrix] * (name in further) for name in named}
    rows = {name: value if isinstance(value, tuple) else (value,) for name, value in named.items()}
    return [pytest.param(*row, id=name, marks=marks[name]) for name, row in rows.items()]


def covering(items):
    """Those of the tests that `--covering` keeps."""
    alike, kept = defaultdict(list), set()
    for item in items:
        if item.get_closest_marker("matrix"):
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if len(params) < 2:
            kept.add(item)
            continue
        strength, each = choice_of(item)
        alike[item.nodeid.partition("[")[0], key(each and params[each]), strength].append(item)
    for (_, _, strength), same in alike.items():
        kept.update(same[k] for k in chosen([item.callspec.params for item in same], strength))
    return kept


def choice_of(item):
    """How many values meet in every combination, and the parameter for each of whose values that is so by itself."""
    mark = item.get_closest_marker("covering")
    return (*(mark.args or (2,)), mark.kwargs.get("each")) if mark else (2, None)


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    if not any(config.getoption(name) for name in OPTIONS):
        return
    kept = covering(items)
    if config.getoption("left_out"):
        kept = set(items) - kept
    dropped = [item for item in items if item not in kept]
    config.stash[LEFT_OUT] = len(dropped), len(items)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash[LEFT_OUT]
    items[:] = [item for item in items if item in kept]
    config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What a worker of xdist has left out, told to who prints the summary."""
    if "left_out" in getattr(node, "workeroutput", {}):
        node.config.stash[LEFT_OUT] = node.workeroutput["left_out"]


def pytest_terminal_summary(terminalreporter, config):
    count, of = config.stash.get(LEFT_OUT, (0, 0))
    if config.getoption("covering") and count:
        terminalreporter.write_line(
            f"left out: {count} of {of} tests, further combinations of parameters whose every two values have met, and "
            "what takes long; `make test-matrix` runs them",
            yellow=True,
        )
