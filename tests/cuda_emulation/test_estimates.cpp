// Roots and quotients of csrc/math/arithmetic.h are IEEE's, from estimates that are as far off as a GPU's may be.
#include <cmath>

#include "cases.h"
#include "schedule.h"

namespace flatkern::math {

// How far the estimates are off: by floats, where that is allowed; of a float64's, by numbers of its upper word.
static int off = 0;

// As PTX promises it: rcp.approx is off by one unit in the last place, rsqrt.approx by 2^-22.9.
static float estimate(double exact, double most) {
  const float nearest = static_cast<float>(exact);
  if (nearest == 0.0f || !std::isfinite(nearest)) return nearest;
  uint32_t bits;
  memcpy(&bits, &nearest, sizeof bits);
  bits += static_cast<uint32_t>(off);
  float x;
  memcpy(&x, &bits, sizeof x);
  return std::fabs(x - exact) <= most ? x : nearest;
}

// Subnormal numbers are taken for zero, and zero is given for them.
static float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

static float reciprocal_estimate(float x) {
  const double exact = 1.0 / static_cast<double>(flushed(x));
  return flushed(estimate(exact, std::ldexp(1.0, std::ilogb(exact) - 23)));
}

static float reciprocal_root_estimate(float x) {
  const double exact = 1.0 / std::sqrt(static_cast<double>(flushed(x)));
  return estimate(exact, exact * 0x1.125fbp-23);
}

// Looks at the upper word of its argument, and makes one.
static double reciprocal_estimate(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= ~uint64_t{0xFFFFFFFF};
  memcpy(&x, &bits, sizeof bits);
  double r = 1.0 / x;
  memcpy(&bits, &r, sizeof bits);
  bits = ((bits >> 32) + static_cast<uint64_t>(off)) << 32;
  memcpy(&r, &bits, sizeof r);
  return r;
}

}  // namespace flatkern::math

#define FK_OWN_ESTIMATES
#include "math/arithmetic.h"

namespace {

using flatkern::cuda::emulation::Random;
using namespace flatkern;

constexpr int kMostOff = 2;

void expect_same(float got, float want, const char* what, float a, float b) {
  if (math::bits_of(got) == math::bits_of(want) || (std::isnan(got) && std::isnan(want))) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s of %a and %a is %a, but should be %a, from estimates that are off by %d", what,
                a, b, got, want, math::off);
  throw std::runtime_error(text);
}

void expect_root(float x) { expect_same(math::root(x), std::sqrt(x), "the root", x, x); }
void expect_quotient(float a, float b) { expect_same(math::quotient(a, b), a / b, "the quotient", a, b); }

template <class Body>
void for_each_estimate(const Body& body) {
  for (math::off = -kMostOff; math::off <= kMostOff; ++math::off) body();
}

const float kInfinity = math::float_of(0x7F800000), kNaN = math::float_of(0x7FC00000);

// The ends of everything that is treated apart, their neighbours, and what is not finite.
std::vector<float> extremes() {
  std::vector<float> found = {0.0f, kInfinity, kNaN, 1.0f, 3.0f, math::float_of(1), math::float_of(0x7FFFFFFF >> 8)};
  for (const int exponent : {-149, -127, -126, -125, -97, -96, -95, -61, -60, -59, -1, 59, 60, 61, 62, 125, 126, 127})
    for (const int step : {-1, 0, 1}) {
      const float x = std::ldexp(1.0f, exponent);
      found.push_back(math::float_of(math::bits_of(x) + static_cast<uint32_t>(step)));
    }
  found.push_back(math::float_of(0x7F7FFFFF));
  for (size_t i = 0, count = found.size(); i < count; ++i) found.push_back(-found[i]);
  return found;
}

CASE(every_root_of_two_exponents) {
  // Powers of four scale a root exactly, so that these stand for all; the first ones are where a remainder is smallest.
  for (const float first : {0x1p-96f, 1.0f})
    for_each_estimate([&] {
      for (uint32_t i = 0; i < 1u << 24; ++i) expect_root(math::float_of(math::bits_of(first) + i));
    });
}

CASE(roots_of_any_number) {
  for_each_estimate([] {
    for (const float x : extremes()) expect_root(x);
    Random random(1);
    for (int i = 0; i < 1 << 20; ++i) expect_root(math::float_of(random.next()));
    for (int i = 0; i < 1 << 18; ++i) expect_root(math::float_of(random.next() >> 9));  // subnormal ones
  });
}

CASE(quotients_of_any_numbers) {
  for_each_estimate([] {
    for (const float a : extremes())
      for (const float b : extremes()) expect_quotient(a, b);
    Random random(2);
    for (int i = 0; i < 1 << 21; ++i) {
      const float a = math::float_of(random.next()), b = math::float_of(random.next());
      expect_quotient(a, b);
      // Of the same exponent, and so ordinary unless both are not.
      expect_quotient(a, math::float_of((math::bits_of(a) & 0xFF800000) | (math::bits_of(b) & 0x007FFFFF)));
    }
  });
}

// b n = a 2^shift - rest with n of 25 bits: a / b is then as near as can be to n / 2, which is in the middle of two
// floats.
CASE(quotients_next_to_the_middle_of_two_floats) {
  for_each_estimate([] {
    Random random(3);
    for (int i = 0; i < 1 << 19; ++i) {
      const uint32_t b = 1u << 23 | random.next() >> 9 | 1u;
      uint32_t inverse = b;  // modulo 2^32, each round doubles the bits that are right
      for (int round = 0; round < 4; ++round) inverse *= 2 - b * inverse;
      for (const int shift : {24, 25})
        for (const int rest : {-3, -1, 1, 3}) {
          const uint32_t modulo = 1u << shift;
          uint64_t n = static_cast<uint32_t>(-rest) * inverse & (modulo - 1);
          if (shift == 24) n += modulo;
          if (n < 1u << 24) continue;
          const uint64_t a = (b * n + static_cast<uint64_t>(rest)) >> shift;
          if (a >= 1u << 24) continue;
          const float x = static_cast<float>(a), y = static_cast<float>(b);
          expect_quotient(x, y);
          expect_quotient(-x * 0x1p60f, y * 0x1p-84f);  // out of the ordinary
        }
    }
  });
}

// Quotients that a subnormal number cannot hold: in the middle of two, and to both sides of it.
CASE(quotients_that_are_subnormal) {
  for_each_estimate([] {
    Random random(4);
    for (int i = 0; i < 1 << 20; ++i) {
      const int bits = 1 + static_cast<int>(random.next() % 22);
      const uint32_t twice = 2 * (random.next() & ((1u << bits) - 1)) + 1,
                     b = (random.next() & ((1u << (22 - bits)) - 1)) + 1;
      const float x = std::ldexp(static_cast<float>(twice) * static_cast<float>(b), -100);
      const float y = std::ldexp(static_cast<float>(b), 50);
      expect_quotient(x, y);
      expect_quotient(-std::nextafter(x, 0.0f), y);
      expect_quotient(std::nextafter(x, 1.0f), -y);
      expect_quotient(x, std::nextafter(y, 0.0f));
    }
  });
}

}  // namespace
