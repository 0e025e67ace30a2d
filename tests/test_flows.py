"""What trainers and torch itself write to weights in the middle of a perturbation: pruning, parametrizations, averages,
other optimizers. What they write is kept or refused, and no noise stays where nobody wrote.
"""

import copy

import pytest
import torch
from compare import assert_same, same
from flows import HALF, METHODS, Network, Run, X, one_element, rows, torch_step
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from unchanged import refused

from flatkern import SAM


@torch.no_grad()
def clamp(run):
    for p in run.params:
        p.clamp_(-0.1, 0.1)


@torch.no_grad()
def fill(run):
    run.net.body.weight.fill_(0.25)


def parametrized(run, leave=True):
    parametrizations.orthogonal(run.net.body)
    parametrize.remove_parametrizations(run.net.body, "weight", leave_parametrized=leave)


def assigned(run):
    """Through a parametrization, whose inverse writes."""
    parametrizations.spectral_norm(run.net.body)
    run.net.body.weight = torch.ones(8, 8, dtype=run.net.unused.dtype)


# By means that move a version: every way back keeps them.
SEEN = {
    "load_state_dict": lambda run: run.net.load_state_dict(Network().state_dict()),
    "load of one layer": lambda run: run.net.body.load_state_dict(nn.Linear(8, 8).state_dict()),
    "init": lambda run: nn.init.xavier_uniform_(run.net.body.weight),
    "apply(reset)": lambda run: run.net.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None),
    "clamp": clamp,
    "one element": one_element,
    "fill": fill,
    "detach": lambda run: run.net.body.weight.detach().zero_(),
    "foreach": lambda run: torch._foreach_copy_(
        [p.detach() for p in run.params], [torch.ones_like(p) for p in run.params]
    ),
    "parametrization": parametrized,
    "parametrization, original": lambda run: parametrized(run, leave=False),
    "parametrization, assigned": assigned,
    "another optimizer": torch_step,
}

SOME = ("load_state_dict", "one element", "clamp", "another optimizer")
SEEN_ROWS = [(m, f, {}) for m in METHODS for f in SEEN] + [(m, f, HALF) for m in METHODS for f in SOME]


def ended(run, found):
    """What the end of a perturbation must leave of what is found, as far as the optimizer can see it."""
    if isinstance(run.opt.method, SAM):  # a tensor that was written stays as a whole
        return [c if same([f], [n]) else f for c, n, f in zip(run.clean, run.noisy, found, strict=True)]
    return run.kept(found)


@pytest.mark.filterwarnings("ignore:others have written", "ignore:.*ascends on bfloat16")
@rows("flow", "own", among=SEEN_ROWS)
def test_what_moves_a_version_is_refused_by_a_step_and_kept_by_a_way_back(method, flow, own, backend):
    run = Run(method, backend, **own)
    run.perturb()
    SEEN[flow](run)
    found = run.now()
    assert run.opt.is_perturbed != (method == "followed" and flow.startswith("load"))  # following ends it before
    if run.opt.is_perturbed:
        with refused(RuntimeError, "clean", run.params, run.opt):
            run.opt.step()
    run.opt.eval()
    run.stays(ended(run, found))


def pruned(run, remove=True):
    prune.l1_unstructured(run.net.body, "weight", 0.5)
    run.backward()
    if remove:
        prune.remove(run.net.body, "weight")


def averages_put_in(run):
    """As EMA libraries do."""
    for p in run.params:
        p.data.copy_(torch.full_like(p, 0.5))


def adapter_merged(run):
    """As LoRA's `merge`."""
    run.net.body.weight.data += torch.ones(8, 1) @ torch.ones(1, 8)


def vector(run):
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, sum(p.numel() for p in run.params)), run.params)


# By means that move no version: a rolling eval() notices them.
UNSEEN = {
    ".data": averages_put_in,
    ".data of one": lambda run: run.net.body.weight.data.clamp_(-0.1, 0.1),
    "adapter": adapter_merged,
    "vector_to_parameters": vector,
    "pruning": pruned,
    "half and back": lambda run: run.net.half().float(),
    "another fused optimizer": lambda run: torch_step(run, fused=True),
    "numpy": lambda run: run.net.body.weight.detach().numpy().fill(0.5),
}


@rows("flow", among=[(m, f) for m in ("rolling", "followed") for f in UNSEEN])
def test_what_moves_no_version_is_noticed_by_a_rolling_eval_and_kept(method, flow, backend):
    run = Run(method, backend)
    run.perturb()
    UNSEEN[flow](run)
    found = run.now()
    with pytest.raises(RuntimeError, match=r"clean\(\)"):
        run.opt.eval()
    assert not run.opt.is_perturbed
    run.stays(run.kept(found))


@pytest.mark.covering(1)
@rows("flow", among=[(m, f) for m in METHODS for f in (*SEEN, *UNSEEN)])
def test_anything_may_be_written_inside_clean(method, flow, backend):
    run = Run(method, backend)
    run.perturb()
    with run.opt.clean():
        assert_same(run.now(), run.clean)
        (SEEN | UNSEEN)[flow](run)
        written = run.now()
    assert run.opt.is_perturbed and not same(written, run.clean)
    assert not same(run.now(), written)
    run.opt.eval()
    run.stays(written)


def average(run):
    mean = AveragedModel(run.net)
    mean.update_parameters(run.net)
    mean.update_parameters(run.net)


def switched(run):
    run.net.requires_grad_(False)
    run.net.requires_grad_(True)


def called(run):
    torch.func.functional_call(run.net, dict(run.net.named_parameters()), X).sum().backward()
    torch.func.functional_call(run.net, {k: v.detach() for k, v in run.net.named_parameters()}, X)


# Nothing is written: no step is refused, and every way back finds the clean weights.
NOTHING = {
    "pruned": lambda run: pruned(run, remove=False),
    "parametrized": lambda run: parametrizations.spectral_norm(run.net.body),
    "average": average,
    "deepcopy": lambda run: copy.deepcopy(run.net),
    "to cpu": lambda run: run.net.to("cpu"),
    "double and back": lambda run: run.net.double().float(),
    "channels last": lambda run: run.net.to(memory_format=torch.channels_last),
    "shared memory": lambda run: run.net.share_memory(),
    "train and eval": lambda run: run.net.eval().train(),
    "switched": switched,
    "clipped": lambda run: nn.utils.clip_grad_norm_(run.params, 0.1),
    "as a vector": lambda run: nn.utils.parameters_to_vector(run.params).mul_(2),
    "functional_call": called,
    "no_grad forward": lambda run: torch.no_grad()(run.net)(X),
    "inference": lambda run: torch.inference_mode()(run.net)(X),
    "own value": lambda run: [torch.no_grad()(p.copy_)(p.detach().clone()) for p in run.params],
}


# Their versions move, and an ascent cannot be drawn again to see that nothing has changed.
TOLD_BY_VALUES = ("parametrized", "own value")


@pytest.mark.covering(1)
@rows("flow", among=[(m, f) for m in METHODS for f in NOTHING if m != "SAM" or f not in TOLD_BY_VALUES])
def test_what_writes_nothing_raises_no_alarm(method, flow, backend):
    run = Run(method, backend)
    for end in ("eval", "step", "clean"):
        run.perturb()
        NOTHING[flow](run)
        if end == "clean":
            with run.opt.clean():
                assert_same(run.now(), run.clean)
        if end == "step":
            run.opt.step()
        run.opt.eval()
        assert_same(run.now(), run.clean)
        run.opt.release()
