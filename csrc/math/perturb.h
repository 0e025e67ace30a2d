// Perturbing one weight: Gaussian (RWP, ARWP) and ascent (SAM, ASAM, Friendly-SAM). Mirrors
// flatkern/reference/perturb.py.
#pragma once

#include "norm.h"

namespace flatkern::math {

// Standard deviation of the noise: sigma * norm.
FK_HD float noise_scale(float norm, float sigma) { return sigma * norm; }

// The same with ARWP's history: sigma * norm / sqrt(1 + eta F).
FK_HD float noise_scale(float norm, float sigma, float history, float eta) {
  return quotient(noise_scale(norm, sigma), root(1.0f + eta * history));
}

// e = s z, rounded before it is added.
FK_HD float perturbation(float z, float scale) { return scale * z; }

FK_HD float perturb_gaussian(float w, float e) { return w + e; }

// rho / (norm + 1e-12); 0 where the norm is not finite, so that the weights stay.
FK_HD float ascent_scale(float rho, float norm) { return is_finite(norm) ? quotient(rho, norm + 1e-12f) : 0.0f; }

// `adaptive` is eta >= 0; d is g, or `direction`'s.
FK_HD float perturb_ascent(float p, float d, float scale, float eta, bool adaptive) {
  const float t = adaptive ? square(fabsf(p) + eta) : 1.0f;
  return scale == 0.0f ? p : p + scale * t * d;
}

// Friendly-SAM's mean of gradients with this one in it. 1 - momentum is computed in float64 and rounded once.
FK_HD float new_mean(float mean, float g, float momentum, float one_minus_momentum) {
  return momentum * mean + one_minus_momentum * g;
}

}  // namespace flatkern::math
