"""What parallel m-RWP costs: a step of training under DDP, beside plain DDP, SAM and m-RWP with two passes.

Two processes of one thread each, with gloo between them, on one machine. Every method has a replica of the same
network; in each round every method makes one step, in an order that changes, and a step's time is that of the slower
process. What is sent is counted at DDP's buckets and at every other all-reduce.
"""

from __future__ import annotations

import os
import queue
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import flatkern

from .timing.stats import Stats

ROUNDS = 31
WORLD, BATCH, WARM = 2, 32, 2  # processes, images of a pass in each, steps before the first that counts


def network() -> nn.Module:
    """Four convolutions on images of 32 x 32, 0.97 million weights."""
    layers: list[nn.Module] = []
    for channels, filters, stride in ((3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 256, 2)):
        layers += [nn.Conv2d(channels, filters, 3, stride, padding=1), nn.GroupNorm(8, filters), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


class Replica:
    """A network under DDP with the optimizer of a method."""

    def __init__(self, method: Any, seed: int) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(network())
        self.opt = flatkern.SGD(self.model.parameters(), lr=0.01, momentum=0.9, perturb=method)
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            (torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(10, (BATCH,), generator=generator))
            for _ in range(2)
        ]

    def backward(self, batch: int = 0, weight: float = 1.0) -> None:
        x, y = self.batches[batch]
        (weight * cross_entropy(self.model(x), y)).backward()


def plain(r: Replica) -> None:
    r.backward()
    r.opt.step()


def one_pass(r: Replica) -> None:
    r.opt.perturb()
    r.backward(weight=r.opt.loss_weight)
    r.opt.step()


def two_batches(r: Replica) -> None:
    r.backward(0)
    r.opt.perturb()
    r.backward(1)
    r.opt.step()


def climb(r: Replica) -> None:
    with r.model.no_sync():
        r.backward()
    r.opt.perturb()
    r.backward()
    r.opt.step()


@dataclass(frozen=True)
class Method:
    title: str
    make: Callable[[], Any]
    step: Callable[[Replica], None]
    passes: int  # of each process


METHODS = {
    "plain": Method("DDP, SGD", lambda: None, plain, 1),
    "m-rwp-ranks": Method('m-RWP, `mix="ranks"`', lambda: flatkern.RWP(lam=0.5, mix="ranks"), one_pass, 1),
    "m-arwp-ranks": Method('m-ARWP, `mix="ranks"`', lambda: flatkern.RWP(lam=0.5, eta=0.1, mix="ranks"), one_pass, 1),
    "m-rwp": Method('m-RWP, `mix="gradients"`', lambda: flatkern.RWP(lam=0.5), two_batches, 2),
    "sam": Method("SAM, ascent in `no_sync()`", lambda: flatkern.SAM(), climb, 2),
}


class Sent:
    """Bytes that are handed to all-reduces, by DDP or by anybody else."""

    def __init__(self) -> None:
        self.bytes, self.calls, self._reduce = 0, 0, dist.all_reduce

    def count(self, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes += t.numel() * t.element_size()
        self.calls += 1
        return self._reduce(t, *args, **kwargs)

    def bucket(self, state, bucket):  # DDP takes no annotation but its own class
        """DDP's own mean."""
        buffer = bucket.buffer().div_(dist.get_world_size())
        return self.count(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

    def of_a_step(self, method: Method, seed: int) -> tuple[int, int]:
        """Bytes and all-reduces of a third step."""
        replica = Replica(method.make(), seed)
        replica.model.register_comm_hook(None, self.bucket)
        dist.all_reduce = self.count
        try:
            for _ in range(3):
                self.bytes = self.calls = 0
                replica.opt.zero_grad()
                method.step(replica)
        finally:
            dist.all_reduce = self._reduce
        return self.bytes, self.calls


def interleaved(rounds: int, seed: int, tick: Callable[[int, int], None]) -> dict[str, list[float]]:
    """Seconds of every step that counts, of the slower process."""
    replicas = {name: Replica(method.make(), seed) for name, method in METHODS.items()}
    names, seconds = list(METHODS), {name: [] for name in METHODS}
    for turn in range(WARM + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            replica = replicas[name]
            replica.opt.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            METHODS[name].step(replica)
            spent = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            if turn >= WARM:
                seconds[name].append(spent.item())
        tick(turn + 1, WARM + rounds)
    return seconds


def work(rank: int, store: str, rounds: int, answer: Any) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)

    def tick(done: int, total: int) -> None:
        if rank == 0:
            answer.put((done, total))

    sent = {name: Sent().of_a_step(method, seed=rank) for name, method in METHODS.items()}
    seconds = interleaved(rounds, rank, tick)
    if rank == 0:
        answer.put(entries(seconds, sent))
    dist.barrier()
    dist.destroy_process_group()


def entries(seconds: dict[str, list[float]], sent: dict[str, tuple[int, int]]) -> list[dict]:
    """As those of report/results.py, with what is sent."""
    found, reference = [], Stats(seconds["plain"]).median
    for name, data in seconds.items():
        stats, (size, calls) = Stats(data), sent[name]
        info = {
            "table": "ranks",
            "passes": METHODS[name].passes,
            "times_plain": stats.median / reference,
            "bytes_sent": size,
            "all_reduces": calls,
            "bytes_times_plain": size / sent["plain"][0],
        }
        found.append(
            {
                "group": f"ranks: {WORLD} processes",
                "name": f"ranks[{name}]",
                "fullname": f"flatkern.bench::ranks[{name}]",
                "params": {"method": name, "title": METHODS[name].title, "world": WORLD, "batch": BATCH},
                "param": name,
                "extra_info": info,
                "options": {"timer": "perf_counter", "interleaved": True, "gc": True},
                "stats": {**stats.as_dict(), "iterations": 1, "data": data},
            }
        )
    return found


def measured(rounds: int, tick: Callable[[int, int], None]) -> list[dict]:
    """The rows of a run.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of the processes failed.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    answer = mp.get_context("spawn").Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = os.path.join(folder, "store"), rounds, answer
        processes = mp.spawn(work, arguments, nprocs=WORLD, join=False)
        try:
            while True:
                try:
                    found = answer.get(timeout=1)
                except queue.Empty:
                    processes.join(timeout=0)  # raises what a process has raised
                    continue
                if isinstance(found, list):
                    break
                tick(*found)
            while not processes.join():
                pass
        finally:
            for process in processes.processes:
                process.kill()
    return found
