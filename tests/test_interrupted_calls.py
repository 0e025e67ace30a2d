"""An exception at any line of a call (Ctrl-C, an alarm, no memory) leaves clean weights, or perturbed ones that the
optimizer knows of and restores bit for bit.

A trace function raises at every line of flatkern's Python that a call reaches once it has touched a weight, the first
and the last time that the line is reached; before that at every tenth, and in eager, whose operations are Python too
and slow, at twenty in all. Lines of the handlers that undo a call are not reached here, since nothing else fails. Left
out is the end of a `with` block, between its last line and __exit__: Python looks at no signal there, and nothing could
help.
"""

import ast
import gc
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from compare import copies, same
from covering import also
from torch.nn import Parameter
from two_buckets import Run

import flatkern
from flatkern import IRE
from flatkern.optim.phase import SUSPENDED

FLATKERN = os.path.dirname(flatkern.__file__) + os.sep


class Interrupted(BaseException):
    pass


@cache
def with_lines(path):
    """Where `with` statements begin; such a line is reached again when the block is left."""
    nodes = ast.walk(ast.parse(Path(path).read_text()))
    return {node.lineno for node in nodes if isinstance(node, ast.With)}


class Trace:
    """Notes the lines of flatkern that are reached, and raises at event number `at`; or, given weights, notes as of
    which event they have changed.
    """

    def __init__(self, at=None, weights=()):
        self.at, self.seen, self.weights = at, [], weights
        self.before, self.changed_at = copies(weights), 0
        self.entered = set()  # (frame, line) of blocks that are being run

    def leaves_a_block(self, frame):
        if frame.f_lineno not in with_lines(frame.f_code.co_filename):
            return False
        self.entered ^= {(frame, frame.f_lineno)}
        return (frame, frame.f_lineno) not in self.entered

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        if not name.startswith(FLATKERN):
            return None
        # (A generator expression is called once more when it is dropped, where exceptions are ignored.)
        begins = event == "call" and frame.f_code.co_name != "<genexpr>"
        if begins or (event == "line" and not self.leaves_a_block(frame)):
            if len(self.seen) == self.at:
                sys.settrace(None)
                raise Interrupted(f"{name.removeprefix(FLATKERN)}:{frame.f_lineno} ({event})")
            if self.changed_at == len(self.seen) and same(self.weights, self.before):
                self.changed_at += 1
            self.seen.append((name, frame.f_lineno, event))
        return self

    def run(self, call):
        """Returns where the call was interrupted; None if it was not."""
        before, grad_enabled = sys.gettrace(), torch.is_grad_enabled()
        gc.disable()  # of earlier runs: what restores a collected optimizer is not what is interrupted here
        sys.settrace(self)
        try:
            call()
        except Interrupted as interrupted:
            return str(interrupted) + " and gradients stay disabled" * (torch.is_grad_enabled() != grad_enabled)
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(grad_enabled)
            gc.enable()
        return None


