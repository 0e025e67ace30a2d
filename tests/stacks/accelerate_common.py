"""A training in Accelerate, as its user writes it, for the tests of one process and of several."""

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from common import ROWS, loss_of, make_batches, make_model, make_optimizer, mask_loss, summed
from torch.utils.data import DataLoader, TensorDataset

from flatkern.integrations.accelerate import passes


def start_anew():
    """Accelerate keeps its state in the process; every training of the tests has one of its own."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Of every test in a file that imports it."""
    start_anew()
    yield
    start_anew()


def shard(accelerator):
    """Models are to be sharded by FSDP2, which Accelerate itself does on GPUs only."""
    state = accelerator.state
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")


class Training:
    """A prepared model, optimizer and loader, and `run`, the loop.

    Arguments:
        count: micro-batches of a step, `gradient_accumulation_steps`.
        batches: of all steps.
        scaler: given to the accelerator, which makes one for fp16 on a GPU only.
        sync: `sync_ascent` of `passes`.
        fsdp2: shard the model.
        handlers: `kwargs_handlers` of the accelerator.
        opt: more for the optimizer; `own` for its method.
    """

    def __init__(
        self,
        method,
        count=1,
        batches=8,
        scaler=None,
        batch_norm=False,
        own=None,
        opt=None,
        sync=False,
        fsdp2=False,
        handlers=None,
    ):
        start_anew()
        self.method, self.count = method, count
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=count, kwargs_handlers=handlers)
        if fsdp2:
            shard(self.accelerator)
        if scaler is not None:
            self.accelerator.scaler = scaler
        self.plain = make_model(batch_norm=batch_norm)
        if own is None:
            own = summed(method) if count > 1 else {}
        self.opt = make_optimizer(method, self.plain, own=own, **(opt or {}))
        data = [torch.cat(parts) for parts in zip(*make_batches(batches), strict=True)]
        loader = DataLoader(TensorDataset(*data), batch_size=ROWS)
        self.model, self.prepared, self.loader = self.accelerator.prepare(self.plain, self.opt, loader)
        if self.opt.rolling:
            self.opt.follow(self.model)
        self.step = passes(self.accelerator, self.prepared, self.model, sync_ascent=sync)
        self.index = 0  # of the micro-batch

    def run(self, start=0, stop=None, loss_of=loss_of):
        """The loop over the batches from `start` to `stop`; returns the losses."""
        losses = []
        for k, (x, y) in enumerate(self.loader):
            if k < start or (stop is not None and k >= stop):
                continue
            with self.accelerator.accumulate(self.model):
                losses.append(self.micro_batch(x, y, loss_of))
        return losses

    def micro_batch(self, x, y, loss_of=loss_of):
        mask = None
        if self.opt.enhancement is not None:
            seed = self.index // self.count

            def mask():
                return mask_loss(self.model, (x, y), seed)

        self.index += 1
        return self.step(lambda: loss_of(self.model, (x, y)), mask=mask)

    def windows(self, batches=8):
        """The same micro-batches, by window, for a loop by hand."""
        every = make_batches(batches)
        return [every[k : k + self.count] for k in range(0, batches, self.count)]
