"""Statistics of repeated timings, by pytest-benchmark's names and definitions, so that its tools read the files.

Written out because result files must come about where pytest-benchmark is not installed; a test compares the two.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right


class Stats:
    """Statistics of a non-empty list of seconds."""

    def __init__(self, data: list[float]) -> None:
        self.data = data
        self.median: float = statistics.median(data)

    def as_dict(self) -> dict:
        data, n = sorted(self.data), len(self.data)
        mean, total = statistics.mean(data), sum(data)
        stddev = statistics.stdev(data) if n > 1 else 0
        q1, q3 = quartiles(data)
        inner, outer = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)  # Tukey's fences
        beyond = [x for x in data if not mean - stddev <= x <= mean + stddev]
        outside = [x for x in data if not inner <= x <= outer]
        return {
            "min": data[0],
            "max": data[-1],
            "mean": mean,
            "stddev": stddev,
            "rounds": n,
            "median": self.median,
            "iqr": q3 - q1,
            "q1": q1,
            "q3": q3,
            "iqr_outliers": len(outside),
            "stddev_outliers": len(beyond),
            "outliers": f"{len(beyond)};{len(outside)}",
            "ld15iqr": data[bisect_left(data, inner)],
            "hd15iqr": data[bisect_right(data, outer) - 1],
            "ops": n / total if total else 0,
            "total": total,
        }


def quartiles(data: list[float]) -> tuple[float, float]:
    """Of sorted numbers: medians of the halves; interpolated where their number is odd."""
    n, rest = divmod(len(data), 4)
    if len(data) == 1:
        return data[0], data[0]
    if rest % 2 == 0:
        half = len(data) // 2
        return statistics.median(data[:half]), statistics.median(data[half:])
    if rest == 1:
        return 0.25 * data[n - 1] + 0.75 * data[n], 0.75 * data[3 * n] + 0.25 * data[3 * n + 1]
    return 0.75 * data[n] + 0.25 * data[n + 1], 0.25 * data[3 * n + 1] + 0.75 * data[3 * n + 2]
