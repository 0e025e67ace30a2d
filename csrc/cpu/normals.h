// Normals for a block of rows, scaled into a perturbation: what the noise, perturb and update families share.
#pragma once

#include "../math/perturb.h"
#include "apply.h"
#include "lanes.h"
#include "scalars.h"

namespace flatkern::cpu::FK_ISA {

constexpr int64_t kDrawsAtOnce = 64;  // Philox draws computed together: eight AVX-512 vectors of counters, 512 normals

// The normals of one call: its Philox key, and which counters each tensor uses.
class Gaussian {
 public:
  FK_INLINE Gaussian(const Table& at, const Table& noise, const Ints& index, const Ints& offset)
      : at_(at), index_(index), offset_(offset) {
    for (int j = 0; j < 3; ++j) noise_[j] = noise ? static_cast<uint32_t>(noise[0].as<int64_t>()[j]) : 0;
  }

  // The normals of a block, row r times scratch.scale[r]. The pointer is valid until the next call.
  inline const float* draw(const Block& b, Scratch& scratch) const {
    const bool flat = at_[b.k].ndim < 2;
    const int64_t cols = b.rows > 1 ? b.n / b.rows : b.n;
    // Blocks of rank <= 1 may begin anywhere in their only row, also between two columns of one draw.
    const int64_t col = flat ? offset_[b.k] + b.col : 0, skipped = col % 8;
    const int64_t draws = (skipped + cols + 7) / 8;  // per row
    const uint32_t first_draw = static_cast<uint32_t>(flat ? col / 8 : b.col / 8);
    const uint32_t first_row = static_cast<uint32_t>(flat ? 0 : offset_[b.k] + b.row);
    const uint32_t index = static_cast<uint32_t>(index_[b.k]);
    if (b.rows == 1) {
      draw_normals(draws, scratch.scale[0], index, scratch, [&](int64_t q) {
        return Counters{Lanes::load(scratch.count + q, first_draw), Lanes::all(first_row)};
      });
      return scratch.z + skipped;
    }
    tabulate(draws, scratch);
    draw_normals(b.rows * draws, 1.0f, index, scratch, [&](int64_t q) {
      return Counters{Lanes::load(scratch.column + q, first_draw), Lanes::load(scratch.row + q, first_row)};
    });
    // Whole vectors keep the inner loop free of tails; what a row's last one writes too much, the next row overwrites.
    for (int64_t r = 0; r < b.rows; ++r) {
      const float* z = scratch.z + r * 8 * draws;
      float* e = scratch.e + r * cols;
      const float scale = scratch.scale[r];
      for (int64_t i = 0; i < cols; i += 16) {
        FK_SIMD
        for (int64_t j = i; j < i + 16; ++j) e[j] = math::perturbation(z[j], scale);
      }
    }
    return scratch.e;
  }

 private:
  struct Counters {
    Lanes column, row;
  };

  // The column and row of draw q of several short rows. A table, because dividing by the draws per row costs more than
  // the draw, and neighbouring blocks share it.
  static inline void tabulate(int64_t draws_per_row, Scratch& scratch) {
    if (scratch.draws_per_row == draws_per_row) return;
    for (int64_t q = 0; q < kPhiloxDraws + kDrawsAtOnce; ++q) {
      scratch.column[q] = static_cast<uint32_t>(q % draws_per_row);
      scratch.row[q] = static_cast<uint32_t>(q / draws_per_row);
    }
    scratch.draws_per_row = draws_per_row;
  }

  // scratch.z <- scale times the normals of `count` draws, eight each.
  template <class CountersAt>
  inline void draw_normals(int64_t count, float scale, uint32_t index, Scratch& scratch, CountersAt counters_at) const {
    // A few at a time, so that the processor overlaps the integer work of one step with the float work of another.
    for (int64_t first = 0; first < count; first += kDrawsAtOnce) {
      alignas(64) uint32_t words[4 * kDrawsAtOnce];
      const int64_t draws = min(ceil_div(count - first, 8) * 8, kDrawsAtOnce);
      for (int64_t q = 0; q < draws; q += Lanes::kCount) {
        const Counters at = counters_at(first + q);
        Lanes c[4] = {at.column, at.row, Lanes::all(index), Lanes::all(noise_[2])};
        math::philox4x32(c, noise_[0], noise_[1]);
        store(c, words + 4 * q);
      }
      float* z = scratch.z + 8 * first;
      for (int64_t begin = 0; begin < 4 * draws; begin += 16) {
        scratch.prefetcher.fetch();
        FK_SIMD
        for (int64_t i = begin; i < begin + 16; ++i) {
          const math::Pair pair = math::normals(words[i]);
          z[2 * i] = math::perturbation(pair.first, scale);
          z[2 * i + 1] = math::perturbation(pair.second, scale);
        }
      }
    }
  }

  const Table& at_;
  const Ints& index_;
  const Ints& offset_;
  uint32_t noise_[3];
};

// e = s z of one call: the normals z, and their standard deviation s.
class Perturbation {
 public:
  FK_INLINE Perturbation(const Table& at, const Table& history, const Table& noise, const Numbers& sigma,
                         const Floats& eta, const Ints& index, const Ints& offset)
      : at_(at), history_(history), sigma_(sigma), eta_(eta), gaussian_(at, noise, index, offset) {}

  // What finish_row returns for a row: its s, or its norm where the history gives every element an s of its own.
  FK_INLINE float scale(int64_t k, int64_t row, float norm) const {
    const float sigma = static_cast<float>(sigma_[k]);
    if (!history_) return math::noise_scale(norm, sigma);
    if (at_[k].ndim < 2) return norm;
    return math::noise_scale(norm, sigma, history_[k].as<float>()[row], static_cast<float>(eta_[k]));
  }

  // p[i] <- w[i] + e[i] for a block; p and w may be the same.
  inline void add(const Block& b, const float* w, float* p, Scratch& scratch) const {
    if (history_ && at_[b.k].ndim < 2) return add_with_history(b, w, p, scratch);
    const float* e = gaussian_.draw(b, scratch);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) p[i] = math::perturb_gaussian(w[i], e[i]);
  }

 private:
  inline void add_with_history(const Block& b, const float* w, float* p, Scratch& scratch) const {
    const float norm = scratch.scale[0];
    scratch.scale[0] = 1.0f;
    const float* z = gaussian_.draw(b, scratch);
    scratch.scale[0] = norm;
    const float* history = history_[b.k].as<float>() + b.begin;
    const float sigma = static_cast<float>(sigma_[b.k]), eta = static_cast<float>(eta_[b.k]);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) {
      const float s = math::noise_scale(norm, sigma, history[i], eta);
      p[i] = math::perturb_gaussian(w[i], math::perturbation(z[i], s));
    }
  }

  const Table& at_;
  const Table& history_;
  Numbers sigma_;
  const Floats& eta_;
  Gaussian gaussian_;
};

}  // namespace flatkern::cpu::FK_ISA
