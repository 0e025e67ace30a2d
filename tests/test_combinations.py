"""Which methods and options go together: every cell of the table in docs/methods.md trains, or is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
from compare import copies, same
from conftest import live
from patterns import Network

import flatkern
from flatkern import ASAM, GSAM, RWP, SAM, FriendlySAM, LookSAM, MomentumSAM

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
MAKERS = {
    "RWP": RWP, "ARWP": partial(RWP, eta=0.1), "m-RWP": partial(RWP, lam=0.5), "m-ARWP": partial(RWP, lam=0.5, eta=0.1),
    "SAM": SAM, "ASAM": ASAM, "mixed SAM": partial(SAM, lam=0.5), "mixed ASAM": partial(ASAM, lam=0.5), "GSAM": GSAM,
    "FriendlySAM": FriendlySAM, "LookSAM": LookSAM, "MomentumSAM": MomentumSAM,
}  # fmt: skip
ARGUMENTS = {"lam": 0.5, "interval": 3, "rolling": True, "mix": "losses"}


def combinations():
    text = PAGE.read_text().split("<!-- combinations -->\n")[1].split("<!-- /combinations -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.strip().splitlines()]
    assert set(MAKERS) == {name for row in rows for name in row[0].split(", ")}
    return [
        (name, *pair) for row in rows for name in row[0].split(", ") for pair in zip(head[1:], row[1:], strict=True)
    ]


def optimizer(method, **own):
    net = Network(own.pop("dtype", torch.float32))
    return net, flatkern.SGD(net.named_parameters(), lr=0.05, momentum=0.9, perturb=method, **own)


def check_captured(method):
    """What is asked of every group where a graph may capture steps, for which test_capturable.py has what it takes."""
    _, opt = optimizer(method, backend=live("cpp"))
    opt.perturbation.check_group(opt.param_groups[0], "SGD", capturable=True)


def step(net, opt, t, rounds=1):
    """A step of any method, of several rounds."""
    p = opt.perturbation
    opt.zero_grad()
    if p.has_clean_pass and not p.mixes:  # losses are weighted, and m-ARWP has to see the noisy gradient alone
        opt.perturb()
        (opt.loss_weight * net(3 * t)).backward()
        opt.restore()
        (opt.loss_weight * net(3 * t + 1)).backward()
        opt.step()
        return
    if p.has_clean_pass:
        (opt.loss_weight * net(3 * t)).backward()
    for k in range(rounds):
        if p.ascends:
            net(3 * t + k).backward()
        if opt.perturb_due:
            opt.perturb()
            (opt.loss_weight * net(3 * t + k)).backward()
            if k < rounds - 1:
                opt.restore()
        elif opt.rolling:
            net(3 * t + k).backward()
    opt.step()


@pytest.mark.parametrize(("name", "what", "cell"), combinations(), ids=lambda v: v)
def test_combination(name, what, cell):
    """Every cell of the table in docs/methods.md: it trains, or is refused."""
    backend, make = live("cpp"), MAKERS[name]
    own = {"IRE": {"enhance": flatkern.IRE(2.0)}, "masters": {"dtype": torch.bfloat16, "master_weights": True}}
    if cell.startswith("-"):
        with pytest.raises((ValueError, TypeError), match="capturable" if what == "capturable" else what):
            if what == "capturable":
                check_captured(make())
            else:
                optimizer(make(**{what: ARGUMENTS[what]}), backend=backend)
        return
    if what == "capturable":
        check_captured(make())
        if "(4)" in cell:
            with pytest.raises(ValueError, match="perturb_interval is 3 with capturable=True"):
                check_captured(make(interval=3))
        return
    arguments = {what: ARGUMENTS[what]} if what in ARGUMENTS and cell == "yes" else {}
    net, opt = optimizer(make(**arguments), backend=backend, **own.get(what, {}))
    start = copies(net.parameters())
    opt.train()
    if opt.mask_due:
        opt.eval()
        net(0).backward()
        opt.update_mask()
        opt.train()
    for t in range(3):
        step(net, opt, t, 2 if what == "rounds" else 1)
    opt.eval()
    now = [p.detach() for p in net.parameters()]
    assert all(p.isfinite().all() for p in now)
    assert not same(now, start)
