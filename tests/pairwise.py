"""Few combinations of many choices, in which every two choices meet: a covering array of strength two.

Most faults that a combination shows need two choices at most, and pairs take a dozen rows where products take
thousands.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]


def rows(
    factors: Mapping[str, Sequence[str]], allowed: Callable[[Row], bool] = lambda row: True, first: Iterable[Row] = ()
) -> list[Row]:
    """Rows with a value of every factor, such that each two values that may meet do so in one of them.

    `allowed` is asked about rows that are not complete, too, and what it refuses no further value may mend. `first` are
    rows to begin with. Greedy: of a row for each order of the factors, the one in which most meet; the same in every
    run.
    """
    names, found = list(factors), list(first)
    orders = [names[k:] + names[:k] for k in range(len(names))]
    single = [frozenset([(a, x)]) for a in names for x in factors[a]]
    pairs = [frozenset([(a, x), (b, y)]) for a, b in combinations(names, 2) for x in factors[a] for y in factors[b]]
    wanted = dict.fromkeys(pairs + single)  # a set would have another order in every process
    for row in found:
        for met in met_in(row):
            wanted.pop(met, None)
    while wanted:
        start = next(iter(wanted))
        made = [_completed(dict(sorted(start)), factors, order, allowed, wanted) for order in orders]
        if made[0] is None:
            del wanted[start]  # these two exclude one another
            continue
        row = max(made, key=lambda row: sum(met in wanted for met in met_in(row)))
        for met in met_in(row):
            wanted.pop(met, None)
        found.append({name: row[name] for name in names})
    return found


def met_in(row: Row) -> list[Pair]:
    """The pairs of its values, and the values."""
    return [frozenset(pair) for pair in combinations(row.items(), 2)] + [frozenset([item]) for item in row.items()]


def _completed(row: Row, factors, order, allowed, wanted) -> Row | None:
    """`row` with a value for every other factor, each time the one that meets most values it has not met; or None."""
    if not allowed(row):
        return None
    name = next((name for name in order if name not in row), None)
    if name is None:
        return row

    def news(value: str) -> int:
        return sum(frozenset([(name, value), item]) in wanted for item in row.items())

    for value in sorted(factors[name], key=news, reverse=True):
        found = _completed(row | {name: value}, factors, order, allowed, wanted)
        if found is not None:
            return found
    return None
