"""Processes that stand for the ranks of a training job, with gloo between them. They stay for many calls."""

import contextlib
import os
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 120  # seconds; a rank that waits for one that failed would wait for ever


class Ranks:
    """`world` processes; `call(function, ...)` runs it in each and returns what they return."""

    def __init__(self, world):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "flatkern"])  # imported once for all ranks
        self.store = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (there, rank, world, os.path.join(self.store.name, "store"))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"rank {rank} has not answered in {PATIENCE} s")
            answers.append(pipe.recv())
        for rank, (_, error) in enumerate(answers):
            if error:
                raise AssertionError(f"on rank {rank} of {len(answers)}:\n{error}")
        return [result for result, _ in answers]

    def close(self):
        for process in self.processes:
            process.terminate()
            process.join()
        self.store.cleanup()


def _serve(pipe, rank, world, store):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    with contextlib.suppress(EOFError):  # the tests are over
        while True:
            function, args = pipe.recv()
            try:
                pipe.send((function(*args), None))
            except Exception:  # whatever it is, the test shows it
                pipe.send((None, traceback.format_exc()))
