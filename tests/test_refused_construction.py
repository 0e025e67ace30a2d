"""A constructor or add_param_group() that is refused leaves parameters, gradients, a wrapped base and the optimizer as
they were.
"""

import pytest
import torch
from torch.nn import Parameter
from two_buckets import Run, assert_same_run, values
from unchanged import refused

import flatkern
from flatkern import IRE, RWP, SAM, SGD, Adam, AdamW, Wrap

SHARED = "shares memory with"
X = values((4, 3), 0)


def matrix(dtype=torch.float32):
    return Parameter(values((3, 2), 1).to(dtype), requires_grad=dtype.is_floating_point or dtype.is_complex)


NEW_PARAMETERS = {  # what cannot be served: error, message, the parameters
    "sparse": (TypeError, "sparse", lambda p: [Parameter(torch.eye(3).to_sparse())]),
    "float64": (TypeError, "float64", lambda p: [matrix(), matrix(torch.float64)]),
    "complex": (TypeError, "complex64", lambda p: [matrix(torch.complex64)]),
    "gaps": (ValueError, r"\.contiguous\(\)", lambda p: [Parameter(values((8,), 0)[::2])]),
    "transposed": (ValueError, "dim 0 is not outermost", lambda p: [Parameter(values((4, 3), 0).t())]),
    "views": (ValueError, SHARED, lambda p: [Parameter(X[:2]), Parameter(X[1:])]),
    "part of another": (ValueError, SHARED, lambda p: [Parameter(p.detach()[:1])]),
}
NEW_VALUES = {  # the same of group values
    "lr": (ValueError, "lr", {"lr": -1.0}),
    "weight_decay": (ValueError, "weight_decay", {"weight_decay": float("nan")}),
    "sigma": (ValueError, "sigma", {"sigma": float("inf")}),
    "sigma is a string": (TypeError, "sigma", {"sigma": "0.1"}),
    "lam": (ValueError, "lam", {"lam": 0.5}),
    "seed": (ValueError, "seed", {"seed": -1}),
    "round": (ValueError, "round", {"round": 2**32}),
}

BASES_OWN = ("lr", "weight_decay")


def base_of(params):
    return torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("case", NEW_PARAMETERS)
@pytest.mark.parametrize("rule", [SGD, AdamW, Wrap])
def test_parameters(rule, case):
    """In a constructor, behind a parameter that is all right."""
    error, message, make = NEW_PARAMETERS[case]
    p = matrix()
    p.grad = values((3, 2), 2)
    params = [p, *make(p)]
    base = base_of(params) if rule is Wrap else None
    with refused(error, message, params, base):
        rule(base or params, perturb=RWP())
    p.grad = None
    SGD([p], perturb=RWP()).perturb()  # nobody holds it


@pytest.mark.parametrize("case", NEW_PARAMETERS)
@pytest.mark.parametrize(
    ("backend", "rule"), [("eager", "SGD"), ("cpp", "AdamW"), ("cpp", "Wrap")], indirect=["backend"]
)
def test_parameters_of_a_new_group(rule, case, backend):
    error, message, make = NEW_PARAMETERS[case]
    run, untroubled = (Run("RWP", rule, backend).train(1) for _ in range(2))
    with run.refused(error, message):
        run.opt.add_param_group({"params": make(run.params[0])})
    for r in (run, untroubled):
        r.train(1)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize("case", [case for case in NEW_VALUES if case not in BASES_OWN])
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Wrap"])
def test_values(rule, case):
    """The second group's, in a constructor; what a wrapped base has is left as it is."""
    error, message, own = NEW_VALUES[case]
    params = [matrix(), matrix()]
    if rule == "Wrap":  # in its base's groups our names are the base's, but for the flags
        own = {key if key in ("perturb", "enhance") else f"perturb_{key}": value for key, value in own.items()}
    groups = [{"params": params[:1]}, {"params": params[1:], **own}]
    base = torch.optim.SGD(groups, lr=0.1) if rule == "Wrap" else None
    with refused(error, message, params, base):
        Wrap(base, RWP()) if base is not None else getattr(flatkern, rule)(groups, perturb=RWP())


