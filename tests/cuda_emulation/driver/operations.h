// The arguments of every operation. One without a function here does not compile (main.cpp).
#pragma once

#include "common/arguments.h"
#include "math/mask.h"
#include "tensors.h"

namespace driver {

// State has the dtype of the clean weights.
inline Table state(Tensors& t) { return t.has("masters") ? t.float32s() : t.weights(0.1f, 1.0f); }

inline void fill(FillNormal& a, Tensors& t) {
  a.outs = t.weights();
  a.noise = t.integers(3, 5);
  a.index = t.index(), a.offset = t.offset();
}

inline void fill(FilterNorms& a, Tensors& t) {
  a.params = t.weights();
  a.norms = t.of_filters(false);
}

inline void fill(AscentNorm& a, Tensors& t) {
  a.norm = t.scalar(0);
  a.grads = t.weights();
  if (t.has("masters")) a.params = t.float32s();
  if (t.has("backups")) a.params = t.weights();
  if (t.has("noise")) a.means = state(t);
  a.eta = t.numbers(a.params ? 0.01 : -1.0), a.sigma = t.numbers(0.5);
}

inline void fill(GradientNorm& a, Tensors& t) {
  a.norm = t.scalar(0);
  a.grads = t.weights();
  if (t.has("clean_grads")) a.clean_grads = t.weights();
  if (t.has("scalars")) a.component = t.float32s_of(2, 0.5f), a.grad_scale = t.scalar(0.5f);
  a.grad_weight = t.numbers(0.7), a.clean_weight = t.numbers(0.3);
}

inline void fill(GradientProducts& a, Tensors& t) {
  a.products = t.float64s_of(3, 0);
  a.grads = t.weights();
  a.clean_grads = t.weights();
}

inline void fill(PerturbGaussian& a, Tensors& t) {
  a.params = t.weights();
  if (t.has("backups")) a.backups = t.weights();
  if (t.has("masters")) a.masters = t.float32s();
  if (t.has("norms")) a.norms = t.of_filters(false);
  if (t.has("history")) a.history = t.of_filters(true);
  if (t.has("scalars")) a.sigmas = t.float64s(0.1);
  a.noise = t.integers(3, 5);
  a.sigma = t.numbers(0.1), a.eta = t.numbers(0.1);
  a.index = t.index(), a.offset = t.offset();
}

inline void fill(PerturbAscent& a, Tensors& t) {
  a.params = t.weights();
  if (t.has("backups")) a.backups = t.weights();
  if (t.has("masters")) a.masters = t.float32s();
  a.grads = t.weights();
  a.norm = t.scalar(2);
  if (t.has("noise")) a.means = state(t), a.new_means = state(t);
  a.rho = t.numbers(0.05), a.eta = t.numbers(t.has("norms") ? -1.0 : 0.01);
  a.sigma = t.numbers(0.5), a.momentum = t.numbers(0.9);
}

inline void fill(Restore& a, Tensors& t) {
  a.params = t.weights();
  a.backups = t.has("masters") ? t.float32s() : t.weights();
}

inline void fill(MixGradients& a, Tensors& t) {
  a.grads = t.weights();
  if (t.has("history")) a.history = t.of_filters(true);
  if (t.has("clean_grads")) a.clean_grads = t.weights();
  if (t.has("masters")) a.outs = t.weights();
  if (t.has("scalars")) {
    a.component = t.float32s_of(2, 0.5f);
    a.grad_scale = t.scalar(0.5f), a.clip = t.scalar(0.9f), a.found_inf = t.scalar(0);
  }
  a.grad_weight = t.numbers(0.7), a.clean_weight = t.numbers(0.3), a.beta = t.numbers(0.9);
}

inline void fill_update(Update& a, Tensors& t) {
  a.params = t.weights();
  if (t.has("backups")) a.backups = t.weights();
  if (t.has("masters")) a.masters = t.float32s();
  if (t.has("history")) a.history = t.of_filters(true);
  a.grads = t.weights();
  if (t.has("clean_grads")) a.clean_grads = t.weights();
  if (t.has("masks")) a.masks = t.masks();
  if (t.has("noise")) a.noise = t.integers(3, 5);
  if (t.has("scalars")) {
    a.lrs = t.float64s(0.1);
    if (t.has("noise")) a.sigmas = t.float64s(0.1);
    if (t.has("clean_grads")) a.component = t.float32s_of(2, 0.5f);
    a.grad_scale = t.scalar(0.5f), a.clip = t.scalar(0.9f), a.found_inf = t.scalar(0);
  }
  a.grad_weight = t.numbers(0.7), a.clean_weight = t.numbers(0.3), a.kappa = t.numbers(1.0), a.beta = t.numbers(0.9);
  a.sigma = t.numbers(0.1), a.eta = t.numbers(0.1);
  a.index = t.index(), a.offset = t.offset();
}

inline void fill(SgdUpdate& a, Tensors& t) {
  fill_update(a, t);
  if (t.has("momentum")) a.momentum_buffers = state(t);
  a.lr = t.numbers(0.1), a.momentum = t.numbers(0.9), a.dampening = t.numbers(0), a.weight_decay = t.numbers(0.01);
  a.nesterov = t.flags(true);
}

inline void fill(AdamUpdate& a, Tensors& t) {
  fill_update(a, t);
  a.exp_avgs = state(t), a.exp_avg_sqs = state(t), a.steps = t.scalars();
  a.lr = t.numbers(0.1), a.beta1 = t.numbers(0.9), a.beta2 = t.numbers(0.99), a.eps = t.numbers(1e-8);
  a.weight_decay = t.numbers(0.01);
  a.decoupled = t.has("masters");
}

inline void fill(CountMagnitudes& a, Tensors& t) {
  const int known = t.has("masters") ? 1 : 0;
  a.counts = t.integers((int64_t{1} << math::kDigitWidth[known]) + 2, 0);
  a.grads = t.weights();
  a.prefix = t.integers(known, 1);
}

inline void fill(PackMask& a, Tensors& t) {
  a.masks = t.masks();
  a.grads = t.weights();
  a.threshold = t.scalar(0.5f);
}

inline void fill(Amplify& a, Tensors& t) {
  a.params = t.weights();
  a.previous = t.has("masters") ? t.float32s() : t.weights();
  a.masks = t.masks();
  a.kappa = t.numbers(1.0);
}

}  // namespace driver
