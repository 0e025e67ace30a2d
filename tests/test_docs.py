"""The pages of docs/ keep their word: their code runs, their links lead somewhere, their tables are what is committed.

All of it by the standard library; `make docs` builds the site.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import flatkern
from flatkern.ops import OPS
from flatkern.optim.phase import BETWEEN_STEPS, TRANSITIONS, Phase

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
DOCUMENTS = {f"docs/{name}": text for name, text in PAGES.items()}
DOCUMENTS |= {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def code(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# --- code -----------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """What pages speak of: layers, some of them norms. PEFT's models can merge an adapter."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def merge_adapter(self):
        pass

    unmerge_adapter = merge_adapter


def at_hand():
    """What a reader has when a page begins; classes of training libraries are only called."""
    model = Layers()
    library = dict.fromkeys(("Trainer", "FlatkernTrainer", "FlatkernCallback", "LoraConfig"), lambda *_, **__: None)
    return library | {
        "flatkern": flatkern, "torch": torch, "nn": torch.nn, "model": model, "args": None, "data": None,
        "batches": list(torch.randn(8, 8, 4)), "batch": torch.randn(8, 4), "shards": torch.randn(3, 8, 4),
        "loss_on": lambda x: model(x).square().mean(), "get_peft_model": lambda base, _: base,
    }  # fmt: skip


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if code(text)])
def test_code_of_a_page_runs(page):
    """Block after block, as a reader would paste them; weights end clean and finite."""
    torch.manual_seed(0)
    scope = at_hand()
    for block in code(PAGES[page]):
        scope["model"].zero_grad()
        before = [p.detach().clone() for p in scope["model"].parameters()]
        exec(compile(block, f"docs/{page}", "exec"), scope)
        if "opt" in scope:
            scope["opt"].eval()
            assert not scope["opt"].is_perturbed
        assert all(torch.isfinite(p).all() for p in scope["model"].parameters())
        if "flatkern.restore_(" in block:
            assert all(map(torch.equal, scope["model"].parameters(), before))


def test_the_start_page_says_what_the_readme_says():
    """Which method when, word for word."""
    tables = [
        re.search(r"\| you want \|.*?\n\n", text, re.DOTALL)[0] for text in (PAGES["index.md"], DOCUMENTS["README.md"])
    ]
    assert tables[0] == tables[1]


def test_the_start_page_has_code():
    assert len(code(PAGES["index.md"])) >= 4


# --- links and names ------------------------------------------------------------------------------


