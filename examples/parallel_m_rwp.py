"""m-RWP at the speed of ordinary training: clean and perturbed gradients at the same time, on different ranks.

    torchrun --nproc-per-node 2 examples/parallel_m_rwp.py
    torchrun --nproc-per-node 4 examples/parallel_m_rwp.py --eta 0.1          (m-ARWP)

Even ranks train at the weights, odd ones at perturbed weights; the mean that DDP takes anyway mixes their gradients.
What differs from ordinary DDP is marked by (1) to (4). On GPUs with NCCL, without them on the CPU with gloo. The data
are scikit-learn's handwritten digits where it is installed, else labels of a random network.
"""

import argparse
import gc
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import flatkern


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--steps", type=int, help="stop each epoch after so many steps")
    parser.add_argument("--batch-size", type=int, default=32, help="of each rank (default: 32)")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--sigma", type=float, default=0.015, help="noise, relative to the norm of each filter")
    parser.add_argument("--lam", type=float, default=0.5, help="weight of the perturbed gradient (default: 0.5)")
    parser.add_argument("--eta", type=float, default=0.0, help="m-ARWP's attenuation (default: 0, m-RWP)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_data(seed):
    """Training and test set: images (n, 1, 8, 8) and labels."""
    try:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(digits.target, dtype=torch.int64)
    except ImportError:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(1797, 1, 8, 8, generator=generator)
        teacher = torch.randn(64, 10, generator=generator)
        labels = (images.flatten(1) @ teacher).argmax(1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:597], order[597:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def train_epoch(model, opt, loader, device, most):
    """Returns the mean loss of this rank, and the median time of a step in milliseconds."""
    losses, times = [], []
    for step, (x, y) in enumerate(loader):
        if step == most:
            break
        start = time.perf_counter()
        opt.zero_grad()
        opt.perturb()  # (2) moves the weights of odd ranks, and nothing on even ones
        loss = cross_entropy(model(x.to(device)), y.to(device))
        (opt.loss_weight * loss).backward()  # (3) so that the mean over the ranks is lam's mix
        opt.step()  # (4) as always; afterwards all ranks have the same clean weights
        losses.append(loss.item())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.mean(losses), statistics.median(times)


@torch.no_grad()
def accuracy(model, data, device):
    """At clean weights, which is what a model has between steps; in percent."""
    images, labels = (t.to(device) for t in data.tensors)
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def over_ranks(*numbers):
    """The numbers of every rank, as (ranks, numbers)."""
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, numbers)
    return torch.tensor(rows)


def replicas_are_equal(model):
    """Whether all ranks have the same weights, bit for bit."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    return all(torch.equal(flat, other) for other in every)


def main():
    args = arguments()
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun: torchrun --nproc-per-node 2 examples/parallel_m_rwp.py")
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def show(text):
        if rank == 0:
            print(text, flush=True)

    torch.manual_seed(args.seed)
    data, test = load_data(args.seed)
    sampler = DistributedSampler(data, seed=args.seed)  # one for all ranks: clean and noisy ones see different samples
    loader = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(make_model().to(device), device_ids=[device.index] if on_gpus else None)
    method = flatkern.RWP(args.sigma, lam=args.lam, eta=args.eta, seed=args.seed, mix="ranks")
    opt = flatkern.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-3, perturb=method)  # (1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs)

    clean, noisy = list(range(0, world, 2)), list(range(1, world, 2))
    show(
        f"clean ranks {clean}, noisy ranks {noisy}, on {device.type}; loss weights {over_ranks(opt.loss_weight)[:, 0]}"
    )
    show(f"{'epoch':>5}  {'clean loss':>10}  {'noisy loss':>10}  {'test accuracy':>13}  {'ms a step':>9}  replicas")
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        numbers = over_ranks(*train_epoch(model, opt, loader, device, args.steps))
        scheduler.step()
        losses, ms = numbers[:, 0], numbers[:, 1].max()
        correct, same = accuracy(model.module, test, device), replicas_are_equal(model)
        show(
            f"{epoch:5}  {losses[clean].mean():10.4f}  {losses[noisy].mean():10.4f}  {correct:11.2f} %  {ms:9.1f}  "
            f"{'equal' if same else 'DIFFERENT'}"
        )
    gc.collect()  # of DDP's parts, some of which may otherwise outlive the group and end the process with an abort
    dist.destroy_process_group()
    if not same:
        raise SystemExit("the replicas differ")


if __name__ == "__main__":
    main()
