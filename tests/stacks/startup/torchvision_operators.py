"""torchvision from PyPI can be imported beside a torch for CPUs.

It is built for torch with CUDA. Beside another torch its library is not loaded, and it fails where it describes two of
that library's operators, which nothing here calls.
"""

import importlib.abc
import importlib.metadata
import sys

OPERATORS = ("nms", "qnms")
kept = []  # torch forgets what a library has defined with the library


class DefineOperators(importlib.abc.MetaPathFinder):
    """Finds nothing, but is asked first."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            kept.append(library)
        return None


def fits(torchvision, torch):
    """Do the versions have the same local part, +cpu or +cu130 or none?"""
    return torchvision.partition("+")[2] == torch.partition("+")[2]


try:
    if not fits(*map(importlib.metadata.version, ("torchvision", "torch"))):
        sys.meta_path.insert(0, DefineOperators())
except importlib.metadata.PackageNotFoundError:
    pass