def slugs(text):
    """The anchors of a page's headings, as Git hosts and the site make them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(name, text, documents):
    """Links of a document that lead nowhere; images are links, too."""
    dead = []
    for target in re.findall(r"\]\(([^()\s]+)\)", FENCE.sub("", text)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        there = path.resolve().relative_to(ROOT).as_posix()
        made_later = there == "docs/changelog.md"  # of CHANGELOG.md, for the site alone
        if not (path.exists() or made_later) or (anchor and anchor not in slugs(documents.get(there, ""))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    assert not dead_links(name, DOCUMENTS[name], DOCUMENTS)


def test_dead_links_are_found():
    here = "docs/index.md"
    text = "# A title, of sorts\n[a](#a-title-of-sorts) [b](../README.md) ![c](images/speed.svg)\n```\n[x](y.md)\n```\n"
    assert not dead_links(here, text, {here: text})
    for target in ("nowhere.md", "#a-title", "../nowhere.md", "cycle.md#nowhere", "images/nowhere.svg"):
        text = f"# A title, of sorts\n[a]({target})"
        assert dead_links(here, text, DOCUMENTS | {here: text}) == [target]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_names_and_paths_exist(name):
    text = DOCUMENTS[name]
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", text, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), f"make {command}"
    for attribute in set(re.findall(r"\bflatkern\.([A-Za-z_]+)", text)):
        is_part = importlib.util.find_spec(f"flatkern.{attribute}") is not None
        assert hasattr(flatkern, attribute) or is_part or attribute == "_CUDA", f"flatkern.{attribute}"
    for path in set(re.findall(r"`((?:flatkern|csrc|bench|tests|examples|docs)/[\w./]+)`", text)):
        assert (ROOT / path).exists() or "/F." in path, path


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert re.search(rf"(?:- |: ){re.escape(page)}$", navigation, re.MULTILINE), page


# --- the API --------------------------------------------------------------------------------------


def shown():
    """What the pages of the API show, by its dotted name."""
    pages = [text for name, text in PAGES.items() if name.startswith("api/")]
    return {name for text in pages for name in re.findall(r"^::: (flatkern\.[\w.]+)$", text, re.MULTILINE)}


def test_every_public_name_is_shown():
    # To readers of sources `flatkern.cost` is the module of the function.
    wanted = {f"flatkern.{'cost.cost' if name == 'cost' else name}" for name in flatkern.__all__ if name != "schedules"}
    assert not wanted - shown()


def is_defined(dotted):
    """Whether the sources have a class, function or method; nothing is imported, since integrations need libraries."""
    folder, parts = ROOT, dotted.split(".")
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    tree = ast.parse((folder / f"{parts.pop(0)}.py").read_text())
    for name in parts:
        tree = next((n for n in tree.body if getattr(n, "name", None) == name), None)
        if tree is None:
            return False
    return True


def test_what_is_shown_exists():
    for dotted in shown():
        _, *module, last = dotted.split(".")
        assert is_defined(dotted) if module else hasattr(flatkern, last), dotted
    assert not is_defined("flatkern.optim.base.FlatOptimizer.ascend") and not is_defined("flatkern.cost.price")


def test_docstrings_keep_their_words():
    """Sections become lists, equations stay code, and nothing is lost."""
    as_markdown = runpy.run_path(str(DOCS / "docstrings.py"))["as_markdown"]
    for name in flatkern.__all__:
        text = inspect.getdoc(getattr(flatkern, name))
        made = as_markdown(text)
        words = [re.sub(r"[`*:,-]", "", t).lower().split() for t in (text, made)]
        assert words[0] == words[1], name
    made = as_markdown("Add.\n\n    a <- b\n\nArguments:\n    lr, eps: two,\n        on two lines.\n    x: y.\n\nEnd.")
    wanted = "Add.\n\n    a <- b\n\n\n**Arguments**\n\n- `lr`, `eps`: two,\n    on two lines.\n- `x`: y.\n\nEnd."
    assert made == wanted


# --- tables ---------------------------------------------------------------------------------------


@pytest.fixture
def render(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # behind everything: only bench/ is looked for there
    return importlib.import_module("bench.report.render")


def test_tables_are_the_committed_results(render):
    marked = {name: text for name, text in DOCUMENTS.items() if render.BLOCK.search(text)}
    assert {"docs/benchmarks.md", "docs/ranks.md"} <= set(marked)
    for name, text in marked.items():
        assert render.embed_committed(ROOT / name) == text, "run bench/report/render.py --all"


def test_all_tables_are_on_the_page_of_benchmarks(render):
    tables = importlib.import_module("bench.report.tables").tables
    names = {table.name for table in tables(json.loads(render.COMMITTED.read_text()))}
    assert names | {"gpu", "losing", "wanted"} <= {name for _, name, _ in render.BLOCK.findall(PAGES["benchmarks.md"])}


def test_the_chart_is_the_committed_results(render):
    speed = importlib.import_module("bench.report.speed").speed
    picture = (DOCS / "images" / "speed.svg").read_text()
    assert speed(json.loads(render.COMMITTED.read_text())) == picture, "run bench/report/render.py --all"
    brief = (ROOT / "README.md").read_text().split("<!-- bench: brief -->")[1].split("<!-- /bench -->")[0]
    assert ("(slower)" in picture) == ("(slower)" in brief) and len(picture) < 60_000


def test_the_table_of_phases_is_that_of_the_code():
    table = PAGES["cycle.md"].split("<!-- phases -->\n")[1].split("<!-- /phases -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    assert head[1:] == [phase.name for phase in Phase]
    names = {"step, rolling": "rolling step", "train, rolling": "train"}
    found, between = {}, set()
    for call, *cells in rows:
        name = re.sub(r"[`()]", "", call).removesuffix(" *")
        name = names.get(name, name)
        found[name] = {phase: Phase[cell] for phase, cell in zip(Phase, cells, strict=True) if cell != "-"}
        between |= {name} if call.endswith("*") else set()
    assert found == TRANSITIONS and between == BETWEEN_STEPS


def test_the_page_of_numerics_states_what_backends_may_differ_by():
    table = PAGES["numerics.md"].split("## What differs between backends")[1].split("## ")[0]
    assert {int(n) for n in re.findall(r"\| (\d+) (?:ulp|units)", table)} == {op.ulp for op in OPS.values() if op.ulp}


def test_the_page_states_the_floors_of_cost():
    """Bytes per float32 parameter of SGD with momentum and of AdamW."""
    rows = [line.strip("| ").split(" | ") for line in PAGES["methods.md"].splitlines() if line.startswith("| [")]
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
