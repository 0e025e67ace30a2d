"""Clocks, interleaved rounds, statistics, and what memory allows."""
