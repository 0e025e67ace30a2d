"""skorch: a callback that follows the net's modules, so that noise is on in training alone.

    net = NeuralNetClassifier(
        Module,
        optimizer=flatkern.SGD,
        optimizer__perturb=flatkern.RWP(sigma=0.01, rolling=True),
        callbacks=[FollowCallback()],
    )

Other methods need no callback, and ASAM needs it for the parameters' names, which skorch does not pass on: skorch
passes `step` a closure, which runs as many passes as the step needs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.nn import Module

from ..optim.base import FlatOptimizer

try:
    from skorch.callbacks import Callback
except ImportError as error:
    raise ImportError("flatkern.integrations.skorch needs skorch; pip install 'flatkern[skorch]'") from error


class FollowCallback(Callback):
    """Rolling optimizers: perturbed weights in training forwards, clean ones wherever skorch predicts, scores or saves.

    The net's optimizers follow its modules from the beginning of each training on, also where `initialize()` or
    `set_params()` has made them anew; at its end, and after Ctrl-C in it, weights are clean. ASAM, whose rule goes by
    names, is given those of the modules' parameters.

    Raises:
        RuntimeError: at the beginning of a training: the net has no rolling optimizer, and none that ascends.
    """

    def initialize(self) -> FollowCallback:
        self.followed_: list[tuple[FlatOptimizer, Module]] = []
        return self

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        optimizers = [getattr(net, name + "_") for name in net._optimizers]
        ours = [opt for opt in optimizers if isinstance(opt, FlatOptimizer)]
        rolling = [opt for opt in ours if opt.rolling]
        named = [opt for opt in ours if opt.perturbation.ascends]
        if not rolling and not named:
            raise RuntimeError(
                "FollowCallback: the net has no rolling optimizer of flatkern's, so that there is nothing to follow; "
                "pass optimizer=flatkern.SGD, optimizer__perturb=flatkern.RWP(rolling=True) or "
                "flatkern.MomentumSAM(rolling=True), or leave the callback out"
            )
        modules = [m for name in (*net._modules, *net._criteria) if isinstance(m := getattr(net, name + "_"), Module)]
        for opt in named:
            for module in filter(partial(_shares, opt), modules):
                opt.name_parameters(module)
        pairs = [(opt, module) for opt in rolling for module in filter(partial(_shares, opt), modules)]
        known = {(id(opt), id(m)) for opt, m in self.followed_}
        for opt, module in pairs:
            if (id(opt), id(module)) not in known:
                opt.follow(module)
        self.followed_ = pairs

    def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        for opt, _ in self.followed_:
            opt.eval()

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled net is followed by no optimizer, until it trains."""
        return {**vars(self), "followed_": []}


def _shares(opt: FlatOptimizer, module: Module) -> bool:
    ours = {id(p) for group in opt.param_groups for p in group["params"]}
    return any(id(p) in ours for p in module.parameters())
