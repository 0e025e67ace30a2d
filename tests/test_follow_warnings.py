"""A step of a rolling optimizer warns where nothing, or nothing that runs, switches its noise."""

import warnings

import pytest
from test_follow import X, make, train

CALLERS = (__file__, train.__code__.co_filename)  # where step() is called


def warned(steps, step):
    """(number of the step, its message, whether it names the line that called step()) of each warning."""
    found = []
    for k in range(steps):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(k)
        found += [(k + 1, str(w.message), w.filename in CALLERS) for w in seen]
    return found


def body_only(model, opt):
    """As Lightning, which calls the root's training_step()."""
    opt.zero_grad()
    model.body(X).square().mean().backward()
    opt.step()


def test_a_followed_model_whose_forward_never_runs():
    model, opt = make()
    body_only(model, opt)
    opt.follow(model)
    ((step, message, is_here),) = warned(25, lambda _: body_only(model, opt))
    assert step == 10
    assert "no forward of the followed Net" in message
    assert is_here


@pytest.mark.parametrize("rule", ["AdamW", "Wrap"])
def test_a_rolling_optimizer_that_nobody_follows(rule):
    model, opt = make(rule=rule)
    ((step, message, is_here),) = warned(25, lambda _: train(model, opt))
    assert step == 10
    assert "opt.follow(model)" in message
    assert is_here


def test_a_model_that_stays_in_eval_mode():
    model, opt = make()
    opt.follow(model)

    def step(k):
        model.train(k == 5)
        opt.zero_grad()
        model(X).square().mean().backward()
        opt.step()

    ((step, message, is_here),) = warned(30, step)
    assert step == 16  # the tenth in a row
    assert "eval mode" in message
    assert is_here


def evaluate_between(model, opt):
    train(model, opt)
    model.eval()(X)


def evaluate_before_step(model, opt):
    opt.zero_grad()
    model.train()(X).square().mean().backward()
    model.eval()(X)
    opt.step()


def by_hand(model, opt):
    opt.train()
    body_only(model, opt)
    opt.eval()


def by_hand_once_an_epoch(model, opt):
    """Epochs of twenty steps, none of which is evaluated so far."""
    if opt.cycle.steps % 20 == 0:
        opt.train()
    body_only(model, opt)


def several_steps(model, opt):
    train(model, opt)
    body_only(model, opt)
    body_only(model, opt)


def saves(model, opt):
    train(model, opt)
    model.state_dict()
    opt.state_dict()


@pytest.mark.parametrize(
    ("follows", "user"),
    [(True, train), (True, evaluate_between), (True, evaluate_before_step), (True, by_hand), (False, by_hand),
     (False, by_hand_once_an_epoch), (True, several_steps), (True, saves)],
)  # fmt: skip
def test_no_warning(follows, user):
    model, opt = make()
    if follows:
        opt.follow(model)
    assert not warned(25, lambda _: user(model, opt))


def test_a_loop_that_calls_train_before_every_step_and_never_eval():
    """As Hugging Face's Trainer does with any optimizer that has train()."""
    model, opt = make()

    def step(_):
        opt.train()
        body_only(model, opt)

    ((step, message, is_here),) = warned(30, step)
    assert step == 10
    assert "train() was called before each of them, but never eval()" in message and "FlatkernCallback" in message
    assert is_here


def test_a_checkpoint_is_no_evaluation():
    """It takes the noise off, which says nothing about the noise in evaluations."""
    model, opt = make()
    opt.follow(model)

    def step(_):
        body_only(model, opt)
        model.state_dict()
        opt.state_dict()

    assert [k for k, *_ in warned(12, step)] == [10]
