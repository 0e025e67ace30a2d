// Masks: a bit per element, eight columns of a row to a byte; a byte per element of tensors of rank <= 1.
#pragma once

#include <cstring>

#include "apply.h"

namespace flatkern::cpu::FK_ISA {

FK_INLINE int64_t mask_stride(const View& like) { return ceil_div(like.cols, 8); }

// Nonzero in scratch.flags[i] where the mask of element i of the block is set.
inline const uint8_t* unpack(const View& mask, const View& like, const Block& b, Scratch& scratch) {
  const uint8_t* bytes = mask.as<uint8_t>();
  if (like.ndim < 2) return bytes + b.begin;
  const int64_t cols = b.rows > 1 ? b.n / b.rows : b.n, stride = mask_stride(like);
  for (int64_t r = 0; r < b.rows; ++r) {
    const uint8_t* from = bytes + (b.row + r) * stride + b.col / 8;
    uint8_t* flags = scratch.flags + r * cols;
    // Whole bytes: what is beyond a row's last column is overwritten by the next row.
    for (int64_t i = 0; i < cols; i += 8) {
      const uint64_t each = (from[i / 8] * 0x0101010101010101ull) & 0x8040201008040201ull;
      std::memcpy(flags + i, &each, sizeof each);
    }
  }
  return scratch.flags;
}

// The opposite, from flags that are 0 or 1; a byte of a row is written by the block that holds its first column.
inline void pack(const View& mask, const View& like, const Block& b, const uint8_t* flags) {
  uint8_t* bytes = mask.as<uint8_t>();
  if (like.ndim < 2) {
    std::memcpy(bytes + b.begin, flags, b.n);
    return;
  }
  const int64_t cols = b.rows > 1 ? b.n / b.rows : b.n, stride = mask_stride(like);
  for (int64_t r = 0; r < b.rows; ++r) {
    uint8_t* to = bytes + (b.row + r) * stride + b.col / 8;
    for (int64_t i = 0; i < cols; i += 8) {
      uint64_t eight = 0;
      std::memcpy(&eight, flags + r * cols + i, least(8, cols - i));
      // Moves byte j's lowest bit to bit j of the highest byte.
      to[i / 8] = static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
    }
  }
}

}  // namespace flatkern::cpu::FK_ISA
