"""Benchmarks against what one would otherwise write: `python -m flatkern bench`, and `make gpu` in a checkout."""
