// Mixing and scaling of gradients, ARWP's history and Friendly-SAM's direction, block by block: what the norm, perturb
// and update families share.
#pragma once

#include "../math/update.h"
#include "apply.h"
#include "scalars.h"

namespace flatkern::cpu::FK_ISA {

// Element i of the final gradient of a block, formed in registers.
struct Unchanged {
  const float* g;
  FK_INLINE float operator()(int64_t i) const { return g[i]; }
};
struct Scaled {
  const float* g;
  float factor, clip;
  FK_INLINE float operator()(int64_t i) const { return math::mixed(g[i], factor, clip); }
};
struct Mixed {
  const float *g, *clean;
  float factor, clean_weight, clip;
  FK_INLINE float operator()(int64_t i) const { return math::mixed(g[i], clean[i], factor, clean_weight, clip); }
};

// Calls use(gradient) with one of the above, from the loaded perturbed gradient `g` of a block.
template <class Args, class Use>
FK_INLINE void with_final_gradient(const Args& a, const Table* clip_or_null, const Block& b, const float* g,
                                   Scratch& scratch, const Use& use) {
  const float clip = clip_or_null != nullptr ? value_or(*clip_or_null, 1.0f) : 1.0f;
  const auto weights =
      math::mixing_weights(static_cast<float>(a.grad_weight[b.k]), static_cast<float>(a.clean_weight[b.k]),
                           a.component ? a.component[0].template as<float>() : nullptr);
  const float factor = weights.grad * value_or(a.grad_scale, 1.0f);
  if (a.clean_grads) {
    const float* clean = load(a.clean_grads[b.k], b.begin, b.n, scratch.clean);
    use(Mixed{g, clean, factor, weights.clean, clip});
  } else if (factor != 1.0f || clip != 1.0f) {
    use(Scaled{g, factor, clip});
  } else {
    use(Unchanged{g});
  }
}

// Friendly-SAM's direction, into `out`.
inline const float* beside_mean(const float* g, const float* mean, float sigma, int64_t n, float* out,
                                Prefetcher& prefetcher) {
  for_each_part(n, prefetcher, [&](int64_t begin, int64_t end) {
    FK_SIMD
    for (int64_t i = begin; i < end; ++i) out[i] = math::direction(g[i], mean[i], sigma);
  });
  return out;
}

// ARWP's history, for a block. Of tensors of rank <= 1, which keep a square per element, it is updated and null is
// returned. Of others the scaled gradient is returned: its squares are summed over each row, and `update_history_row`
// takes the sums.
template <class Args>
inline const float* update_history(const Args& a, const Block& b, const float* g, float* out) {
  const View& history = a.history[b.k];
  const float scale = value_or(a.grad_scale, 1.0f);
  if (a.grads[b.k].ndim < 2) {
    const float beta = static_cast<float>(a.beta[b.k]);
    float* f = history.template as<float>() + b.begin;
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) f[i] = math::update_history(f[i], math::square(g[i] * scale), beta);
    return nullptr;
  }
  if (scale == 1.0f) return g;
  FK_SIMD
  for (int64_t i = 0; i < b.n; ++i) out[i] = g[i] * scale;
  return out;
}

template <class Args>
inline void update_history_row(const Args& a, int64_t k, int64_t row, double squares) {
  if (a.grads[k].ndim < 2) return;
  float& f = a.history[k].template as<float>()[row];
  f = math::update_history(f, static_cast<float>(squares), static_cast<float>(a.beta[k]));
}

}  // namespace flatkern::cpu::FK_ISA
