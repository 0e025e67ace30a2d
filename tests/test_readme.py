"""The README keeps its word: its code runs, its commands exist, its tables are the committed results."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import torch

import flatkern

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_code_blocks_run_in_order():
    """All Python blocks, one after the other as a reader would paste them; the weights end clean and finite."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert not scope["opt"].is_perturbed
    assert all(torch.isfinite(p).all() for p in scope["model"].parameters())
    assert all(torch.equal(p, s) for p, s in zip(scope["params"], scope["saved"], strict=True))


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_readme_names_only_what_exists():
    for name in set(re.findall(r"flatkern\.([A-Za-z_]+)", README)):
        is_part = importlib.util.find_spec(f"flatkern.{name}") is not None
        assert hasattr(flatkern, name) or is_part, f"flatkern.{name}"
    for path in set(re.findall(r"`((?:flatkern|csrc|bench|tests)/[\w./]+)`", README)):
        assert (ROOT / path).exists(), path


def test_readme_tables_are_the_committed_results(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # behind everything: only bench/ is looked for there
    render = importlib.import_module("bench.render")
    assert render.BLOCK.search(README), "the README has no benchmark table"
    for name in ("cpu", "parallel"):
        results = json.loads((ROOT / f"bench/results/{name}.json").read_text())
        assert render.embed(README, results) == README, name


def test_every_method_and_base_is_in_the_readme():
    for name in set(flatkern.__all__) - {"Cost", "backends", "cost"}:
        assert re.search(rf"\b{name}\b", README), name


# --- docs/methods.md ------------------------------------------------------------------------------

METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text()


class Layers(torch.nn.Module):
    """What the page's blocks speak of: layers, some of them norms."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_of_the_page_of_methods_run():
    """Each with a model, batches and an optimizer of SAM at hand, as their readers have them."""
    blocks = re.findall(r"```python\n(.*?)```", METHODS_PAGE, re.DOTALL)
    assert len(blocks) >= 6
    model = Layers()
    for block in blocks:
        perturb = flatkern.GSAM() if "rhos" in block else flatkern.SAM()
        scope = {
            "flatkern": flatkern, "torch": torch, "nn": torch.nn, "model": model,
            "opt": flatkern.SGD(model.parameters(), lr=0.1, momentum=0.9, perturb=perturb),
            "batch": torch.randn(8, 4), "shards": torch.randn(3, 8, 4),
            "loss_on": lambda x: model(x).square().mean(),
        }  # fmt: skip
        model.zero_grad()
        exec(compile(block, "docs/methods.md", "exec"), scope)
        scope["opt"].eval()
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_page_states_the_floors_of_cost():
    """Bytes per float32 parameter of SGD with momentum and of AdamW."""
    rows = [line.strip("| ").split(" | ") for line in METHODS_PAGE.splitlines() if line.startswith("| [")]
    made = {
        "RWP, ARWP": [flatkern.RWP()], "m-RWP, m-ARWP": [flatkern.RWP(lam=0.5)],
        "SAM, ASAM": [flatkern.SAM(), flatkern.ASAM(all_tensors=True)], "mixed SAM": [flatkern.SAM(lam=0.7)],
        "GSAM": [flatkern.GSAM()], "Friendly-SAM": [flatkern.FriendlySAM()], "LookSAM": [flatkern.LookSAM()],
        "Momentum-SAM": [flatkern.MomentumSAM()],
        "Momentum-SAM, rolling": [flatkern.MomentumSAM(rolling=True)],
        "RWP, rolling": [flatkern.RWP(rolling=True)],
    }  # fmt: skip
    found = {}
    for name, _, sgd, adamw, *rest in rows:
        key = re.match(r"\[(.*?)\]", name).group(1)
        if key in made:
            found[key] = [[float(v) for v in cell.split(", ")] for cell in (sgd, adamw)]
        for rolling in re.findall(r"rolling: (\d+) and (\d+)", " ".join(rest)):
            found[f"{key.split(', ')[0]}, rolling"] = [[float(v)] for v in rolling]
    assert found.keys() == made.keys()
    for key, methods in made.items():
        for column, rule in enumerate((flatkern.SGD, flatkern.AdamW)):
            own = {"momentum": 0.9} if rule is flatkern.SGD else {}
            costs = [flatkern.cost(rule([torch.nn.Parameter(torch.ones(64, 48))], perturb=m, **own)) for m in methods]
            assert found[key][column] == [round(c.bytes_moved / c.parameters, 1) for c in costs], key