@pytest.mark.parametrize(
    ("rule", "case"),  # lr and weight decay of a wrapped base are its own
    [(rule, c) for rule in ("SGD", "AdamW", "Wrap") for c in NEW_VALUES if rule != "Wrap" or c not in BASES_OWN],
)
def test_values_of_a_new_group(rule, case, backend):
    error, message, own = NEW_VALUES[case]
    run, untroubled = (Run("RWP", rule, backend).train(1) for _ in range(2))
    late = matrix()
    with run.refused(error, message):
        run.opt.add_param_group({"params": [late], **own})
    for r in (run, untroubled):
        r.opt.add_param_group({"params": [late if r is run else matrix()]})
        r.params = [*r.params, r.opt.param_groups[2]["params"][0]]
        r.train(2)
    assert_same_run(run, untroubled)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class NeedsKeyword(torch.optim.SGD):
    def step(self, *, closure):
        return super().step(closure)


class NeedsMore(torch.optim.SGD):
    def step(self, loss, closure=None):
        return super().step(closure)


class Zero(torch.optim.SGD):
    pass


Zero.__name__ = "ZeroRedundancyOptimizer"


class AnyArguments(torch.optim.SGD):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class NoArguments(torch.optim.SGD):
    def step(self):
        return super().step()


BASES = {  # that Wrap refuses: message, and how to make one
    "LBFGS": ("LBFGS.*closure", lambda params: torch.optim.LBFGS(params)),
    "closure": ("NeedsClosure.*closure", lambda params: NeedsClosure(params, lr=0.1)),
    "keyword": ("NeedsKeyword.*closure", lambda params: NeedsKeyword(params, lr=0.1)),
    "another argument": ("NeedsMore", lambda params: NeedsMore(params, lr=0.1)),
    "zero": ("ZeroRedundancyOptimizer", lambda params: Zero(params, lr=0.1)),
    "ours": ("flatkern", lambda params: SGD(params, lr=0.1)),
}
METHODS = {"none": None, "RWP": RWP(), "m-RWP": RWP(lam=0.5), "SAM": SAM(), "rolling": RWP(rolling=True)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", BASES)
def test_bases(case, method):
    message, make = BASES[case]
    params = [matrix(), matrix()]
    base = make(params)
    with refused((TypeError, ValueError), message, params, base):
        Wrap(base, METHODS[method])
    if not isinstance(base, flatkern.SGD):
        assert not base.param_groups[0].keys() & {"sigma", "rho", "perturb", "round"}


@pytest.mark.parametrize("make", [AnyArguments, NoArguments, torch.optim.Rprop, torch.optim.Adagrad])
def test_bases_that_step_without_a_closure(make, backend):
    params = [matrix()]
    before = params[0].detach().clone()
    opt = Wrap(make(params, lr=0.1), SAM(), backend=backend)
    params[0].grad = values((3, 2), 2)
    opt.perturb()
    params[0].grad = values((3, 2), 3)
    opt.step()
    assert not torch.equal(params[0], before)


ARGUMENTS = {  # error, message, what the constructor is given
    "perturb": (TypeError, "perturb", {"perturb": 3}),
    "perturb is a class": (TypeError, "perturb", {"perturb": RWP}),
    "enhance": (TypeError, "enhance", {"enhance": 1}),
    "backend": (ValueError, "backend", {"backend": "gpu"}),
    "backend that is not there": (RuntimeError, "cuda", {"backend": "cuda"}),
    "max_grad_norm": (ValueError, "max_grad_norm", {"max_grad_norm": -1.0}),
    "capturable": (ValueError, "capturable", {"capturable": True}),
    "lr": (ValueError, "lr", {"lr": -1.0}),
}
OF_RULES = ("capturable", "lr")


@pytest.mark.parametrize(
    ("rule", "case"),
    [(rule, c) for rule in (SGD, Adam, AdamW, Wrap) for c in ARGUMENTS if rule is not Wrap or c not in OF_RULES],
)
def test_arguments(rule, case):
    error, message, own = ARGUMENTS[case]
    params = [matrix(), matrix()]
    base = base_of(params) if rule is Wrap else None
    own = {"perturb": RWP(), "enhance": IRE(1.0)} | own
    with refused(error, message, params, base):
        rule(params if base is None else base, **own)