def moments(seen, changed_at=0, most=10**6):
    """Numbers of the events to interrupt: of every line the first and the last, before the change every tenth of them;
    at most so many.
    """
    first = {event: k for k, event in reversed(list(enumerate(seen)))}
    last = {event: k for k, event in enumerate(seen)}
    found = sorted({*first.values(), *last.values()})
    found = [*[k for k in found if k < changed_at][::10], *[k for k in found if k >= changed_at]]
    return found[:: -(-len(found) // most)]


def interrupt_everywhere(make, call, check):
    """`check(run)` after `call(run)` was interrupted, for every moment; the places where it does not hold.

    Every sixteenth time the run has to go on training, too.
    """
    gc.collect()  # optimizers of earlier tests, which every call looks at as long as they are perturbed
    first, whole = make(), make()
    call(first)  # what is imported, resolved and cached once
    first.opt.eval()
    trace = Trace(weights=whole.params)
    assert trace.run(lambda: call(whole)) is None
    whole.opt.eval()  # nobody else is perturbed, or the next runs would look at more optimizers
    wrong, reached = [], []
    for k, at in enumerate(moments(trace.seen, trace.changed_at, 20 if whole.opt.backend == "eager" else 10**6)):
        run = make()
        where = Trace(at).run(lambda run=run: call(run))
        reached.append(where is not None)
        try:
            problem = (where or "").partition(" and ")[2] or check(run) or (k % 16 == 0 and usable(run))
        except (RuntimeError, ValueError) as refusal:  # the way back or the next step is refused
            problem = str(refusal)
        if problem:
            wrong.append(f"{where}: {problem}")
    # Of an earlier test somebody may have been collected meanwhile.
    assert sum(reached) > 0.9 * len(reached), "a run that begins alike reaches the same lines"
    return wrong


def by_call(name):
    def call(run):
        run.run(name)

    return call


def closure(run):
    def call():
        run.opt.zero_grad()
        run.backward()

    run.opt.step(call)


def perturbed(run):
    with run.opt.perturbed():
        run.backward()


def clean_block(run):
    with run.opt.clean():
        pass


def load(run):
    run.opt.load_state_dict(run.saved)


CALLS = {"closure": closure, "perturbed": perturbed, "clean": clean_block, "load": load}


def maker(kind, rule, before, backend, **own):
    """Runs that begin alike: what was saved of the weights before is not what they are now."""

    def make():
        run = Run(kind, rule, backend, **own)
        if "enhance" in own:
            run.run("b mask")
        run.train(1)
        run.opt.eval()
        run.saved = run.opt.state_dict()
        run.run(before)
        with run.opt.clean():
            run.clean = run.weights()
        return run

    return make


def problem_of(run, allowed):
    """What is wrong after an interruption; each weight may be one of `allowed`."""

    def known(weights):
        return all(any(same([w], [version[k]]) for version in allowed) for k, w in enumerate(weights))

    if run.opt.is_perturbed:
        try:
            run.opt.state_dict()
            return "perturbed weights could be saved"
        except RuntimeError:
            pass
    elif not known(run.weights()):
        return "perturbed weights, and is_perturbed is False"
    run.opt.eval()
    if run.opt.is_perturbed or not known(run.weights()):
        return "restored to something else"
    rounds = {group.get("round") for group in run.opt.param_groups}
    return None if len(rounds) == 1 else "the groups are in different rounds"


def usable(run):
    """Whatever was interrupted, the next steps run, and nobody else is kept from the parameters."""
    run.opt.release()
    run.opt.zero_grad()
    run.opt.state_dict()
    flatkern.SGD(run.params)
    before = run.weights()
    run.train(1)
    run.opt.eval()
    if same(run.weights(), before):
        return "the next step does nothing"
    return None if all(w.isfinite().all() for w in run.weights()) else "the next step is not finite"


# --- calls that move the weights and move them back -----------------------------------------------

MASTERS = {"masters": True}
MOVES = [  # method, rule, what came before, the call, and what else the optimizer is given
    *((kind, "SGD", before, "perturb", {})
      for kind, before in (("RWP", ""), ("m-RWP", "b"), ("m-RWP", "perturb b restore"), ("SAM", "b"),
                           ("SAM", "b perturb b restore b"))),
    ("ASAM", "AdamW", "b", "perturb", MASTERS),
    ("ARWP", "Wrap", "", "perturb", {}),
    ("m-RWP", "SGD", "b perturb b", "restore", MASTERS),
    ("ARWP losses", "Wrap", "perturb b", "restore", {}),
    ("SAM", "SGD", "b perturb b", "restore", {}),
    ("RWP", "SGD", "", "perturbed", {}),
    ("SAM", "Wrap", "b", "perturbed", {}),
    ("rolling ARWP", "SGD", "eval", "train", {}),
    ("rolling", "Wrap", "eval", "train", {}),
    ("rolling", "SGD", "train", "eval", MASTERS),
    ("RWP", "SGD", "perturb b", "load", {}),
    ("rolling", "Wrap", "train", "load", {}),
]  # fmt: skip
IN_EAGER = [(kind, "SGD", before, name, {})
            for kind, before, name in (("RWP", "", "perturb"), ("SAM", "b", "perturb"), ("RWP", "perturb b", "restore"),
                                       ("rolling", "eval", "train"))]  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(
    ("backend", "kind", "rule", "before", "name", "own"),
    [*(("cpp", *row) for row in MOVES), *(("eager", *row) for row in IN_EAGER)],
    indirect=["backend"],
    ids=str,
)
def test_moves(kind, rule, before, name, own, backend):
    """The weights are the clean ones, or is_perturbed is True and eval() brings the clean ones back."""

    def check(run):
        return problem_of(run, [run.clean])

    call = CALLS.get(name) or by_call(name)
    assert not interrupt_everywhere(maker(kind, rule, before, backend, **own), call, check)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["RWP", "rolling"])
def test_clean_block(kind, backend):
    """Entering and leaving clean(). What leaves it cannot be made safe against an interruption of itself: then the
    optimizer may think that it is inside still, and refuse; but the weights are clean, or it knows that they are not.
    """

    def check(run):
        if not run.opt.is_perturbed:
            return None if same(run.weights(), run.clean) else "perturbed weights, and is_perturbed is False"
        return problem_of(run, [run.clean])

    make = maker(kind, "SGD", {"RWP": "perturb", "rolling": "train"}[kind], backend)
    wrong = interrupt_everywhere(make, clean_block, check)
    assert not [problem for problem in wrong if "is_perturbed" in problem or "restored" in problem]


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(
    ("kind", "before", "own"),
    [("rolling ARWP", "train", MASTERS), *also(("RWP", "perturb b", {}), ("SAM", "b perturb", {}))], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_what_was_written_inside_a_clean_block_stays(kind, before, own, backend):
    """Wherever leaving it is interrupted: no older copy comes back. As above the optimizer may think it is inside."""

    def block(run):
        run.has_written = False
        with run.opt.clean():
            for p in run.params:
                p.data.fill_(2.0)
            run.has_written = True

    def check(run):
        if run.opt.cycle.phase is SUSPENDED:
            run.opt.cycle.weights.left()  # or it would count as perturbed in what other tests reach
        if run.opt.is_perturbed:
            run.opt.eval()
        written = [torch.full_like(c, 2.0) for c in run.clean]
        pairs = zip(run.weights(), run.clean, written, strict=True)
        right = all(same([w], [new]) or not (run.has_written or not same([w], [old])) for w, old, new in pairs)
        return None if right else "what was written is lost"

    assert not interrupt_everywhere(maker(kind, "SGD", before, backend, **own), block, check)
    gc.collect()  # what hangs on exceptions, or other tests would collect it in the middle


# --- steps ----------------------------------------------------------------------------------------

IRE_ON = {"enhance": IRE(1.0, 0.5)}
STEPS = [
    ("plain", "SGD", "b", {}),
    ("plain", "AdamW", "b", MASTERS | IRE_ON),
    *((kind, "SGD", before, {})
      for kind, before in (("RWP", "perturb b"), ("m-RWP", "perturb b restore b"), ("SAM", "b perturb b restore"),
                           ("ARWP losses", "perturb b restore b"), ("rolling", "b"),
                           ("rolling", "eval b"))),
    ("rolling ARWP", "AdamW", "b", MASTERS),
    ("RWP", "SGD", "perturb b", {"max_grad_norm": 0.1}),
    ("m-RWP", "Wrap", "b perturb b", IRE_ON),
    ("SAM", "Wrap", "b perturb b", {}),
    ("rolling", "Wrap", "b", {}),
]  # fmt: skip
STEPS_IN_EAGER = [
    (kind, "SGD", before, {}) for kind, before in (("RWP", "perturb b"), ("SAM", "b perturb b"), ("rolling", "b"))
]


def without_ire(run):
    for group in run.opt.param_groups:
        group["kappa"] = 0.0
    return run


def updated(make, call):
    run = make()
    call(run)
    run.opt.eval()
    return run.weights()


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(
    ("backend", "kind", "rule", "before", "own"),
    [*(("cpp", *row) for row in STEPS), *(("eager", *row) for row in STEPS_IN_EAGER)],
    indirect=["backend"],
    ids=str,
)
def test_steps(kind, rule, before, own, backend):
    """Every weight is its old clean value or its new one, none is perturbed, and the training goes on."""
    make, call = maker(kind, rule, before, backend, **own), by_call("step")
    allowed = [updated(make, call)]
    if rule == "Wrap" and own is IRE_ON:  # whose base has stepped when the step is lengthened
        allowed.append(updated(make, lambda run: call(without_ire(run))))

    def check(run):
        return problem_of(run, [run.clean, *allowed])

    assert not interrupt_everywhere(make, call, check)


@pytest.mark.parametrize(("kind", "rule"), [("SAM", "Wrap"), *also(("RWP", "SGD"), ("rolling", "SGD"))])
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_steps_with_a_closure(kind, rule, backend):
    """As the other steps, and clean without a further call (rolling: or known)."""
    make = maker(kind, rule, "", backend)
    new = updated(make, closure)

    def check(run):
        if kind != "rolling" and run.opt.is_perturbed:
            return "still perturbed after step(closure)"
        return problem_of(run, [run.clean, new])

    assert not interrupt_everywhere(make, closure, check)


# --- the test itself ------------------------------------------------------------------------------


def careless(run):
    """A method as it should not be written: it says what it did when it has done it."""
    with torch.no_grad():
        run.params[0].add_(1.0)
    flatkern.filter_norms(run.params)
    with torch.no_grad():
        run.params[0].sub_(1.0)


def test_careless_code_is_found(backend):
    """All interruptions are found that come while the weights are moved and nobody knows."""

    def check(run):
        return problem_of(run, [run.clean])

    wrong = interrupt_everywhere(maker("RWP", "SGD", "", backend), careless, check)
    assert len(wrong) >= 10
    assert {problem.split(": ")[1] for problem in wrong} == {"perturbed weights, and is_perturbed is False"}


def test_moments():
    assert moments(["a", "b", "a", "a", "a", "c"]) == [0, 1, 4, 5]
    assert moments(list("abcdefghijklmn"), changed_at=12) == [0, 10, 12, 13]
    assert moments(list("abcde"), most=2) == [0, 3]
    p = Parameter(torch.ones(2))
    assert Trace(0).run(lambda: flatkern.SGD([p])) is not None
    assert Trace(10**6).run(lambda: flatkern.SGD([p])) is None


def test_blocks_are_left_undisturbed():
    """`with` lines are met twice, and the second time is none that a signal could interrupt."""

    def both():
        with torch.no_grad():
            return None

    trace = Trace()
    frame = type("Frame", (), {"f_code": both.__code__, "f_lineno": both.__code__.co_firstlineno + 1})()
    assert [trace.leaves_a_block(frame) for _ in range(4)] == [False, True, False, True]
