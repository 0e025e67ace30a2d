"""All tables of a result file, whatever was measured."""

from __future__ import annotations

from .gpu_tables import gpu_tables
from .tables import Table, cpu_tables


def tables(results: dict) -> list[Table]:
    """Everything that a result file has to show."""
    return gpu_tables(results) if "gpu" in results["machine_info"] else cpu_tables(results)
