// Normals for a block of rows, scaled into a perturbation: what the noise, perturb and update families share.
#pragma once

#include "../math/perturb.h"
#include "apply.h"
#include "lanes.h"
#include "scalars.h"

namespace flatkern::cpu::FK_ISA {

// The normals of one call: its Philox key, and which counters each tensor uses.
class Gaussian {
 public:
  FK_INLINE Gaussian(const Table& at, const Table& noise, const Ints& index, const Ints& offset)
      : at_(at), index_(index), offset_(offset) {
    for (int j = 0; j < 3; ++j) noise_[j] = noise ? static_cast<uint32_t>(noise[0].as<int64_t>()[j]) : 0;
  }

  // Begins the draws of a block, or of `n` elements of the row that it begins.
  inline void begin(const Block& b, int64_t n, Scratch& scratch) const {
    const bool flat = at_[b.k].ndim < 2;
    // Blocks of rank <= 1 may begin anywhere in their only row, also between two columns of one draw.
    const int64_t col = flat ? offset_[b.k] + b.col : 0;
    Draws d;
    d.k = b.k;
    d.begin = b.begin;
    d.end = b.begin + n;
    d.skipped = col % 8;
    d.per_row = (d.skipped + n / b.rows + 7) / 8;
    d.count = b.rows * d.per_row;
    d.first_draw = static_cast<uint32_t>(flat ? col / 8 : b.col / 8);
    d.first_row = static_cast<uint32_t>(flat ? 0 : offset_[b.k] + b.row);
    d.index = static_cast<uint32_t>(index_[b.k]);
    d.short_rows = b.rows > 1;
    if (d.short_rows) tabulate(d.per_row, scratch);
    scratch.draws = d;
  }

  // The next 32 normals, if there are more. Few enough for the processor to overlap them with a part of a loop that
  // waits for its divider.
  FK_INLINE void draw_part(Scratch& scratch) const {
    Draws& d = scratch.draws;
    if (d.done >= d.count) return;
    const int64_t at = d.done % kDrawsAtOnce;
    if (at == 0) draw_words(scratch);
    const uint32_t* words = scratch.words + 4 * at;
    float* z = scratch.z + 8 * d.done;
    FK_SIMD
    for (int64_t i = 0; i < 16; ++i) {
      const math::Pair pair = math::normals(words[i]);
      z[2 * i] = pair.first;
      z[2 * i + 1] = pair.second;
    }
    d.done += 4;
  }

  // The normals of a block; those of several rows are where `scaled_rows` looks for them.
  inline const float* draw(const Block& b, Scratch& scratch) const {
    const Draws& d = scratch.draws;
    if (!d.cover(b)) begin(b, b.n, scratch);
    while (d.done < d.count) {
      scratch.prefetcher.fetch();
      draw_part(scratch);
    }
    return scratch.z + d.skipped + (b.begin - d.begin);
  }

  // The normals of a block of several rows without the gaps between them, row r times scratch.scale[r].
  static inline const float* scaled_rows(const Block& b, const float* z, Scratch& scratch) {
    const int64_t cols = b.n / b.rows, stride = 8 * scratch.draws.per_row;
    // Whole vectors keep the inner loop free of tails; what a row's last one writes too much, the next row overwrites.
    for (int64_t r = 0; r < b.rows; ++r, z += stride) {
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

  // The words of the next kDrawsAtOnce draws. Never inlined: the loops beside which normals are drawn have more
  // constants than there are registers.
  __attribute__((noinline)) void draw_words(Scratch& scratch) const {
    const Draws& d = scratch.draws;
    const int64_t count = min(d.count - d.done, kDrawsAtOnce);
    for (int64_t q = 0; q < count; q += LanesTimes4::kCount) {
      using Lanes = LanesTimes4;
      const int64_t at = d.done + q;
      Lanes c[4] = {Lanes::load(scratch.count + q, d.first_draw + static_cast<uint32_t>(d.done)),
                    Lanes::all(d.first_row), Lanes::all(d.index), Lanes::all(noise_[2])};
      if (d.short_rows) {
        c[0] = Lanes::load(scratch.column + at, d.first_draw);
        c[1] = Lanes::load(scratch.row + at, d.first_row);
      }
      math::philox4x32(c, noise_[0], noise_[1]);
      store(c, scratch.words + 4 * q);
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

  // Makes `draw_part` draw what `add` needs of this block's rows; false where they are too long, and `add` draws
  // itself.
  FK_INLINE bool draw_ahead(const Block& b, Scratch& scratch) const {
    const int64_t cols = at_[b.k].cols;
    if (b.col == 0 && cols <= kDrawnAhead) gaussian_.begin(b, b.rows > 1 ? b.n : cols, scratch);
    return scratch.draws.cover(b);
  }

  FK_INLINE void draw_part(Scratch& scratch) const { gaussian_.draw_part(scratch); }

  // p[i] <- w[i] + e[i] for a block; p and w may be the same.
  inline void add(const Block& b, const float* w, float* p, Scratch& scratch) const {
    const float* z = gaussian_.draw(b, scratch);
    if (history_ && at_[b.k].ndim < 2) return add_with_history(b, w, z, p, scratch.scale[0]);
    if (b.rows > 1) {
      const float* e = Gaussian::scaled_rows(b, z, scratch);
      FK_SIMD
      for (int64_t i = 0; i < b.n; ++i) p[i] = math::perturb_gaussian(w[i], e[i]);
      return;
    }
    const float scale = scratch.scale[0];
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) p[i] = math::perturb_gaussian(w[i], math::perturbation(z[i], scale));
  }

 private:
  inline void add_with_history(const Block& b, const float* w, const float* z, float* p, float norm) const {
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
