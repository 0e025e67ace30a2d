// What is squared and summed in a norm, one element at a time. Mirrors flatkern/reference/norm.py.
#pragma once

#include "arithmetic.h"

namespace flatkern::math {

FK_HD float square(float x) { return x * x; }

// The square root of a sum that is kept in float64, rounded once.
FK_HD float norm(double sum) { return static_cast<float>(sqrt(sum)); }

// What Friendly-SAM's ascent goes along instead of g: beside the mean of earlier gradients.
FK_HD float direction(float g, float mean, float sigma) { return g - sigma * mean; }

// T_w d of ASAM's norm, T_w = |w| + eta.
FK_HD float ascent_term(float p, float d, float eta) { return (fabsf(p) + eta) * d; }

}  // namespace flatkern::math
