"""Steps of optimizers on the CUDA backend, emulated, while another device than that of the weights is current.

What one operation does then is in test_cuda_launches.py. Weights on two devices cannot be shown here: the emulation has
two, but its tensors are torch's on the CPU, which has one.
"""

import pytest
from compare import assert_same, assert_same_state, same
from emulated import needs_emulation
from patterns import BASES, METHODS, Training
from test_cuda_launches import failing_launch

import flatkern

pytestmark = [needs_emulation, pytest.mark.filterwarnings("ignore:.*ascends on")]


class Watched(Training):
    """A training that keeps which device is current where the user's code runs, and where kernels are launched."""

    def __init__(self, emulated, current, *args, **own):
        super().__init__(*args, backend="cuda", **own)
        self.emulated, self.seen, self.launched = emulated, set(), set()
        self.emulated.set_current_device(current)
        self.emulated.watch(lambda *launch: self.launched.add(emulated.current_device()))

    def loss(self, index):
        self.seen.add(self.emulated.current_device())
        return super().loss(index)

    def step(self):
        super().step()
        self.seen.add(self.emulated.current_device())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_while_another_device_is_current(name, base, emulated):
    """Kernels run on the weights' device, the user's code on its own, and the bits are the same."""
    runs = []
    for current in (0, 1):
        own = {"enhance": flatkern.IRE(2.0)} if base == "SGD" else {}
        run = Watched(emulated, current, METHODS[name].make(), base, **own)
        if run.opt.enhancement:
            run.opt.eval()
            run.backward(9)
            run.opt.update_mask()
            run.opt.train()
        for t in range(2):
            METHODS[name].user(run, t)
            run.opt.zero_grad()
        run.opt.eval()
        emulated.watch(None)
        assert run.seen == {current} and run.launched == {0} and emulated.current_device() == current
        runs.append(run)
    assert_same(runs[0].weights(), runs[1].weights())
    assert_same_state(runs[0].state(), runs[1].state())


def test_the_other_device_is_current_again_after_an_error(emulated):
    """Of a launch, in perturb, restore and step; of what the user's code raises in between."""
    run = Training(METHODS["RWP"].make(), backend="cuda")
    emulated.set_current_device(1)
    with failing_launch(emulated, 1):
        run.perturb()
    assert emulated.current_device() == 1
    run.opt.restore()
    assert_same(run.weights(), run.start)
    run.perturb()
    with failing_launch(emulated, 1):
        run.opt.restore()
    assert emulated.current_device() == 1
    run.opt.restore()
    assert_same(run.weights(), run.start)
    with pytest.raises(ZeroDivisionError), run.opt.perturbed():
        1 / 0  # noqa: B018
    assert emulated.current_device() == 1 and same(run.weights(), run.start)
    run.backward(0)
    with failing_launch(emulated, 1):
        run.step()
    assert emulated.current_device() == 1 and same(run.weights(), run.start)
    run.step()
    assert not same(run.weights(), run.start) and emulated.current_device() == 1
