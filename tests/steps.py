"""One step of every method as its user writes it.

It acts on a run, which has the optimizer, `opt`; `backward(index, weight=1.0)`, which adds the gradient of a batch to
`.grad`; and the calls of `Scaled`. Step t has batches of its own, so that runs can be compared pass by pass. `step` is
for tests in which the optimizer itself tells which method it has. flatkern appears through its public names only.
"""


class Scaled:
    """The calls of an optimizer to which a GradScaler is given, or that it makes, if there is one."""

    def perturb(self):
        self.opt.perturb() if self.scaler is None else self.opt.perturb(scaler=self.scaler)

    def step(self):
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)
            self.scaler.update()


class Run(Scaled):
    """The least that a step acts on."""

    def __init__(self, opt, backward):
        self.opt, self.backward, self.scaler = opt, backward, None


# The last restore() may be left to step(), and has to be where a GradScaler looks for the gradients of the last round
# in `.grad`. With `ends` every second step has it.


def plain(run, t):
    run.backward(t)
    run.step()


def noisy(run, t):
    run.perturb()
    run.backward(t)
    run.step()


def noisy_block(run, t):
    with run.opt.perturbed():
        run.backward(t)
    run.step()


def noisy_rounds(run, t, rounds=2, ends=False):
    for k in range(rounds):
        run.perturb()
        run.backward(rounds * t + k)
        if k < rounds - 1 or (ends and t % 2):
            run.opt.restore()
    run.step()


def clean_first(run, t):
    run.backward(2 * t)
    run.perturb()
    run.backward(2 * t + 1)
    run.step()


def noisy_first(run, t):
    run.perturb()
    run.backward(2 * t + 1)
    run.opt.restore()
    run.backward(2 * t)
    run.step()


def clean_between(run, t):
    run.perturb()
    run.backward(3 * t)
    run.opt.restore()
    run.backward(3 * t + 1)
    run.perturb()
    run.backward(3 * t + 2)
    run.step()


def weighted_clean_first(run, t):
    run.backward(2 * t, run.opt.loss_weight)
    run.perturb()
    run.backward(2 * t + 1, run.opt.loss_weight)
    run.step()


def weighted_noisy_first(run, t):
    run.perturb()
    run.backward(2 * t + 1, run.opt.loss_weight)
    run.opt.restore()
    run.backward(2 * t, run.opt.loss_weight)
    run.step()


def climbing(run, t):
    run.backward(t)
    run.perturb()
    run.backward(t)
    run.step()


def climbing_shards(run, t, shards=2, ends=False):
    for k in range(shards):
        run.backward(shards * t + k)
        run.perturb()
        run.backward(shards * t + k)
        if k < shards - 1 or (ends and t % 2):
            run.opt.restore()
    run.step()


def climbing_when_due(run, t):
    run.backward(t)
    if run.opt.perturb_due:
        run.perturb()
        run.backward(t)
    run.step()


def one_closure(run, t):
    return run.opt.step(run.closure(t))


def two_closures(run, t):
    return run.opt.step([run.closure(2 * t), run.closure(2 * t + 1)])


# The same where the optimizer tells which method it has.


def begins_clean(opt):
    """Whether the coming step has a gradient at clean weights before perturb()."""
    return opt.perturb_due and not opt.perturbation.starts_perturbed


def perturb(opt, backward):
    """What a step begins with, if it is perturbed: the pass at clean weights, if the method has one, and perturb()."""
    if begins_clean(opt):
        backward()
    if opt.perturb_due:
        opt.perturb()


def step(opt, backward, clean=None):
    """One step; `clean` is the pass at clean weights, by default the same as the other one.

    Where the losses are weighted, ARWP's history has to see the noisy gradient alone, so that the clean pass is last.
    """
    clean = clean or backward
    if getattr(opt.method, "mix", None) == "losses" and opt.method.eta:
        opt.perturb()
        backward()
        opt.restore()
        clean()
    else:
        perturb(opt, clean)
        backward()
    opt.step()
