// The final gradient that a step takes: what the norm and update families share.
#pragma once

#include "../math/arithmetic.h"
#include "multi_tensor.cuh"

namespace flatkern::cuda {

// g <- clip (factor g + clean_weight g_clean), where the component is part of both weights, and grad_scale of factor.
struct FinalGradient {
  float factor, clean_weight, clip;
  bool mixes, scales;

  template <class Args>
  FK_DEVICE_MEMBER FinalGradient(const Args& a, uint32_t k, bool mixes)
      : factor(a.grad_weight[k] * a.grad_scale.get()),
        clean_weight(a.clean_weight[k]),
        clip(a.clip.get()),
        mixes(mixes),
        scales(factor != 1.0f || clip != 1.0f) {
    if (!mixes || a.component == nullptr) return;
    const math::MixingWeights weights = math::mixing_weights(a.grad_weight[k], a.clean_weight[k], a.component);
    factor = weights.grad * a.grad_scale.get();
    clean_weight = weights.clean;
  }

  FK_DEVICE_MEMBER float of(float g, float clean) const {
    return mixes ? math::mixed(g, clean, factor, clean_weight, clip) : scales ? math::mixed(g, factor, clip) : g;
  }
};

}  // namespace flatkern::cuda
