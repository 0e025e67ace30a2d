// The operations and their arguments, named and ordered as in flatkern/ops.py.
#pragma once

#include "table.h"

namespace flatkern {

struct FillNormal {
  Table outs, noise;
  Ints index, offset;
};

struct FilterNorms {
  Table norms, params;
};

struct AscentNorm {
  Table norm, params, grads, means;
  Floats eta, sigma;
};

struct GradientNorm {
  Table norm, grads, clean_grads, component, grad_scale;
  Floats grad_weight, clean_weight;
};

struct GradientProducts {
  Table products, grads, clean_grads;
};

struct PerturbGaussian {
  Table params, backups, masters, norms, history, sigmas, noise;
  Floats sigma, eta;
  Ints index, offset;
};

struct PerturbAscent {
  Table params, backups, new_means, masters, grads, means, norm;
  Floats rho, eta, sigma, momentum;
};

struct Restore {
  Table params, backups;
};

struct MixGradients {
  Table grads, history, outs, clean_grads, component, grad_scale, clip, found_inf;
  Floats grad_weight, clean_weight, beta;
};

// What every update takes besides the state and the scalars of its own rule.
struct Update {
  Table params, backups, masters, history, grads, clean_grads, masks;
  Table lrs, sigmas, noise, component, grad_scale, clip, found_inf;
  Floats grad_weight, clean_weight, kappa, beta, sigma, eta;
  Ints index, offset;
};

struct SgdUpdate : Update {
  Table momentum_buffers;
  Floats lr, momentum, dampening, weight_decay;
  Bools nesterov;
};

struct AdamUpdate : Update {
  Table exp_avgs, exp_avg_sqs, steps;
  Floats lr, beta1, beta2, eps, weight_decay;
  bool decoupled;
};

struct CountMagnitudes {
  Table counts, grads, prefix;
};

struct PackMask {
  Table masks, grads, threshold;
};

struct Amplify {
  Table params, previous, masks;
  Floats kappa;
};

// Every operation with its arguments. adamw_update_ is adam_update_ with `decoupled` set.
#define FK_FOR_EACH_OPERATION(_)          \
  _(FillNormal, fill_normal_)             \
  _(FilterNorms, filter_norms_)           \
  _(AscentNorm, ascent_norm_)             \
  _(GradientNorm, gradient_norm_)         \
  _(GradientProducts, gradient_products_) \
  _(PerturbGaussian, perturb_gaussian_)   \
  _(PerturbAscent, perturb_ascent_)       \
  _(Restore, restore_)                    \
  _(MixGradients, mix_gradients_)         \
  _(SgdUpdate, sgd_update_)               \
  _(AdamUpdate, adam_update_)             \
  _(CountMagnitudes, count_magnitudes_)   \
  _(PackMask, pack_mask_)                 \
  _(Amplify, amplify_)

}  // namespace flatkern
