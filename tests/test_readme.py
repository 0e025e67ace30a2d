"""The README keeps its word: its code runs, and it is short. Its commands, links and tables: test_docs.py."""

import re
from pathlib import Path

import torch

import flatkern

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    """What it cannot hold is in docs/."""
    assert len(README.splitlines()) <= 180 and len(README.split()) <= 1700


def test_readme_code_blocks_run_in_order():
    """All Python blocks, one after the other as a reader would paste them; the weights end clean and finite."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert not scope["opt"].is_perturbed
    assert all(torch.isfinite(p).all() for p in scope["model"].parameters())


def test_every_method_and_base_is_in_the_readme():
    for name in {name for name in flatkern.__all__ if name[0].isupper()} - {"Cost"}:
        assert re.search(rf"\b{name}\b", README), name


def test_figures_outside_of_tables_are_committed():
    (figure,) = re.findall(r'`mix="ranks"` \((\d\.\d\dx)\)', README)
    table = (ROOT / "bench" / "results" / "cpu.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith('| m-RWP, `mix="ranks"`')]
    assert figure == row.split(" | ")[3]
    assert set(re.findall(r"\b\d+\.\d+x", re.sub(r"<!-- bench.*?/bench -->", "", README, flags=re.DOTALL))) == {figure}
