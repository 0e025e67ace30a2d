// Base updates of one weight: SGD, Adam, AdamW, and ARWP's history. Mirrors flatkern/reference/update.py.
#pragma once

#include "norm.h"

namespace flatkern::math {

// ARWP's history: F <- beta F + sum of g^2.
FK_HD float update_history(float history, float squares, float beta) { return beta * history + squares; }

// Scalars of SGD, each rounded to float32 once.
struct SgdScalars {
  float lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov;
};

FK_HD float sgd(float p, float g, const SgdScalars& s) {
  const float d = g + s.weight_decay * p;
  return p - s.lr * d;
}

// With momentum: `v` is read and replaced.
FK_HD float sgd(float p, float g, float& v, const SgdScalars& s) {
  float d = g + s.weight_decay * p;
  v = s.momentum * v + s.one_minus_dampening * d;
  d = s.nesterov ? d + s.momentum * v : v;
  return p - s.lr * d;
}

// Scalars of Adam and AdamW for one step: computed in float64, each rounded to float32 once.
struct AdamScalars {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size, correction;     // lr / (1 - beta1^t), sqrt(1 - beta2^t)
  float eps, decay, decay_factor;  // decay_factor = 1 - lr weight_decay
  bool coupled, decoupled;         // whether the decay enters the gradient, or the weight
};

FK_HD AdamScalars adam_scalars(double step, double lr, double beta1, double beta2, double eps, double decay,
                               bool decoupled) {
  AdamScalars s;
  s.beta1 = static_cast<float>(beta1);
  s.one_minus_beta1 = static_cast<float>(1 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1 - beta2);
  s.step_size = static_cast<float>(lr / (1 - pow(beta1, step)));
  s.correction = static_cast<float>(sqrt(1 - pow(beta2, step)));
  s.eps = static_cast<float>(eps);
  s.decay = static_cast<float>(decay);
  s.decay_factor = static_cast<float>(1 - lr * decay);
  s.coupled = !decoupled && decay != 0;
  s.decoupled = decoupled;
  return s;
}

// What the decay leaves of the weight, and the moments, which are read and replaced.
FK_HD float adam_moments(float p, float g, float& m, float& v, const AdamScalars& s) {
  if (s.decoupled) p = p * s.decay_factor;
  if (s.coupled) g = g + s.decay * p;
  m = s.beta1 * m + s.one_minus_beta1 * g;
  v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  return p;
}

FK_HD float adam_step(float p, float m, float v, const AdamScalars& s) {
  const float denominator = quotient(root(v), s.correction) + s.eps;
  return p - s.step_size * quotient(m, denominator);
}

FK_HD float adam(float p, float g, float& m, float& v, const AdamScalars& s) {
  p = adam_moments(p, g, m, v, s);
  return adam_step(p, m, v, s);
}

#if defined(FK_ESTIMATES)
// 1 / s.correction for ordinary_adam_step; 0 where the step of no element is ordinary with these scalars.
FK_HD float ordinary_correction(const AdamScalars& s) {
  const bool ordinary = s.correction >= 0x1p-14f && s.correction <= 1.0f && !is_stubborn(s.correction) && s.eps <= 1.0f;
  return ordinary ? refined_reciprocal(s.correction) : 0.0f;
}

// adam_step where neither its root nor its quotients leave the numbers for which estimates can be refined; else `rare`
// is set. With v in [2^-90, 2^90] the denominator is in [2^-45, 2^60].
FK_HD float ordinary_adam_step(float p, float m, float v, const AdamScalars& s, float inverse, bool& rare) {
  const float denominator = ordinary_quotient(refined_root(v), s.correction, inverse) + s.eps;
  rare |= bits_of(v) - bits_of(0x1p-90f) > bits_of(0x1p90f) - bits_of(0x1p-90f);
  rare |= !is_moderate(m);
  rare |= is_stubborn(denominator);
  return p - s.step_size * ordinary_quotient(m, denominator, refined_reciprocal(denominator));
}
#endif

}  // namespace flatkern::math
