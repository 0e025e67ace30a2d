"""A captured step with more than 4 KB of arguments a kernel: a process of test_gpu.py's own, as some drivers crash.

python tests/gpu_large_graph.py cuda    the backend
"""

import contextlib
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import gpu_stand_in
import pytest
import torch
from capturing import into

import flatkern

DRY = os.environ.get("FLATKERN_GPU_DRY") == "1"
TENSORS = 100 if DRY else 400  # of 50 bytes of arguments when they are perturbed, of 170 when they are updated


class Training:
    def __init__(self, backend, capturable):
        torch.manual_seed(0)
        device = "cpu" if DRY else "cuda"
        self.params = [torch.nn.Parameter(torch.randn(8, 5).to(device)) for _ in range(TENSORS)]
        method = flatkern.RWP(0.02)
        self.opt = flatkern.AdamW(self.params, lr=0.01, perturb=method, backend=backend, capturable=capturable)

    def step(self):
        self.opt.zero_grad()
        self.opt.perturb()
        torch.cat([p.flatten() for p in self.params]).square().sum().backward()
        self.opt.step()


def compare(backend):
    run, host = Training(backend, True), Training(backend, False)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run.step()
    host.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with into(graph):
        run.step()
    for _ in range(3):
        graph.replay()
        host.step()
    for p, q in zip(run.params, host.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    with gpu_stand_in.installed(pytest.MonkeyPatch()) if DRY else contextlib.nullcontext():
        compare(sys.argv[1])
