"""The suite `train`: its networks, the steps of its candidates, its rows and tables. No test looks at a clock."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.methods import LR, METHODS, MOMENTUM, WEIGHT_DECAY
from bench.report import results
from bench.report.training import training_tables
from bench.timing.harness import Timings
from bench.training import processes, race, suite
from bench.training.networks import NETWORKS, Network
from bench.training.steps import Training, Who, candidates

TORCH, OURS, SAM = Who("plain", "torch fused"), Who("plain", "flatkern cpp"), Who("sam", "flatkern cpp")
NOBODY = Who("sam", "nobody")
linux = pytest.mark.skipif(bool(processes.impossible()), reason=processes.impossible())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two that wait for each other take long where tests run beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- networks and steps


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_what_they_say_and_come_from_a_seed(name):
    before = torch.get_rng_state()
    one, other = (list(NETWORKS[name].build().parameters()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in one) == NETWORKS[name].numel
    assert all(map(torch.equal, one, other))
    (inputs, targets), again = NETWORKS[name].batches()[0], NETWORKS[name].batches()[0]
    assert torch.equal(inputs, again[0]) and torch.equal(targets, again[1])


def small(name: str) -> Network:
    """A network on little data."""
    network = NETWORKS[name]
    if name != "gpt":
        return replace(network, batch=4)

    def few_tokens(count, generator):
        tokens, _ = network.data(count, generator)
        return tokens[:, :16], tokens[0, 1:17]

    return replace(network, data=few_tokens)


def by_hand(network: Network, method: str, steps: int):
    """Losses of all passes, the network after `steps` steps, by torch alone."""
    model, batches = network.build(), network.batches()
    params, numbers = list(model.parameters()), {"lr": LR[network.base], "weight_decay": WEIGHT_DECAY[network.base]}
    sgd = network.base == "sgd"
    base = torch.optim.SGD(params, momentum=MOMENTUM, **numbers) if sgd else torch.optim.AdamW(params, **numbers)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    losses = []

    def take_pass(inputs, targets):
        base.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())

    for inputs, targets in batches[:steps]:
        take_pass(inputs, targets)
        if method == "sam":
            clean = [p.detach().clone() for p in params]
            norm = torch.sqrt(sum(p.grad.square().sum() for p in params))
            measured = [{key: value.clone() for key, value in m.named_buffers()} for m in norms]
            with torch.no_grad():
                for p in params:
                    p.add_(p.grad, alpha=METHODS["sam"].rho / norm.item())
            take_pass(inputs, targets)
            with torch.no_grad():
                for p, w in zip(params, clean, strict=True):
                    p.copy_(w)
            for m, buffers in zip(norms, measured, strict=True):
                m.load_state_dict(buffers, strict=False)
        base.step()
    return losses, model


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module, of) -> float:
    """Between the parameters, or the buffers, of two networks."""
    return sum(float((p.float() - q.float()).square().sum()) for p, q in zip(of(one), of(other), strict=True)) ** 0.5


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["plain", "sam"])
def test_first_steps_are_those_of_a_loop_by_hand(name, method):
    network = small(name)
    losses, model = by_hand(network, method, 3)
    start = network.build()
    # Adam's first steps are the gradient's signs, which rounding decides where it is next to nothing.
    tolerance = 2e-2 if network.base == "adamw" else 1e-3
    for who in candidates(network):
        if who.method != method:
            continue
        training = Training(network, who)
        for count in range(3):
            training(count)
        assert training.losses == pytest.approx(losses, rel=1e-4), who
        for of in (nn.Module.parameters, nn.Module.buffers):
            assert distance(training.model, model, of) <= tolerance * distance(model, start, of), who


def test_methods_have_the_passes_and_batches_of_their_users():
    first, second = 0, 1
    expected = {"plain": [first], "rolling": [first], "m-rwp": [first, second], "sam": [first, first]}
    for method, wanted in expected.items():
        training = Training(NETWORKS["mlp"], Who(method, "flatkern cpp"))
        taken: list[int] = []
        numbers = {id(inputs): k for k, (inputs, _) in enumerate(training.batches)}
        hook = partial(lambda to, _, args, numbers: to.append(numbers[id(args[0])]), taken, numbers=numbers)
        training.model.register_forward_pre_hook(hook)
        spent = training(0)
        assert taken == wanted
        assert set(spent) == {"forward", "backward", "zero_grad", *(turn.call for turn in METHODS[method].cycle)}
        assert all(p.grad is None for p in training.params)


def test_ires_mask_counts_with_its_share(monkeypatch):
    """It is taken in every step, with a pass of its own, and is wanted in one of ten."""
    monkeypatch.setattr("bench.timing.harness.perf_counter_ns", iter(range(0, 10**6, 1000)).__next__)
    spent = Training(NETWORKS["gpt"], Who("ire", "flatkern cpp"))(0)
    assert spent == {"forward": 1100, "backward": 1100, "update_mask": 100, "step": 1000, "zero_grad": 1000}


# ---- the suite


@pytest.fixture(scope="module")
def found():
    """Rows and failures of a short run; one of its candidates cannot be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "candidates", lambda network, backend: [TORCH, OURS, SAM, Who("sam", "foreach"), NOBODY])
        titles: list[str] = []
        rows, failures = suite.run(["mlp"], rounds=2, alone=1, part=titles.append)
    assert titles == suite.parts(["mlp"])
    return json.loads(json.dumps(results.document(rows, failures, threads=2, seconds=1.0)))


