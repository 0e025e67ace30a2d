"""Stage sweep: ours with other sizes of tiles, in turns with the usual ones. Nothing is kept of it but times."""

from __future__ import annotations

from . import racing, wanted
from .racing import Racer
from .stages import most_seconds


class Sweeper(Racer):
    """Every candidate walks its own tables, made with its own tuning."""

    def fitting(self, race):
        forget_calls()  # of the race before, whose tensors' addresses may come again
        return super().fitting(race)

    def prepare(self, race, entry, weights, gradients):
        with wanted.tuned(entry.tuning, self.machine.device):
            return super().prepare(race, entry, weights, gradients)

    def interleave(self, race, candidates):
        # Tables that were made now would be of no candidate's tuning: that is an error, not a result.
        with wanted.no_new_plans(self.machine.device):
            return super().interleave(race, candidates)


def forget_calls() -> None:
    from flatkern.triton_kernels import launch

    for cache in launch._caches.values():
        cache.last_calls.clear()


def main(arguments: list[str]) -> int:
    return racing.run(wanted.sweep(), usual=most_seconds()["sweep"], most=2.0, racer=Sweeper)
