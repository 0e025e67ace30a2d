// How gradients are mixed, scaled and remembered, block by block: what the norm and update families share.
#pragma once

#include "../math/update.h"
#include "apply.h"

namespace flatkern::cpu::FK_ISA {

// The final gradient of a block from the loaded perturbed one, `g`; in `out`, or `g` itself where nothing changes it.
template <class Args>
inline const float* final_gradient(const Args& a, const Table* clip_or_null, const Block& b, const float* g, float* out,
                                   Scratch& scratch) {
  const float clip = clip_or_null != nullptr ? value_or(*clip_or_null, 1.0f) : 1.0f;
  const float factor = static_cast<float>(a.grad_weight[b.k]) * value_or(a.grad_scale, 1.0f);
  if (a.clean_grads) {
    const float* clean = load(a.clean_grads[b.k], b.begin, b.n, scratch.clean);
    const float clean_weight = static_cast<float>(a.clean_weight[b.k]);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) out[i] = math::mixed(g[i], clean[i], factor, clean_weight, clip);
    return out;
  }
  if (factor == 1.0f && clip == 1.0f) return g;
  FK_SIMD
  for (int64_t i = 0; i < b.n; ++i) out[i] = math::mixed(g[i], factor, clip);
  return out;
}

// ARWP's history, for a block: tensors of rank <= 1 keep a square per element and are done; of the others, the scaled
// gradient is returned, to be summed over each row and settled with `remember_row`.
template <class Args>
inline const float* remember(const Args& a, const Block& b, const float* g, float* out) {
  const View& history = a.history[b.k];
  const float scale = value_or(a.grad_scale, 1.0f);
  if (a.grads[b.k].ndim < 2) {
    const float beta = static_cast<float>(a.beta[b.k]);
    float* f = history.template as<float>() + b.begin;
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) f[i] = math::remember(f[i], math::square(g[i] * scale), beta);
    return nullptr;
  }
  if (scale == 1.0f) return g;
  FK_SIMD
  for (int64_t i = 0; i < b.n; ++i) out[i] = g[i] * scale;
  return out;
}

template <class Args>
inline void remember_row(const Args& a, int64_t k, int64_t row, double squares) {
  if (a.grads[k].ndim < 2) return;
  float& f = a.history[k].template as<float>()[row];
  f = math::remember(f, static_cast<float>(squares), static_cast<float>(a.beta[k]));
}

}  // namespace flatkern::cpu::FK_ISA
