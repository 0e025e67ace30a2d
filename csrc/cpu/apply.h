// The engine: how a list of tensors is cut into tiles and blocks, and walked by threads. It knows no equation.
//
// Nothing here changes a result: every element is computed alone, every row is summed in the order of reduce.h.
#pragma once

#include "ops.h"
#include "reduce.h"

namespace flatkern::cpu::FK_ISA {

constexpr int64_t kBlock = kChunk;      // elements that stay in the first cache while an op works on them
constexpr int64_t kBlockRows = 256;     // rows of a block, at most; rows this short waste most of a Philox draw
#ifndef FK_TILE
#define FK_TILE 16
#endif
constexpr int64_t kTile = FK_TILE * kBlock;  // elements a thread takes at a time
constexpr int64_t kResident = 1 << 16;  // longest row that is measured and perturbed while it is in a core's cache
constexpr int64_t kSerial = 1 << 15;    // fewer elements than this are not worth waking a thread
constexpr int64_t kEights = 256;        // Philox draws a block needs, at most: one for eight columns of a row

// Elements [begin, begin + n) of tensor k: `rows` whole rows from `row` on, or a part of one from column `col` on.
// The elements this tile comes to next lie `next` further; 0 where none do.
struct Block {
  int64_t k, begin, n, row, rows, col, next = 0;
};

// Memory that is about to be read, fetched a little at a time while the noise keeps the arithmetic busy.
class Ahead {
 public:
  FK_INLINE void clear() { count_ = 0; }

  FK_INLINE void add(const View& view, const Block& b) {
    const int64_t size = size_of(view.dtype);
    at_[count_] = view.as<char>() + (b.begin + b.next) * size;
    end_[count_++] = view.as<char>() + (b.begin + b.next + b.n) * size;
  }

  FK_INLINE void fetch() {
    for (int s = 0; s < count_; ++s)
      for (int line = 0; line < 2 && at_[s] < end_[s]; ++line, at_[s] += 64) __builtin_prefetch(at_[s], 0, FK_LOC);
  }

 private:
  const char* at_[8];
  const char* end_[8];
  int count_ = 0;
};

// What a thread works in. Left uninitialised but for `eights_per_row`, the state of the counters below it.
struct Scratch {
  alignas(64) float w[kBlock], g[kBlock], clean[kBlock], m[kBlock], v[kBlock];
  alignas(64) float e[kBlock + 64], z[8 * kEights + 512];
  alignas(64) uint32_t column[kEights + 64], row[kEights + 64];
  int64_t eights_per_row = 0;
  Ahead ahead;
  float scale[kBlockRows];  // one per row of the block: what `settle` returned
};

// What an op wants summed of a block; null means nothing.
struct Squares {
  const float* of[2] = {nullptr, nullptr};
};

FK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts a list into tiles: small tensors share one, large ones are cut into `pieces`.
class Plan {
 public:
  template <class Pieces>
  FK_INLINE Plan(const Table& at, Pieces pieces) : groups_(at.size() + 1) {
    int64_t room = 0;
    for (int64_t k = 0; k < at.size(); ++k) {
      const int64_t count = pieces(at[k]), cost = at[k].numel + kBlock / 2;
      if (count == 0) continue;
      numel += at[k].numel;
      const bool joins = count == 1 && size_ > 0 && groups_[size_ - 1].small && groups_[size_ - 1].end == k;
      if (joins && cost <= room) {
        groups_[size_ - 1].end = k + 1;
        room -= cost;
      } else {
        groups_[size_++] = {tiles, k, k + 1, count == 1};
        tiles += count;
        room = kTile - cost;
      }
    }
  }

  // Calls visit(k, piece) for all that tile `t` holds.
  template <class Visit>
  FK_INLINE void visit(int64_t t, Visit visit) const {
    int64_t low = 0, high = size_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (groups_[middle].first_tile <= t ? low : high) = middle;
    }
    const Group& group = groups_[low];
    if (!group.small) return visit(group.begin, t - group.first_tile);
    for (int64_t k = group.begin; k < group.end; ++k) visit(k, 0);
  }

