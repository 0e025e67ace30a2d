"""How flat a trained model is: its loss along random directions, its sharpness, its Hessian's largest eigenvalue.

`python -m flatkern landscape` is command.py.
"""

from .curves import Line, Plane, line, plane
from .evaluation import UnrepeatableLoss
from .hessian import Eigenvalue, largest_eigenvalue
from .sharpness import AscentSharpness, AverageSharpness, ascent_sharpness, average_sharpness

__all__ = [
    "AscentSharpness",
    "AverageSharpness",
    "Eigenvalue",
    "Line",
    "Plane",
    "UnrepeatableLoss",
    "ascent_sharpness",
    "average_sharpness",
    "largest_eigenvalue",
    "line",
    "plane",
]
