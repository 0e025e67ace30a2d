"""What two ranks do in test_lightning_distributed.py: trainings by Lightning and by hand, under DDP and FSDP2."""

import contextlib
import io
import logging
import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from common import METHODS, TWO_PASS, loss_of, make_batches, make_model, make_optimizer, step_by_hand
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_common import Automatic, fit
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flatkern.integrations.lightning import FlatkernCallback

WORLD = 2
AUTOMATIC = [name for name in METHODS if name != "mSAM"]
MANUAL = ["SAM", "m-RWP", "IRE"]
RESUMED = ["rolling RWP", "SAM", "m-ARWP", "IRE", "LookSAM"]


def serve(rank, port, folder):
    """Run every check, and write what each has found, or its error, for the tests to read."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD), RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    found = {}
    for name, check in checks(rank, folder):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found[name] = check()
        except Exception:
            found[name] = traceback.format_exc()
            print(f"rank {rank}: {name}\n{found[name]}", flush=True)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))


def checks(rank, folder):
    batches = make_batches(4)[rank::WORLD]
    for method in AUTOMATIC:
        yield f"DDP {method}", lambda m=method: full(train(Automatic(m), batches, ddp()))
        yield f"DDP {method} by hand", lambda m=method: full(replicated_by_hand(m, batches))
        yield f"DDP {method} lr=0", lambda m=method: full(train(Automatic(m, lr=0.0), batches, ddp()))
    for method in MANUAL:
        yield f"DDP {method} manual", lambda m=method: full(train(Passes(m), batches, ddp()))
    yield "DDP by ranks", lambda: full(train(ByRanks(), batches, ddp()))
    yield "DDP by ranks by hand", lambda: full(by_ranks_by_hand(batches))
    yield "DDP IRE without mask_loss", lambda: refusal(Automatic("IRE"), batches)
    for method in AUTOMATIC:
        yield f"FSDP2 {method}", lambda m=method: full(train(Sharded(m), batches, fsdp2()))
        yield f"FSDP2 {method} by hand", lambda m=method: full(sharded_by_hand(m, batches))
        yield f"FSDP2 {method} lr=0", lambda m=method: full(train(Sharded(m, lr=0.0), batches, fsdp2()))
    for method in RESUMED:
        for whole in (False, True):
            place = os.path.join(folder, f"{method} {whole}")
            yield f"FSDP2 {method} resumed {whole}", lambda m=method, w=whole, p=place: resumed(m, batches, w, p)


# --- by Lightning ---------------------------------------------------------------------------------


def ddp():
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))


def fsdp2(whole=False):
    return ModelParallelStrategy(
        data_parallel_size=WORLD,
        tensor_parallel_size=1,
        save_distributed_checkpoint=not whole,
        timeout=timedelta(seconds=60),
    )


class Sharded(Automatic):
    """FSDP2, as Lightning's documentation has it."""

    def configure_model(self):
        if not self.sharded:
            shard(self.net, self.device_mesh["data_parallel"])
            self.sharded = True

    sharded = False


def shard(net, mesh):
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)


class Passes(Automatic):
    """Manual optimization: DDP reduces what goes through manual_backward()."""

    def __init__(self, method):
        super().__init__(method)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(loss_of(self, batch))
        if self.method in TWO_PASS:
            opt.perturb()
            self.manual_backward(loss_of(self, batch))
        opt.step()


class ByRanks(Automatic):
    """m-RWP by mix="ranks": one gradient on each rank, weighed so that DDP's mean mixes them."""

    def __init__(self):
        super().__init__("m-RWP", own={"mix": "ranks"})

    def training_step(self, batch, batch_idx):
        return self.optimizers().loss_weight * super().training_step(batch, batch_idx)


def train(module, batches, strategy, **options):
    options = {"validate": make_batches(1), "val_check_interval": 1, **options}
    fit(module, batches, strategy=strategy, devices=WORLD, use_distributed_sampler=False, **options)
    return module.net


def refusal(module, batches):
    module.configure_callbacks = lambda: [FlatkernCallback()]  # in place of the one that has a mask_loss
    try:
        train(module, batches, ddp())
    except RuntimeError as error:
        return str(error)
    return "not refused"


def resumed(method, batches, whole, folder):
    """Two epochs, and the same resumed after the first; their weights, those of one epoch, and of its checkpoint."""
    saving = {"enable_checkpointing": True, "epochs": 2}
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = full(train(Sharded(method), batches, fsdp2(whole), callbacks=[every], **saving))
    path = os.path.join(folder, "step=2.ckpt")
    other = full(train(Sharded(method), batches, fsdp2(whole), ckpt_path=path, epochs=2))
    first = full(train(Sharded(method), batches, fsdp2(whole)))
    if not whole:  # a folder of shards, of which one file is made
        path, folder = f"{path} {dist.get_rank()}", path
        dcp_to_torch_save(folder, path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    return straight, other, first, {name.removeprefix("net."): value for name, value in saved.items()}


# --- by hand --------------------------------------------------------------------------------------


def replicated_by_hand(method, batches):
    net = make_model()
    return loop(method, net, DistributedDataParallel(net), batches)


def sharded_by_hand(method, batches):
    net = make_model()
    shard(net, init_device_mesh("cpu", (WORLD,)))
    return loop(method, net, net, batches)


def loop(method, net, model, batches):
    opt = make_optimizer(method, net)
    opt.train()
    for k, batch in enumerate(batches):
        step_by_hand(method, model, opt, [batch], k)
    opt.zero_grad()
    opt.eval()
    return net


def by_ranks_by_hand(batches):
    net = make_model()
    model = DistributedDataParallel(net)
    opt = make_optimizer("m-RWP", net, own={"mix": "ranks"})
    for batch in batches:
        opt.zero_grad()
        opt.perturb()
        (opt.loss_weight * loss_of(model, batch)).backward()
        opt.step()
    return net


def full(net):
    """Copies of all weights, whole."""
    return {name: getattr(p, "full_tensor", p.clone)().detach() for name, p in net.named_parameters()}