@pytest.mark.matrix
def test_a_candidate_that_fails_costs_its_own_row(found):
    assert [b["params"]["candidate"] for b in found["benchmarks"]] == [TORCH.label, OURS.label, SAM.label, "foreach"]
    (failure,) = found["failures"]
    assert failure["candidate"] == "nobody" and failure["reason"].startswith("KeyError") and failure["table"] == "train"


@pytest.mark.matrix
def test_rows_have_all_that_tables_show(found):
    for b in found["benchmarks"]:
        info, two = b["extra_info"], b["params"]["method"] == "sam"
        assert b["stats"]["rounds"] == 2 and info["passes"] == 1 + two
        assert set(info["calls"]) == {"forward", "backward", "step", "zero_grad", *["perturb"] * two}
        assert 0 < info["optimizer_share"] < 1 and 0 < info["passes"] * info["pass"] < b["stats"]["max"]
        assert b["stats"]["median"] == pytest.approx(info["times_plain"] * found["benchmarks"][0]["stats"]["median"])


@linux
@pytest.mark.matrix
def test_processes_of_their_own_tell_faults_and_memory(found):
    weights = 4 * NETWORKS["mlp"].numel
    for b in found["benchmarks"]:
        assert set(b["extra_info"]["alone"]) == {"system", "keeping"}
        for there in b["extra_info"]["alone"].values():
            assert there["seconds"]["rounds"] == 1 and there["faults"] >= 0
            copies = 3 if b["params"]["method"] == "plain" else 4  # weights, gradients, momentum; what SAM restores
            assert copies * weights < there["peak_bytes"] < 4 * copies * weights


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_an_allocator_that_keeps_memory_faults_no_second_time():
    program = (
        "from resource import *\n"
        "for _ in range(3):\n"
        "    before = getrusage(RUSAGE_SELF).ru_minflt\n"
        "    b'x' * (48 << 20)\n"
        "print(getrusage(RUSAGE_SELF).ru_minflt - before)"
    )
    faults = {
        allocator: int(subprocess.check_output([sys.executable, "-c", program], env={**os.environ, **settings}))
        for allocator, settings in processes.ALLOCATORS.items()
    }
    assert faults["keeping"] < 100 < faults["system"]


