"""What parallel m-RWP costs: a step of training under DDP, beside plain DDP, SAM and m-RWP with two passes.

Two processes of one thread each, with gloo between them, on one machine. Every method has a replica of the same
network; in each round every method makes one step, in an order that changes, and a step's time is that of the slower
process. What is sent is counted at DDP's buckets and at every other all-reduce. The default run writes
bench/results/parallel.{json,md}; the block "ranks" of a document is made of it:

    python bench/parallel.py
    python bench/parallel.py --rounds 5 --json NAME.json --table NAME.md
    python bench/report/render.py --embed docs/ranks.md       (and docs/benchmarks.md)
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import flatkern
from bench.report import results
from bench.timing.stats import Stats

RESULTS = Path(__file__).resolve().parent / "results"
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


def interleaved(rounds: int, seed: int, show: Callable[[str], None]) -> dict[str, list[float]]:
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
        show(f"\rround {turn + 1} of {WARM + rounds}")
    return seconds


def work(rank: int, store: str, rounds: int, answer: Any) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)

    def show(text: str) -> None:
        if rank == 0 and sys.stderr.isatty():
            print(text, end="", file=sys.stderr, flush=True)

    sent = {name: Sent().of_a_step(method, seed=rank) for name, method in METHODS.items()}
    seconds = interleaved(rounds, rank, show)
    show("\n")
    if rank == 0:
        answer.put((seconds, sent))
    dist.barrier()
    dist.destroy_process_group()


def entries(seconds: dict[str, list[float]], sent: dict[str, tuple[int, int]]) -> list[dict]:
    """As bench/results.py's, with what is sent."""
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
                "fullname": f"bench/parallel.py::ranks[{name}]",
                "params": {"method": name, "title": METHODS[name].title, "world": WORLD, "batch": BATCH},
                "param": name,
                "extra_info": info,
                "options": {"timer": "perf_counter", "interleaved": True, "gc": True},
                "stats": {**stats.as_dict(), "iterations": 1, "data": data},
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="steps of each method (default: 31)")
    parser.add_argument("--json", metavar="FILE", default=str(RESULTS / "parallel.json"))
    parser.add_argument("--table", metavar="FILE.md", default=str(RESULTS / "parallel.md"))
    args = parser.parse_args()

    from bench.report import render

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    started, busy = time.monotonic(), results.load()
    if busy > 0.5:
        print(f"this machine is not quiet (load {busy:.1f}); expect numbers that do not repeat", file=sys.stderr)
    context = mp.get_context("spawn")
    answer = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = os.path.join(folder, "store"), args.rounds, answer
        mp.spawn(work, arguments, nprocs=WORLD, join=True)
    rows = entries(*answer.get())
    found = results.document(rows, [], 1, time.monotonic() - started, busy, command="python bench/parallel.py")
    results.write(args.json, found)
    text = render.markdown(found)
    Path(args.table).write_text(text)
    print(text)
    print(f"{found['seconds']:.0f} s; wrote {args.json}, {args.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
