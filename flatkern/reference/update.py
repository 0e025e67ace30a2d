"""Base updates in eager PyTorch: SGD, Adam, AdamW, each with what a method wraps around it.

An update is one pass: form the gradient, fetch the clean weight, apply the rule, remember ARWP's
history, store; in rolling mode the next perturbation follows. The rule is a function of tensors.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..tables import rows
from .arithmetic import float32, mixed, numbers, root
from .mask import amplified
from .norm import row_norms
from .perturb import perturbation


def remember(history: Tensor, g: Tensor, grad_scale: Tensor | None, beta: float) -> None:
    """F <- beta F + sum over the filter of g^2, g the unscaled perturbed gradient, mean over rounds."""
    if grad_scale is not None:
        g = g.float() * grad_scale
    square = g.float().square()
    new = rows(square).double().sum(dim=1).float() if g.dim() >= 2 else square.flatten()
    history.copy_(float32(beta, history) * history + new)


def sgd(p, g, v, lr, momentum, dampening, weight_decay, nesterov):
    """torch.optim.SGD: returns the new weight and the new momentum; float32."""
    d = g + weight_decay * p
    if v is not None:
        v = momentum * v + (1 - dampening) * d
        d = d + momentum * v if nesterov else v
    return p - lr * d, v


def adam(p, g, m, v, step, lr, beta1, beta2, eps, decay, decoupled):
    """torch.optim.Adam, or AdamW where `decoupled`: returns the new weight and moments; float32.

    Bias corrections are float64 scalars; what enters the float32 arithmetic is rounded once.
    """
    if decoupled:
        p = p * (1 - lr * decay)
    elif decay != 0:
        g = g + decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    denominator = root(v) / float32(math.sqrt(1 - beta2**step), v) + eps
    return p - (lr / (1 - beta1**step)) * (m / denominator), m, v


def _update(
    rule, params, backups, masters, history, grads, clean_grads, masks, noise, component, grad_scale, clip, found_inf,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
) -> None:  # fmt: skip
    """The pass that every rule shares; `rule(k, w, g)` returns the new weight of parameter k."""
    skip = found_inf is not None and bool(found_inf)
    for k, param in enumerate(params):
        clean = masters[k] if masters else backups[k] if backups else param
        past = history[k] if history else None
        if not skip:
            clean_grad = clean_grads[k] if clean_grads else None
            g = mixed(grads[k], clean_grad, component, grad_scale, grad_weight[k], clean_weight[k], clip)
            # Without noise a backup has served, and is left as it was.
            updated = param if noise is None and not masters else clean
            w = rule(k, clean.float(), g)
            updated.copy_(amplified(w, clean.float(), masks[k], kappa[k]) if masks else w)
            clean = updated
            if past is not None:
                remember(past, grads[k], grad_scale, beta[k])
        if noise is None:
            param.copy_(clean)
        else:
            e = perturbation(clean, row_norms(rows(clean)), past, sigma[k], eta[k], noise, index[k], offset[k])
            rows(param).copy_(rows(clean).float() + e)


def sgd_update_(
    params, momentum_buffers, backups, masters, history, grads, clean_grads, masks, lrs, sigmas, noise,
    component, grad_scale, clip, found_inf, *, lr, momentum, dampening, weight_decay, nesterov,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
) -> None:  # fmt: skip
    """Restore, form the gradient, and take one SGD step; in rolling mode perturb for the next one.

        w <- master, else backup, else p
        g <- clip (grad_weight grad_scale g + clean_weight (q g_clean - r grad_scale g)),    (q, r) = component
        d <- g + weight_decay w
        v <- momentum v + (1 - dampening) d
        w <- w - lr (d + momentum v)     with nesterov, else w - lr v;  w - lr d without momentum
        w <- w + kappa n (w - w_old)                                    where there are masks (IRE)
        F <- beta F + sum_f (grad_scale g)^2                            where there is a history
        p <- w, or with `noise` (rolling): backup <- w,  p <- w + s z   as in perturb_gaussian_

    A fresh momentum buffer is zero and takes dampening 0, which is torch's first step. Nonzero
    `found_inf` leaves everything but the weights as it was; those are restored (rolling: redrawn).

    torch.optim.SGD; Sutskever et al. 2013.
    """
    lr = numbers(lrs, lr)

    def rule(k, w, g):
        if not momentum_buffers:
            return sgd(w, g, None, lr[k], momentum[k], dampening[k], weight_decay[k], nesterov[k])[0]
        buffer = momentum_buffers[k]
        w, v = sgd(w, g, buffer.float(), lr[k], momentum[k], dampening[k], weight_decay[k], nesterov[k])
        buffer.copy_(v)
        return w

    _update(
        rule, params, backups, masters, history, grads, clean_grads, masks, noise, component, grad_scale, clip,
        found_inf, grad_weight, clean_weight, kappa, beta, numbers(sigmas, sigma), eta, index, offset,
    )  # fmt: skip


def _adam_rule(exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, *, decoupled):
    def rule(k, w, g):
        steps[k] += 1
        m, v, step = exp_avgs[k].float(), exp_avg_sqs[k].float(), steps[k].item()
        w, m, v = adam(w, g, m, v, step, lr[k], beta1[k], beta2[k], eps[k], weight_decay[k], decoupled)
        exp_avgs[k].copy_(m)
        exp_avg_sqs[k].copy_(v)
        return w

    return rule


def adam_update_(
    params, exp_avgs, exp_avg_sqs, steps, backups, masters, history, grads, clean_grads, masks, lrs, sigmas,
    noise, component, grad_scale, clip, found_inf, *, lr, beta1, beta2, eps, weight_decay,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
) -> None:  # fmt: skip
    """Restore, form the gradient, and take one Adam step; in rolling mode perturb for the next one.

        w, g as in sgd_update_;  g <- g + weight_decay w
        step <- step + 1
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        w <- w - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
        F, p as in sgd_update_

    `steps` are 0-dim float32, one per parameter, advanced here.

    torch.optim.Adam; Kingma and Ba 2015, algorithm 1.
    """
    rule = _adam_rule(exp_avgs, exp_avg_sqs, steps, numbers(lrs, lr), beta1, beta2, eps, weight_decay, decoupled=False)
    _update(
        rule, params, backups, masters, history, grads, clean_grads, masks, noise, component, grad_scale, clip,
        found_inf, grad_weight, clean_weight, kappa, beta, numbers(sigmas, sigma), eta, index, offset,
    )  # fmt: skip


def adamw_update_(
    params, exp_avgs, exp_avg_sqs, steps, backups, masters, history, grads, clean_grads, masks, lrs, sigmas,
    noise, component, grad_scale, clip, found_inf, *, lr, beta1, beta2, eps, weight_decay,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
) -> None:  # fmt: skip
    """As adam_update_, with decoupled weight decay.

        w <- (1 - lr weight_decay) w          instead of  g <- g + weight_decay w

    torch.optim.AdamW; Loshchilov and Hutter 2019, algorithm 2.
    """
    rule = _adam_rule(exp_avgs, exp_avg_sqs, steps, numbers(lrs, lr), beta1, beta2, eps, weight_decay, decoupled=True)
    _update(
        rule, params, backups, masters, history, grads, clean_grads, masks, noise, component, grad_scale, clip,
        found_inf, grad_weight, clean_weight, kappa, beta, numbers(sigmas, sigma), eta, index, offset,
    )  # fmt: skip


def mix_gradients_(
    grads, history, outs, clean_grads, component, grad_scale, clip, found_inf, *, grad_weight, clean_weight, beta
) -> None:  # fmt: skip
    """Form the final gradient in place, for a base optimizer that is not ours; or in `outs`, to keep it.

        F <- beta F + sum_f (grad_scale g)^2                            where there is a history
        g <- clip (grad_weight grad_scale g + clean_weight (q g_clean - r grad_scale g)),    (q, r) = component
        out <- that, and g stays                                        where there are outs

    Nonzero `found_inf` leaves everything as it was.

    m-RWP: Li et al. 2024, eq. 8.
    """
    if found_inf is not None and bool(found_inf):
        return
    for k, g in enumerate(grads):
        clean_grad = clean_grads[k] if clean_grads else None
        if history:
            remember(history[k], g, grad_scale, beta[k])
        final = mixed(g, clean_grad, component, grad_scale, grad_weight[k], clean_weight[k], clip)
        (outs[k] if outs else g).copy_(final)
