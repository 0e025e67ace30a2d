"""filter_norms, perturb_, restore_ as their users see them: values, keys, backups, autograd, autocast, refusals."""

import math
import re

import pytest
import torch
from compare import assert_same_values, bits, copies

import flatkern
from flatkern.dispatch import resolve

SHAPES = [(3, 5), (), (4, 3, 2, 2), (7,), (0,), (2, 0), (1, 9)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = dict(seed=5, round=2)


def parameters(dtype=None, shapes=SHAPES):
    """Seeded leaves; without `dtype` of all three."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(t.to(dtype or DTYPES[k % 3])) for k, t in enumerate(values)]


def normals(like, key, backend):
    """What a perturbation with this key draws, in float32."""
    outs = [torch.zeros(p.shape) for p in like]
    noise = torch.tensor([key["seed"], key.get("stream", 0), key["round"]])
    n = len(outs)
    resolve("fill_normal_", "cpu", backend)(outs, noise, index=list(range(n)), offset=[0] * n)
    return outs


# Values.


def test_filter_norms():
    params = parameters()
    norms = flatkern.filter_norms(p for p in params)
    for p, norm in zip(params, norms, strict=True):
        assert norm.dtype == torch.float32 and not norm.requires_grad
        flat = p.detach().double().reshape(p.shape[0], -1) if p.dim() > 1 else p.detach().double().reshape(1, -1)
        torch.testing.assert_close(norm.double(), flat.norm(dim=1), rtol=2**-22, atol=0)
    assert flatkern.filter_norms([]) == []


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("sigma", [0.1, -0.3])
def test_perturb_adds_the_noise_of_its_key(backend, dtype, sigma):
    """p <- w + rn(rn(sigma norm) z), to the bit: seed, stream and round are the key, the position is the index."""
    params, key = parameters(dtype), dict(seed=2**32 - 1, stream=7, round=2**31)
    clean, norms, backups = copies(params), flatkern.filter_norms(params), copies(params)
    for b in backups:
        b.fill_(math.nan)
    flatkern.perturb_(params, sigma, **key, norms=norms, backups=backups, backend=backend)
    want = []
    for w, norm, z in zip(clean, norms, normals(clean, key, backend), strict=True):
        s = torch.tensor(sigma) * (norm.reshape(-1, *[1] * (w.dim() - 1)) if w.dim() > 1 else norm.reshape(()))
        want.append((w.float() + s * z).to(w.dtype))
    assert_same_values(params, want)
    assert_same_values(backups, clean)
    assert any(not torch.equal(p, w) for p, w in zip(params, clean, strict=True))


def test_torchs_default_device_does_not_matter(backend):
    """The key stays on the CPU, where every backend takes it, and where no call has to wait for it."""
    here, there = (torch.ones(3, 5) for _ in range(2))
    flatkern.perturb_([here], 0.1, seed=1, round=2, backend=backend)
    with torch.device("meta"):
        flatkern.perturb_([there], 0.1, seed=1, round=2, backend=backend)
    assert here.equal(there)


def test_stream_is_zero_unless_given(backend):
    given, default = parameters(), parameters()
    flatkern.perturb_(given, 0.1, **KEY, stream=0, backend=backend)
    flatkern.perturb_(default, 0.1, **KEY, backend=backend)
    assert_same_values(default, given)


@pytest.mark.parametrize("change", [dict(seed=6), dict(stream=1), dict(round=3)], ids=str)
def test_another_key_is_other_noise(backend, change):
    one, other = parameters(), parameters()
    flatkern.perturb_(one, 0.1, **KEY, backend=backend)
    flatkern.perturb_(other, 0.1, **KEY | change, backend=backend)
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a.numel())


def test_negative_sigma_mirrors_every_bit(backend):
    """Around zero nothing is rounded, so the noise itself is seen."""
    up, down = ([torch.zeros(p.shape, dtype=p.dtype) for p in parameters()] for _ in range(2))
    norms = [torch.ones(p.shape[0] if p.dim() > 1 else 1) for p in up]
    flatkern.perturb_(up, 0.1, **KEY, norms=norms, backend=backend)
    flatkern.perturb_(down, -0.1, **KEY, norms=norms, backend=backend)
    assert_same_values(down, [0 - p for p in up])


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_norms_are_those_of_the_present_values_unless_given(backend, dtype):
    """Given ones let tensors that are perturbed already move by the scale of the clean ones."""
    once, twice = parameters(dtype), parameters(dtype)
    norms = [torch.zeros(n.shape) for n in flatkern.filter_norms(once)]
    resolve("filter_norms_", "cpu", backend)(norms, [p.detach() for p in once])
    flatkern.perturb_(once, 0.5, **KEY, backend=backend)
    flatkern.perturb_(twice, 0.5, **KEY, norms=norms, backend=backend)
    assert_same_values(once, twice)
    flatkern.perturb_(once, 0.5, seed=1, round=0, backend=backend)
    flatkern.perturb_(twice, 0.5, seed=1, round=0, norms=norms, backend=backend)
    assert not torch.equal(once[0], twice[0])


def test_no_sigma_leaves_every_bit(backend):
    params = parameters()
    clean = copies(params)
    flatkern.perturb_(params, 0.0, **KEY, backend=backend)
    assert_same_values(params, clean)


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_restore_is_exact(backend, dtype):
    params = parameters(dtype)
    with torch.no_grad():
        params[0][0, :3] = torch.tensor([-0.0, 2.0**-24, math.inf])
    clean, backups = copies(params), copies(params)
    flatkern.perturb_(params, 0.5, **KEY, backups=backups, backend=backend)
    flatkern.restore_(params, backups, backend=backend)
    for p, w in zip(params, clean, strict=True):
        assert torch.equal(bits(p), bits(w))


def test_float32_backups_of_half_types_round_once(backend):
    params = parameters(torch.bfloat16)
    masters = [torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) for k, p in enumerate(params)]
    flatkern.restore_(params, masters, backend=backend)
    assert_same_values(params, [m.to(torch.bfloat16) for m in masters])


def test_memory_formats(backend):
    """channels_last filters are stored as they are, and backups have to be too."""
    params = [torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)]
    clean, backups = copies(params), [torch.zeros_like(params[0])]
    flatkern.perturb_(params, 0.1, **KEY, backups=backups, backend=backend)
    assert_same_values(backups, clean)
    stored, want = params[0].permute(0, 2, 3, 1).contiguous(), clean[0].permute(0, 2, 3, 1).contiguous()
    flatkern.perturb_([want], 0.1, **KEY, backend=backend)
    assert_same_values([stored], [want])


# Autograd and autocast.


def test_writes_are_seen_by_autograd(backend):
    """A write between forward and backward must raise, not give wrong gradients."""
    w = torch.nn.Parameter(torch.randn(3, 5))
    backup, x = [w.detach().clone()], torch.randn(2, 5, requires_grad=True)
    for write in (
        lambda: flatkern.perturb_([w], 0.1, **KEY, backend=backend),
        lambda: flatkern.restore_([w], backup, backend=backend),
    ):
        loss = (x @ w.t()).square().sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert w.is_leaf and w.requires_grad and w.grad_fn is None


def test_autocast_sees_new_weights(backend):
    """Autocast keeps casts of weights until its block ends; a second forward has to cast the new ones."""
    w, x = torch.nn.Parameter(torch.randn(3, 5)), torch.randn(2, 5)
    clean, backup = w.detach().clone(), [torch.zeros(3, 5)]

    def fresh(weight):
        return x.bfloat16() @ weight.detach().bfloat16().t()

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.nn.functional.linear(x, w), fresh(clean))
        flatkern.perturb_([w], 0.5, **KEY, backups=backup, backend=backend)
        assert torch.equal(torch.nn.functional.linear(x, w), fresh(w))
        flatkern.restore_([w], backup, backend=backend)
        assert torch.equal(torch.nn.functional.linear(x, w), fresh(clean))


# Refusals: op, argument, index, value, remedy; nothing is written. `given` changes the arguments of a good call.


def like(*tensors):
    return lambda: dict(params=list(tensors))


def storage():
    return torch.arange(30.0)


REFUSED = {
    "nan": (lambda: dict(sigma=math.nan), ValueError, "sigma is nan, but should be a finite number"),
    "infinite": (lambda: dict(sigma=-math.inf), ValueError, "sigma is -inf, but should be a finite number"),
    "negative seed": (lambda: dict(seed=-1), ValueError, "seed is -1, but should be an integer in [0, 2^32)"),
    "large round": (lambda: dict(round=2**32), ValueError, "round is 4294967296, but should be an integer in"),
    "fraction": (lambda: dict(stream=1.5), ValueError, "stream is 1.5, but should be an integer in [0, 2^32)"),
    "bool": (lambda: dict(seed=True), ValueError, "seed is True, but should be an integer in [0, 2^32)"),
    "few norms": (lambda: dict(norms=[torch.ones(3)]), ValueError, "norms has 1 entries, but params has 2"),
    "short norms": (lambda: dict(norms=[torch.ones(3), torch.ones(2)]), ValueError, "norms[1] has 2 elements, but"),
    "half norms": (lambda: dict(norms=[torch.ones(3), torch.ones(1).half()]), TypeError, "norms[1] has dtype"),
    "few backups": (lambda: dict(backups=[]), ValueError, "backups has 0 entries, but params has 2"),
    "other shape": (
        lambda: dict(backups=[torch.ones(5, 3), torch.ones(7)]),
        ValueError,
        "backups[0] has shape (5, 3), but params[0] has (3, 5)",
    ),
    "other layout": (
        lambda: dict(backups=[torch.ones(5, 3).t(), torch.ones(7)]),
        ValueError,
        "backups[0] has strides (1, 3), but params[0] has (5, 1); copy it into the other's memory format",
    ),
    "other device": (
        lambda: dict(backups=[torch.ones(3, 5), torch.ones(7, device="meta")]),
        ValueError,
        "backups[1] is on meta, but params[1] is on cpu",
    ),
    "sparse backup": (
        lambda: dict(backups=[torch.ones(3, 5).to_sparse(), torch.ones(7)]),
        TypeError,
        "backups[0] is sparse_coo, but should be strided; call .to_dense()",
    ),
    "sparse": (like(torch.ones(3, 5).to_sparse()), TypeError, "params[0] is sparse_coo, but should be strided"),
    "complex": (like(torch.ones(2), torch.ones(3) * 1j), TypeError, "params[1] has dtype torch.complex64, but should"),
    "integers": (like(torch.ones(3).int()), TypeError, "params[0] has dtype torch.int32, but should have one of"),
    "float64": (like(torch.ones(3).double()), TypeError, "params[0] has dtype torch.float64, but should have one of"),
    "no tensor": (like(torch.ones(3), 1.0), TypeError, "params[1] is float, but should be a tensor"),
    "twice": (lambda: dict(params=[storage()] * 2), ValueError, "params[1] shares memory with params[0]; pass every"),
    "overlap": (
        lambda: (lambda s: dict(params=[s[:20], torch.ones(3), s[19:]]))(storage()),
        ValueError,
        "params[2] shares memory with params[0]; pass every tensor once",
    ),
    "gaps": (
        lambda: dict(params=[storage()[::2]]),
        ValueError,
        "params[0] has gaps or overlaps in memory (strides (2,))",
    ),
    "expanded": (like(torch.ones(1).expand(4)), ValueError, "params[0] has gaps or overlaps in memory (strides (0,))"),
    "dim 0 inside": (
        like(torch.ones(3), torch.ones(5, 3).t()),
        ValueError,
        "params[1] has strides (1, 3), so dim 0 is not outermost in memory and its filters are not contiguous; "
        "call .contiguous()",
    ),
    "backend": (lambda: dict(backend="fast"), ValueError, "backend is 'fast', but should be one of eager, cpp"),
    "dead backend": (lambda: dict(backend="triton"), RuntimeError, "perturb_gaussian_: no backend for cpu: triton"),
}


def refused(call, error, message, *tensors):
    """`call` raises `error` whose text has `message`; the tensors keep their bits and versions."""
    strided = [t for t in tensors if isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta]
    before = [(t.clone(), t._version) for t in strided]
    with pytest.raises(error, match=re.escape(message)):
        call()
    for t, (value, version) in zip(strided, before, strict=True):
        assert torch.equal(t, value) and t._version == version


@pytest.mark.parametrize("change, error, message", REFUSED.values(), ids=REFUSED)
def test_perturb_refuses(backend, change, error, message):
    given = dict(params=[torch.ones(3, 5), torch.ones(7)], sigma=0.1, seed=1, round=0, backend=backend) | change()
    lists = [t for name in ("params", "norms", "backups") for t in given.get(name) or []]
    refused(lambda: flatkern.perturb_(**given), error, message, *lists)


PARAMS = [name for name, (change, *_) in REFUSED.items() if "params" in change()]


@pytest.mark.parametrize("change, error, message", [REFUSED[name] for name in PARAMS], ids=PARAMS)
def test_filter_norms_refuses(change, error, message):
    params = change()["params"]
    refused(lambda: flatkern.filter_norms(params), error, message, *params)


RESTORE_REFUSED = ["few backups", "other shape", "other layout", "other device", "sparse backup", "backend"]


@pytest.mark.parametrize("name", RESTORE_REFUSED)
def test_restore_refuses(backend, name):
    change, error, message = REFUSED[name]
    params = [torch.ones(3, 5), torch.ones(7)]
    given = dict(params=params, backups=copies(params), backend=backend) | change()
    refused(lambda: flatkern.restore_(**given), error, message, *params)


def test_the_default_backend_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FLATKERN_BACKEND", "fast")
    p = torch.ones(3)
    refused(lambda: flatkern.perturb_([p], 0.1, **KEY), ValueError, "FLATKERN_BACKEND is 'fast', but should be one", p)
    monkeypatch.setenv("FLATKERN_BACKEND", "cuda")
    refused(lambda: flatkern.perturb_([p], 0.1, **KEY), RuntimeError, "no backend for cpu: cuda", p)
    flatkern.perturb_([p], 0.1, **KEY, backend="eager")
    assert not torch.equal(p, torch.ones(3))
