// IRE for one element: the order of magnitudes, and the longer step. Mirrors flatkern/reference/mask.py.
#pragma once

#include "arithmetic.h"

namespace flatkern::math {

// The bits of |g|: as integers they are ordered as |g| is, with NaN above all.
FK_HD uint32_t magnitude_bits(float g) { return bits_of(g) & 0x7FFFFFFFu; }

// The smallest that is not finite.
constexpr uint32_t kInfinityBits = 0x7F800000u;

// A radix selection reads them as three digits of 11, 10 and 10 bits.
constexpr int kDigits = 3;
constexpr int kDigitWidth[kDigits] = {11, 10, 10}, kDigitShift[kDigits] = {20, 10, 0};

FK_HD bool is_small(float g, float threshold) { return float_of(magnitude_bits(g)) <= threshold; }

// w + kappa (w - w_old), where the mask is set.
FK_HD float amplified(float w, float previous, float kappa) { return w + kappa * (w - previous); }

}  // namespace flatkern::math
