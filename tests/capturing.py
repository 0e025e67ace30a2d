"""One network in training by every method, with optimizers whose steps a CUDA graph may capture and with others.

And what stands for a graph, and for waiting, where there is no GPU. Used by test_capturable.py, test_gpu.py and
`make gpu`.
"""

import contextlib
import functools
import gc

import compare
import steps
import torch
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import flatkern
from flatkern import dispatch
from flatkern.schedules import PerturbationScheduler

RULES = {
    "SGD": functools.partial(flatkern.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": functools.partial(flatkern.Adam, weight_decay=0.1),
    "AdamW": functools.partial(flatkern.AdamW, weight_decay=0.1),
}
METHODS = {
    "plain": {},
    "RWP": dict(perturb=flatkern.RWP(0.02, seed=2**32 - 5, stream=3)),
    "m-RWP": dict(perturb=flatkern.RWP(0.02, lam=0.5)),
    "m-ARWP, losses": dict(perturb=flatkern.RWP(0.02, lam=0.5, eta=0.1, mix="losses")),
    "rolling ARWP": dict(perturb=flatkern.RWP(0.02, eta=0.1, rolling=True)),
    "SAM": dict(perturb=flatkern.SAM(0.05), max_grad_norm=0.1),
    "mSAM": dict(perturb=flatkern.ASAM(0.5)),
    "GSAM": dict(perturb=flatkern.GSAM(0.05), max_grad_norm=0.1),
    "rolling MomentumSAM": dict(perturb=flatkern.MomentumSAM(0.05, rolling=True)),
    "rolling absolute": dict(perturb=flatkern.RWP(0.02, scale="absolute", rolling=True)),
    "RWP, rms": dict(perturb=flatkern.RWP(0.1, scale="rms")),
    "IRE": dict(enhance=flatkern.IRE(2.0)),
    "IRE, RWP": dict(enhance=flatkern.IRE(2.0), perturb=flatkern.RWP(0.02)),
}


class Net(torch.nn.Module):
    """Matrices, vectors, and as a rule a row that one program cannot hold; the interpreter takes its time for that."""

    def __init__(self, columns):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.long = torch.nn.Parameter(torch.randn(1, columns))
        self.register_buffer("x", torch.randn(4, 8))
        self.register_buffer("y", torch.randn(4, 8))

    def forward(self):
        error = self.last(torch.tanh(self.first(self.x))) - self.y
        return error.square().mean() + 1e-3 * self.long.square().sum()


class Run:
    """One network in training; two groups, whose learning rates and sigmas differ."""

    def __init__(self, rule, method, capturable, schedule=True, device="cpu", columns=8208, backend="triton"):
        self.net, self.method, options = Net(columns).to(device), method, METHODS[method]
        layers = [self.net.first, self.net.last]
        groups = [{"params": [p for m in layers for p in m.parameters()]}, {"params": [self.net.long], "lr": 0.03}]
        if isinstance(options.get("perturb"), flatkern.RWP):
            groups[1]["sigma"] = 0.05
        self.opt = RULES[rule](groups, lr=0.01, backend=backend, capturable=capturable, **options)
        self.schedulers = []
        if schedule:
            self.schedulers.append(lr_scheduler.LambdaLR(self.opt, lambda t: 1 / (1 + t)))
            if "sigma" in groups[1]:
                self.schedulers.append(PerturbationScheduler(self.opt, "sigma", lambda t: 0.02 + 0.01 * t))
        self.opt.train()
        if self.opt.enhancement is not None:
            self.net().backward()
            self.opt.update_mask()

    def backward(self):
        """There is one batch."""
        (self.net() * self.opt.loss_weight if "losses" in self.method else self.net()).backward()

    def step(self):
        self.opt.zero_grad()
        if self.method == "mSAM":
            steps.climbing_shards(steps.Run(self.opt, lambda index: self.backward()), 0)
        else:
            steps.step(self.opt, self.backward)

    def schedule(self):
        for scheduler in self.schedulers:
            scheduler.step()

    def train(self, steps):
        for _ in range(steps):
            self.step()
            self.schedule()
        return self

    def tensors(self):
        """Weights, perturbed ones while rolling, and the state."""
        state = [t for p in self.net.parameters() for t in self.opt.state[p].values()]
        return compare.copies((*self.net.parameters(), *state))


def assert_same(a, b):
    """To the bit; what a graph's memory holds before it is written is NaN, which nothing may end at."""
    tensors = a.tensors()
    compare.assert_same(tensors, b.tensors())
    assert all(t.isfinite().all() for t in tensors)
    assert_same_numbers(a, b)


def assert_close(a, b):
    """Two devices' worth of matrix products apart; noise of another round would be a hundred times that."""
    for k, (s, t) in enumerate(zip(a.tensors(), b.tensors(), strict=True)):
        torch.testing.assert_close(s, t, rtol=1e-4, atol=1e-5, msg=lambda text, k=k: f"tensor {k}: {text}")
    assert_same_numbers(a, b)


def assert_same_numbers(a, b):
    for g, h in zip(a.opt.param_groups, b.opt.param_groups, strict=True):
        for key in {"lr", "sigma", "round"} & g.keys():
            assert float(g[key]) == float(h[key]), key


# On a GPU.


def into(graph, stream=None):
    """torch.cuda.graph. It collects no garbage before a capture any more, and what an optimizer launches that is
    collected inside, to leave clean weights behind, would be captured."""
    gc.collect()
    return torch.cuda.graph(graph, stream=stream)


def capture(run, warm, stream=None):
    """A graph of one training step, after `warm` steps on another stream; a capture runs nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run.train(warm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with into(graph, side if stream == "warm" else None):
        run.step()
    return graph


@contextlib.contextmanager
def nobody_waits():
    """Inside it is an error if the host waits for the device; never behind it, whatever happens."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


TRAINED = {
    "RWP": flatkern.RWP(0.02),
    "ARWP, rolling": flatkern.RWP(0.02, eta=0.1, rolling=True),
    "m-RWP": flatkern.RWP(0.02, lam=0.5),
    "SAM": flatkern.SAM(0.05),
    "ASAM": flatkern.ASAM(0.5),
    "GSAM": flatkern.GSAM(0.05, alpha=0.4),
    "Friendly-SAM": flatkern.FriendlySAM(0.05),
    "LookSAM": flatkern.LookSAM(0.05, k=3),
    "Momentum-SAM, rolling": flatkern.MomentumSAM(0.3, rolling=True),
}


def trained(method, device, backend, watch=contextlib.nullcontext):
    """Weights after four steps of a small network, the last two of them inside a `watch`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 8))
    x, y = torch.randn(32, 64), torch.randn(32, 8)
    model, x, y = model.to(device), x.to(device), y.to(device)
    opt = flatkern.SGD(model.parameters(), lr=0.05, momentum=0.9, perturb=method, backend=backend, max_grad_norm=1.0)

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    opt.train()
    for watched in (contextlib.nullcontext, watch):
        with watched():
            for _ in range(2):
                opt.step(closure)
    opt.eval()
    return [p.detach().cpu() for p in model.parameters()]


class Watch(TorchDispatchMode):
    """Raises where the host would have to wait for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def runs_on_the_cpu(backend):
    """Whether one of the GPU's backends is interpreted or emulated in this process."""
    return "cpu" in dispatch.DEVICES[backend]


class TritonLaunches:
    """Those of the interpreted kernels. Nothing in them knows of a capture."""

    def __init__(self, calls, runs, monkeypatch):
        from flatkern.triton_kernels import launch

        self.recording = False
        start = launch.Call.start

        def started(*args, **kwargs):
            if not self.recording:
                return start(*args, **kwargs)
            if runs:
                with _disable_current_modes():
                    start(*args, **kwargs)
            calls.append(lambda: start(*args, **kwargs))

        monkeypatch.setattr(launch.Call, "start", started)

    def record(self, on):
        self.recording = on


class CudaLaunches:
    """Those of the emulated kernels, which are told that a graph is being captured."""

    def __init__(self, calls, runs, monkeypatch):
        self.module, self.calls, self.runs = dispatch.compiled_module("cuda"), calls, runs

    def see(self, *launch):
        self.calls.append(lambda: self.module.run_again(*launch))

    def record(self, on):
        self.module.capturing(on)
        self.module.watch(self.see if on else None)
        self.module.launch_nothing(on and not self.runs)


class Tape(TorchDispatchMode):
    """A poor man's graph: records what runs inside; `replay` runs it again, each result written where it was.

    What is allocated inside holds NaN at every replay, as a graph's own memory may. With `runs=False`
    what is recorded has no effect, as in a capture: no kernel is started, and what torch wrote is as before in the end.
    """

    def __init__(self, monkeypatch, runs=True):
        super().__init__()
        self.calls, self.runs = [], runs
        kinds = {"triton": TritonLaunches, "cuda": CudaLaunches}
        self.launches = [kinds[name](self.calls, runs, monkeypatch) for name in kinds if runs_on_the_cpu(name)]
        self.memory, self.before = set(), []  # addresses that are known, and what was at those that are older

    def __enter__(self):
        for launches in self.launches:
            launches.record(True)
        return super().__enter__()

    def __exit__(self, *args):
        for launches in self.launches:
            launches.record(False)
        super().__exit__(*args)
        for storage, content in self.before:
            storage.copy_(content)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.runs:
            self.remember((args, kwargs), older=True)
        results = func(*args, **kwargs)
        if not self.runs:
            self.remember(results, older=False)
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.calls.append(lambda: results.untyped_storage().fill_(255))  # NaN, and -1
        else:
            self.calls.append(lambda: self.again(results, func(*args, **kwargs)))
        return results

    def remember(self, tree, older):
        for t in tree_leaves(tree):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.memory:
                storage = t.untyped_storage()
                self.memory.add(storage.data_ptr())
                if older:
                    self.before.append((storage, storage.clone()))

    @staticmethod
    def again(before, now):
        for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
            # Views, and what was written in place, are where they were.
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    @torch.no_grad()
    def replay(self):
        for call in self.calls:
            call()
