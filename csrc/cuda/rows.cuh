// Sums over rows, in the one order of this backend: it depends on nothing but the length of the row.
//
// Eight neighbours: two chains of four fused multiply-adds, which are added. The 32 eights of a chunk: a binary tree,
// the halves first. The chunks of a row: 32 lanes, each adding every 32nd in its order, then the same tree. Segments of
// a longer row are summed so, and added in float64, in lanes and a tree again. What is not there counts as zero, which
// changes no bit of a sum of squares.
#pragma once

#include "../math/norm.h"
#include "multi_tensor.cuh"
#include "rows.h"

namespace flatkern::cuda {

// The squares of eight neighbours, taken in their order.
struct Squares {
  float even = 0.0f, odd = 0.0f;

  FK_DEVICE_MEMBER void take(int j, float x) {
    const bool is_even = j % 2 == 0;
    const float sum = math::fma(x, x, is_even ? even : odd);  // a reference to one of them would put both into memory
    even = is_even ? sum : even;
    odd = is_even ? odd : sum;
  }
  template <int kCount>
  FK_DEVICE_MEMBER void take(const float (&x)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) take(j, x[j]);
  }
  FK_DEVICE_MEMBER float sum() const { return even + odd; }
};

FK_DEVICE float sum_squares(const float (&x)[8]) {
  Squares squares;
  squares.take(x);
  return squares.sum();
}

// The sum for an eight of which two lanes have four neighbours each; in the second one.
FK_DEVICE float sum_squares_of_both(const float (&x)[4]) {
  Squares first;
  first.take(x);
  Squares both = {__shfl_xor_sync(kAllLanes, first.even, 1), __shfl_xor_sync(kAllLanes, first.odd, 1)};
  both.take(x);
  return both.sum();
}

// Sums over the lanes of a warp, or those that a team has of it, a power of two; in every lane.
template <class T>
FK_DEVICE T fold_lanes(T x, int lanes = kWarp) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    if (distance < lanes) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The sums of kCount numbers over the lanes of a warp, each by the tree of fold_lanes, with fewer shuffles: from each
// level on, half of the lanes have one of two numbers. Number i is then in lane `lane_of(i)`.
template <int kCount>
FK_DEVICE float fold_several(const float (&x)[kCount], int lane) {
  static_assert(kCount <= 4);
  if (kCount == 1) return fold_lanes(x[0]);
  const auto merge = [&](float low, float high, int distance) {
    const bool upper = (lane & distance) != 0;
    const float mine = upper ? high : low, other = upper ? low : high;
    return mine + __shfl_xor_sync(kAllLanes, other, distance);
  };
  float sum = merge(x[0], x[kCount > 1 ? 1 : 0], 16);
  if (kCount > 2) {
    const float second = merge(x[kCount > 2 ? 2 : 0], kCount > 3 ? x[kCount > 3 ? 3 : 0] : 0.0f, 16);
    sum = merge(sum, second, 8);
  } else {
    sum += __shfl_xor_sync(kAllLanes, sum, 8);
  }
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// What a block needs to sum rows: a place for each chunk.
template <int kThreads, int kEights>
struct ChunkSums {
  float of[kThreads / kWarp * kEights];
};

// Where the sums of a team's chunks begin: threads before it have chunks, too.
template <bool kWhole>
FK_DEVICE int first_chunk(const Team<kWhole>& team, int eights) {
  return static_cast<int>(threadIdx.x - team.first / kEight) / kWarp * eights;
}

// The sum over a team's row, in all of its threads; `x` has what a thread has of it, by its eights. To be called by
// every thread of a block, with a ChunkSums that no earlier call used.
template <int kEights, bool kWhole, class Sums>
FK_DEVICE float row_sum(const Tile& t, const Team<kWhole>& team, const float (&x)[kEights], Sums& sums) {
  if (t.length <= kChunk) return fold_lanes(x[0], t.threads);
  const int lane = static_cast<int>(threadIdx.x % kWarp), base = first_chunk(team, kEights);
  const float sum = fold_several<kEights>(x, lane);
  // Lanes 0, 16, 8, 24 have the numbers 0, 1, 2, 3.
  const int i = (lane >> 4) + 2 * (lane >> 3 & 1);
  if (lane % 8 == 0 && i < kEights && team.is_there())
    sums.of[base + team.first / kChunk + i * (team.step / kChunk)] = sum;
  __syncthreads();
  const int chunks = (team.length + kChunk - 1) / kChunk;
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < static_cast<int>(sizeof(sums.of) / sizeof(float)); c += kWarp)
    if (c + lane < chunks) total += sums.of[base + c + lane];
  return fold_lanes(total);
}

// Sums the partial sums of a row, in a warp.
FK_DEVICE double sum_partials(const double* partials, uint32_t count) {
  double sum = 0;
  for (uint32_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += __ldcg(partials + i);
  return fold_lanes(sum);
}

// Leaves the sums of a team's segment, and calls finish(first, second) with those of the whole row in one thread, of
// the team that comes last.
template <bool kWhole, class Finish>
FK_DEVICE void add_segment(const Tile& t, const Team<kWhole>& team, const LongRows& all, float first, float second,
                           bool has_second, const Finish& finish) {
  const LongRow row = all.rows[t.long_row];
  double* partials = all.partials + row.first;
  bool last = false;
  if (team.leads()) {
    const uint32_t segment = t.segment + team.number_in(t);
    partials[segment] = first;
    if (has_second) partials[all.segments + segment] = second;
    __threadfence();
    last = atomicInc(all.tickets + t.long_row, row.segments - 1) == row.segments - 1;
    if (last) __threadfence();
  }
  if (!__shfl_sync(kAllLanes, static_cast<int>(last), 0)) return;
  __syncwarp();  // a shuffle orders no memory
  const double sum = sum_partials(partials, row.segments);
  const double other = has_second ? sum_partials(partials + all.segments, row.segments) : 0.0;
  if (team.leads()) finish(sum, other);
}

}  // namespace flatkern::cuda
