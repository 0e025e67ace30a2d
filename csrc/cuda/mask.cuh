// Where the bits of a mask are: what the mask and update families share.
#pragma once

#include "../math/mask.h"
#include "multi_tensor.cuh"
#include "rows.h"

namespace flatkern::cuda {

// Of a tensor of rank >= 2, whose rows have a byte for each eight of their columns: the byte of those from `place` of a
// team's row or segment on.
template <bool kWhole>
FK_DEVICE int64_t mask_byte(const LongRows& long_rows, const Tile& t, const Team<kWhole>& team, int place) {
  const bool segments = (t.flags & kSegments) != 0;
  const int64_t columns = segments ? long_rows.rows[t.long_row].columns : t.length;
  const int64_t first = segments ? static_cast<int64_t>(t.segment + team.number_in(t)) * kSegment : 0;
  return team.row(t) * ((columns + 7) / 8) + (first + place) / 8;
}

// Vectors have a byte for each element, and are walked one by one.
FK_DEVICE uint32_t load_bytes(const uint8_t* mask, const Span<false>& s) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < s.count && mask[s.place + j] != 0) bits |= 1u << j;
  return bits;
}
FK_DEVICE void store_bytes(uint8_t* mask, const Span<false>& s, uint32_t bits) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < s.count) mask[s.place + j] = bits >> j & 1;
}

// Where IRE lengthens the step of eight elements, a bit each.
template <bool kWhole>
FK_DEVICE uint32_t mask_bits(const uint8_t* mask, const LongRows& long_rows, const Tile& t, const Team<kWhole>& team,
                             const Span<kWhole>& s) {
  if constexpr (!kWhole) {
    if ((t.flags & kFlat) != 0) return load_bytes(mask + team.start, s);
  }
  return mask[mask_byte(long_rows, t, team, s.place)];
}

}  // namespace flatkern::cuda
