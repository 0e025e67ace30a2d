"""How kernels are started: the first time by Triton itself, then directly, and all launches of a call once more.

Triton's own way takes 30 us a launch to find out what the arguments are, and the compiled kernel 2. Nothing that is
compiled for differs while the plan is the same: dtypes and absence are part of its key, and alignments and numbers are
not specialized (a test compares what is launched in both ways).
"""

from typing import NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel

from .job import announce_launch, options_of


class Word(int):
    """A word of the noise's key, which is another one in the next call."""


class Launcher:
    """How to launch a kernel with arguments that are compiled alike. `direct`: its pointers may be integers."""

    direct = False

    def __init__(self, kernel, programs, options):
        self.kernel, self.programs, self.options = kernel, programs, options

    def __call__(self, stream, arguments):
        self.kernel[(self.programs,)](*arguments, **self.options)


class DirectLauncher(Launcher):
    """Of a compiled kernel. `constants` are the values of its constants, in their order."""

    direct = True

    def __init__(self, compiled, programs, constants):
        self.runner, self.constants = compiled[programs, 1, 1], constants
        self.compiled, self.programs = compiled, programs

    def __call__(self, stream, arguments):
        self.runner(*arguments, *self.constants, stream=stream)

    def bind(self, stream, arguments):
        """A function and all that it takes to launch the kernel, as the runner would while nobody watches launches."""
        compiled, nobody = self.compiled, (None, None, None)
        before = (self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, *nobody)
        return compiled.run, (*before, *arguments, *self.constants)


def first_launch(kernel, programs, warps, arguments, constants):
    """Compile a kernel and launch it; returns its launcher.

    What is not known to be a compiled kernel, as in the interpreter, is launched in Triton's own way each time.
    """
    announce_launch(kernel, warps, arguments, constants)
    options = options_of(warps, constants)
    compiled = kernel[(programs,)](*arguments, **options)
    rest = kernel.arg_names[len(arguments) :]
    if not isinstance(compiled, CompiledKernel) or set(rest) != set(constants):
        return Launcher(kernel, programs, options)
    return DirectLauncher(compiled, programs, tuple([constants[name] for name in rest]))


def is_watched():
    """Whether a profiler wants to hear of launches, which Triton's own launchers tell it."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Template(NamedTuple):
    """A launch: its arguments as integers, and which of them the next call replaces, by which of its values."""

    launcher: DirectLauncher
    arguments: list
    replaced: list  # (place among the arguments, place among the values of a call)


def templates(launches, values, plan):
    """The launches (launcher, arguments) of a call, for later calls of the same plan; None where they cannot be
    repeated.

    `values` are what the next call has its own of, and None. All other arguments have to be numbers, which follow from
    the plan, or memory of the plan.
    """
    given = [value for value in values if value is not None]
    places = {id(value): place for place, value in enumerate(values) if value is not None}
    if len(places) < len(given):
        return None  # one tensor in two roles, in which the next call may have two
    owned, found = {id(t) for t in tensors_of(plan)}, []
    for launcher, arguments in launches:
        if not launcher.direct:
            return None
        integers, replaced = list(arguments), []
        for k, argument in enumerate(arguments):
            if id(argument) in places:
                integers[k] = None  # nothing of the caller's is kept
                replaced.append((k, places[id(argument)]))
            elif id(argument) in owned:
                integers[k] = argument.data_ptr()
            elif isinstance(argument, (torch.Tensor, Word)):
                return None
        found.append(Template(launcher, integers, replaced))
    return found


def tensors_of(plan):
    """What a plan keeps alive, and its groups."""
    holders = [plan, *plan.groups]
    found = [value for holder in holders for value in vars(holder).values()]
    return [t for t in [*found, *plan.scratch.values()] if isinstance(t, torch.Tensor)]


def bind(launches, stream, values):
    """Functions and their arguments, for `values` as integers."""
    bound = []
    for launcher, arguments, replaced in launches:
        given = arguments[:]
        for place, value in replaced:
            given[place] = values[value]
        bound.append(launcher.bind(stream, given))
    return bound