@linux
@pytest.mark.matrix
def test_a_process_that_ends_is_a_failure_and_no_hang():
    with processes.Servers() as servers:
        server = servers.servers["system"]
        server.start("alone", "mlp", tuple(OURS))
        with pytest.raises(processes.Failed, match="KeyError"):
            servers.alone("mlp", NOBODY, 1)
        server.process.kill()
        with pytest.raises(processes.Failed, match="ended"):
            servers.alone("mlp", OURS, 1)


def test_an_interrupt_leaves_what_is_measured(monkeypatch):
    monkeypatch.setattr(processes, "impossible", lambda: "in this process")
    monkeypatch.setattr(suite, "candidates", lambda network, backend: [TORCH, OURS])
    rows: list[dict] = []

    def part(title):
        if title == "ResNet, whole steps":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run(["mlp", "conv"], rounds=1, rows=rows, part=part)
    assert [row["params"]["model"] for row in rows] == ["mlp", "mlp"]
    assert not any("alone" in row["extra_info"] for row in rows)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="stage e2e of make gpu"):
        suite.run(device="cuda")
    with pytest.raises(ValueError, match="no network 'resnet50'; there are mlp"):
        suite.run(["mlp", "resnet50"])


# ---- tables


def document(memory: bool = True) -> dict:
    """Milliseconds of optimizer and of passes, page faults and megabytes, by hand."""
    numbers = {
        TORCH: (2, 20, 0, 100), OURS: (1, 21, 0, 104), Who("rolling", "flatkern cpp"): (4, 20, 5, 120),
        SAM: (5, 40, 9, 140), Who("sam", "loop"): (8, 40, 2, 150), Who("sam", "foreach"): (4, 40, 3, 130),
    }  # fmt: skip
    rows = []
    for who, (optimizer, passes, faults, megabytes) in numbers.items():
        spent = {"forward": passes // 2, "backward": passes - passes // 2, "step": optimizer}
        rows.append(race.row("mlp", who, Timings([{call: ms * 10**6 for call, ms in spent.items()}] * 3)))
        if memory:
            slow = spent | {"faults": faults, "step": optimizer + faults}
            measured = {"system": [slow] * 3, "keeping": [spent | {"faults": 0}] * 3}
            there = {kind: {"steps": steps, "peak_bytes": megabytes * 10**6} for kind, steps in measured.items()}
            rows[-1]["extra_info"] |= suite.memory_of(there)
    results.compare(rows, "torch fused", None)
    return json.loads(json.dumps(results.document(rows, [], threads=2, seconds=1.0)))


def test_tables_say_what_was_measured_and_mark_losses():
    network, allocator = training_tables(document())
    assert network.name == "train-mlp" and allocator.name == "train-allocator"
    cells = {(row[0], row[1]): row[2:] for row in network.rows}
    assert cells["plain", "torch fused"] == [
        "22.0 ms (22.0 to 22.0)", "1.00x", "9 %", "20.0 ms", "1.00x", "0", "100 MB",
    ]  # fmt: skip
    assert cells["plain", "flatkern cpp"][1:] == ["1.00x", "5 %", "21.0 ms", "1.05x", "0", "104 MB"]
    assert cells["SAM", "flatkern cpp"][1:] == [
        "**2.05x (slower)**", "11 %", "20.0 ms", "1.00x", "9", "**140 MB (more)**",
    ]  # fmt: skip
    assert cells["SAM", "foreach"][1] == "2.00x"  # it is ours that are marked
    (row,) = [row for row in allocator.rows if row[:2] == ["MLP, SAM", "flatkern cpp"]]
    assert row[2:] == [
        "45.0 ms", "1.20x", "0", "9", "**0.98x (slower)**", "**0.87x (slower)**", *2 * ["**140 MB (more)**"],
    ]  # fmt: skip


def test_tables_do_without_memory():
    (network,) = training_tables(document(memory=False))
    assert all(row[-2:] == ["-", "-"] for row in network.rows)
