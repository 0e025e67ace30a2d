// Normals for the eights of a team: what the noise, perturb and update families share.
#pragma once

#include "../math/noise.h"
#include "../math/perturb.h"
#include "multi_tensor.cuh"

namespace flatkern::cuda {

// The key of a call, by value, or on the device, where a captured graph reads it.
struct Key {
  const int64_t* at;
  uint32_t seed, stream, round;

  FK_DEVICE_MEMBER Key get() const {
    if (at == nullptr) return *this;
    return {nullptr, static_cast<uint32_t>(at[0]), static_cast<uint32_t>(at[1]), static_cast<uint32_t>(at[2])};
  }
};

// Which normals a team's row has: counters of its first element.
struct Counters {
  uint32_t row, eight, index;
  int shift;

  template <bool kWhole>
  FK_DEVICE_MEMBER Counters(const Tile& t, const Team<kWhole>& team, uint32_t index)
      : index(index), shift(static_cast<int>(t.flags >> kShiftBit)) {
    const bool segments = (t.flags & kSegments) != 0;
    row = t.counter_row + (segments ? 0 : team.number_in(t));
    eight = t.counter_eight + (segments ? team.number_in(t) * (kSegment / kEight) : 0);
  }
};

// The normals of one draw, the `eight`th from the team's first element on.
FK_DEVICE void draw(const Key& key, const Counters& at, int eight, float (&z)[8]) {
  math::Word c[4] = {{at.eight + static_cast<uint32_t>(eight)}, {at.row}, {at.index}, {key.round}};
  math::philox4x32(c, key.seed, key.stream);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const math::Pair pair = math::normals(static_cast<uint32_t>(c[j].x));
    z[2 * j] = pair.first;
    z[2 * j + 1] = pair.second;
  }
}

// The normals of the eight columns from `place` on, where the team's first element is somewhere inside an eight.
FK_DEVICE void shifted_normals(const Key& key, const Counters& at, int place, float (&z)[8]) {
  draw(key, at, place / kEight, z);
  if (at.shift == 0) return;
  float next[8];
  draw(key, at, place / kEight + 1, next);
  // Both move down by the shift, in steps of 1, 2 and 4: an index that is not known would put them into memory.
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    if ((at.shift & step) == 0) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) z[j] = j + step < 8 ? z[(j + step) % 8] : next[(j + step) % 8];
#pragma unroll
    for (int j = 0; j + step < 8; ++j) next[j] = next[j + step];
  }
}

}  // namespace flatkern::cuda
