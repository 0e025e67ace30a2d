// The arguments of every operation, named and ordered as in flatkern/ops.py, and the kernels of one instruction set.
#pragma once

#include "table.h"

namespace flatkern::cpu {

struct FillNormal {
  Table outs, noise;
  Ints index, offset;
};

struct FilterNorms {
  Table norms, params;
};

struct AscentNorm {
  Table norm, params, grads;
  Floats eta;
};

struct GradientNorm {
  Table norm, grads, clean_grads, grad_scale;
  Floats grad_weight, clean_weight;
};

struct PerturbGaussian {
  Table params, backups, masters, norms, history, sigmas, noise;
  Floats sigma, eta;
  Ints index, offset;
};

struct PerturbAscent {
  Table params, backups, masters, grads, norm;
  Floats rho, eta;
};

struct Restore {
  Table params, backups;
};

struct MixGradients {
  Table grads, history, clean_grads, grad_scale, clip;
  Floats grad_weight, clean_weight, beta;
};

// What every update takes besides the state and the scalars of its own rule.
struct Update {
  Table params, backups, masters, history, grads, clean_grads, masks, lrs, sigmas, noise, grad_scale, clip, found_inf;
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

// One instruction set's walks.
struct Kernels {
  void (*fill_normal_)(const FillNormal&);
  void (*filter_norms_)(const FilterNorms&);
  void (*ascent_norm_)(const AscentNorm&);
  void (*gradient_norm_)(const GradientNorm&);
  void (*perturb_gaussian_)(const PerturbGaussian&);
  void (*perturb_ascent_)(const PerturbAscent&);
  void (*restore_)(const Restore&);
  void (*mix_gradients_)(const MixGradients&);
  void (*sgd_update_)(const SgdUpdate&);
  void (*adam_update_)(const AdamUpdate&);
  void (*count_magnitudes_)(const CountMagnitudes&);
  void (*pack_mask_)(const PackMask&);
  void (*amplify_)(const Amplify&);
};

#define FK_DECLARE_KERNELS(isa)                   \
  namespace isa {                                 \
  void fill_normal_(const FillNormal&);           \
  void filter_norms_(const FilterNorms&);         \
  void ascent_norm_(const AscentNorm&);           \
  void gradient_norm_(const GradientNorm&);       \
  void perturb_gaussian_(const PerturbGaussian&); \
  void perturb_ascent_(const PerturbAscent&);     \
  void restore_(const Restore&);                  \
  void mix_gradients_(const MixGradients&);       \
  void sgd_update_(const SgdUpdate&);             \
  void adam_update_(const AdamUpdate&);           \
  void count_magnitudes_(const CountMagnitudes&); \
  void pack_mask_(const PackMask&);               \
  void amplify_(const Amplify&);                  \
  }

FK_DECLARE_KERNELS(baseline)
FK_DECLARE_KERNELS(avx2)
FK_DECLARE_KERNELS(avx512)

#undef FK_DECLARE_KERNELS

}  // namespace flatkern::cpu