  int64_t tiles = 0, numel = 0;

 private:
  struct Group {
    int64_t first_tile, begin, end;
    bool small;  // tensors [begin, end), each a single piece
  };
  Array<Group> groups_;
  int64_t size_ = 0;
};

// Elementwise walk: body(block, scratch) for every block of every tensor, blocks at multiples of kBlock.
template <class Body>
inline void for_each_block(const Table& at, const Body& body) {
  const Plan plan(at, [](const View& t) { return ceil_div(t.numel, kTile); });
#pragma omp parallel if (plan.numel > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < plan.tiles; ++t) {
      plan.visit(t, [&](int64_t k, int64_t piece) {
        const int64_t end = at[k].numel < (piece + 1) * kTile ? at[k].numel : (piece + 1) * kTile;
        for (int64_t i = piece * kTile; i < end; i += kBlock)
          body(Block{k, i, end - i < kBlock ? end - i : kBlock, 0, 1, i}, scratch);
      });
    }
  }
}

// The L2 norm over all elements of all tensors; squares(block, scratch) returns what is squared.
template <class Values>
inline float total_norm(const Table& at, const Values& values) {
  Array<int64_t> first(at.size() + 1);
  first[0] = 0;
  for (int64_t k = 0; k < at.size(); ++k) first[k + 1] = first[k] + ceil_div(at[k].numel, kChunk);
  Array<float> sums(first[at.size()]);
  for_each_block(at, [&](const Block& b, Scratch& scratch) {
    sums[first[b.k] + b.begin / kChunk] = sum_squares(values(b, scratch), b.n);
  });
  double total = 0;
  for (int64_t i = 0; i < sums.size(); ++i) total += sums[i];
  return math::norm(total);
}

// Rows [row, row + rows) that are no longer than kResident: measured, settled and finished while in cache.
template <class Op>
inline void walk_rows(const Op& op, const View& view, int64_t k, int64_t row, int64_t rows, Scratch& scratch) {
  const int64_t cols = view.cols;
  if (cols > kBlock) {
    for (const int64_t end = row + rows; row < end; ++row) {
      double sums[2] = {0, 0};
      for (int64_t col = 0; col < cols; col += kBlock) {
        const int64_t n = cols - col < kBlock ? cols - col : kBlock;
        const Squares squares = op.prepare(Block{k, row * cols + col, n, row, 1, col}, scratch);
        for (int j = 0; j < 2; ++j)
          if (squares.of[j] != nullptr) sums[j] += sum_squares(squares.of[j], n);
      }
      scratch.scale[0] = op.settle(k, row, sums);
      for (int64_t col = 0; col < cols; col += kBlock)
        op.finish(Block{k, row * cols + col, cols - col < kBlock ? cols - col : kBlock, row, 1, col,
                        row + 1 < end && cols <= kTile ? cols : 0},
                  nullptr, scratch);
    }
    return;
  }
  int64_t most = cols > 0 ? kBlock / cols : kBlockRows;
  if (most > kBlockRows) most = kBlockRows;
  for (const int64_t end = row + rows; row < end; row += most) {
    const Block b{k, row * cols, (end - row < most ? end - row : most) * cols, row, end - row < most ? end - row : most,
                  0, row + most < end ? most * cols : 0};
    Squares squares;
    if (b.n > 0) squares = op.prepare(b, scratch);
    for (int64_t r = 0; r < b.rows; ++r) {
      double sums[2] = {0, 0};
      for (int j = 0; j < 2; ++j)
        if (squares.of[j] != nullptr) sums[j] = sum_squares(squares.of[j] + r * cols, cols);
      scratch.scale[r] = op.settle(k, row + r, sums);
    }
    if (b.n > 0) op.finish(b, squares.of[0], scratch);
  }
}

// A tensor whose rows are longer than kResident: all threads measure its segments, one settles, all finish.
// To be called by every thread of a parallel region; `sums` and `scales` are shared, of `long_chunks` and rows.
template <class Op>
inline void walk_long_rows(const Op& op, const View& view, int64_t k, Array<float> (&sums)[2], Array<float>& scales,
                           Scratch& scratch) {
  const int64_t cols = view.cols, chunks = ceil_div(cols, kChunk), segments = ceil_div(cols, kTile);
  const auto for_each_chunk = [&](int64_t segment, auto body) {
    const int64_t row = segment / segments, begin = segment % segments * kTile;
    const int64_t end = cols - begin < kTile ? cols : begin + kTile;
    for (int64_t col = begin; col < end; col += kBlock)
      body(Block{k, row * cols + col, end - col < kBlock ? end - col : kBlock, row, 1, col},
           row * chunks + col / kChunk);
  };
#pragma omp for schedule(dynamic)
  for (int64_t segment = 0; segment < view.rows * segments; ++segment) {
    for_each_chunk(segment, [&](const Block& b, int64_t chunk) {
      const Squares squares = op.prepare(b, scratch);
      for (int j = 0; j < 2; ++j) sums[j][chunk] = squares.of[j] ? sum_squares(squares.of[j], b.n) : 0.0f;
    });
  }
#pragma omp for schedule(static)
  for (int64_t row = 0; row < view.rows; ++row) {
    double row_sums[2] = {0, 0};
    for (int j = 0; j < 2; ++j)
      for (int64_t i = 0; i < chunks; ++i) row_sums[j] += sums[j][row * chunks + i];
    scales[row] = op.settle(k, row, row_sums);
  }
#pragma omp for schedule(dynamic)
  for (int64_t segment = 0; segment < view.rows * segments; ++segment) {
    scratch.scale[0] = scales[segment / segments];
    for_each_chunk(segment, [&](const Block& b, int64_t) { op.finish(b, nullptr, scratch); });
  }
}

// Walk by rows, for ops that need a sum over each. An op has three parts:
//   prepare(block, scratch) -> Squares   first pass: computes, stores, and names what is to be summed
//   settle(k, row, sums) -> float        once per row, with its sums; the result is kept as scratch.scale[row of block]
//   finish(block, w, scratch)            second pass; `w` is prepare's first pointer where it is still valid, else null
template <class Op>
inline void for_each_row(const Table& at, const Op& op) {
  const auto is_long = [](const View& t) { return t.cols > kResident; };
  const auto rows_per_tile = [](const View& t) { return t.cols < kTile ? kTile / (t.cols > 0 ? t.cols : 1) : 1; };
  const Plan plan(at, [&](const View& t) { return is_long(t) ? 0 : ceil_div(t.rows, rows_per_tile(t)); });

  int64_t long_numel = 0, long_chunks = 0, long_rows = 0;
  for (int64_t k = 0; k < at.size(); ++k) {
    if (!is_long(at[k])) continue;
    const int64_t chunks = at[k].rows * ceil_div(at[k].cols, kChunk);
    long_numel += at[k].numel;
    if (chunks > long_chunks) long_chunks = chunks;
    if (at[k].rows > long_rows) long_rows = at[k].rows;
  }
  Array<float> sums[2] = {Array<float>(long_chunks), Array<float>(long_chunks)}, scales(long_rows);

#pragma omp parallel if (plan.numel + long_numel > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < plan.tiles; ++t) {
      plan.visit(t, [&](int64_t k, int64_t piece) {
        const int64_t per_tile = rows_per_tile(at[k]), row = piece * per_tile, left = at[k].rows - row;
        walk_rows(op, at[k], k, row, left < per_tile ? left : per_tile, scratch);
      });
    }
    if (long_numel > 0)
      for (int64_t k = 0; k < at.size(); ++k)
        if (is_long(at[k])) walk_long_rows(op, at[k], k, sums, scales, scratch);
  }
}

}  // namespace flatkern::cpu::FK_ISA
