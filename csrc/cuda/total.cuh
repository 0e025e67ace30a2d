// Numbers over all tensors of a call, in an order that depends on their shapes alone.
//
// There are two levels. A block walks every so manieth tile and leaves what it has found; the block that comes last
// adds what all have left.
#pragma once

#include "rows.cuh"

namespace flatkern::cuda {

// Enough blocks for any GPU of today, and few enough for one block to add what they leave.
constexpr unsigned kMostWalkers = 1024;

// Calls body(tile) for those tiles of a launch that are a block's.
template <class Body>
FK_DEVICE void for_each_tile(const Tile* tiles, uint32_t count, const Body& body) {
#pragma unroll 1
  for (uint32_t i = blockIdx.x; i < count; i += gridDim.x) body(tiles[i]);
}

// Whether a block is the last one of its launch that comes here; what the others wrote before is then seen. To be
// called by every thread, once.
FK_DEVICE bool comes_last(uint32_t* ticket, bool (&room)[1]) {
  __threadfence();
  __syncthreads();  // all of the block have written
  if (threadIdx.x == 0) room[0] = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return room[0];
}

// kCount sums over a block, in all of its threads. To be called again only behind a barrier.
template <int kCount>
FK_DEVICE void block_sums(double (&x)[kCount], double (&of_warps)[kCount][kShortThreads / kWarp]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = fold_lanes(x[i]);
    if (threadIdx.x % kWarp == 0) of_warps[i][threadIdx.x / kWarp] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0;
#pragma unroll
    for (int w = 0; w < kShortThreads / kWarp; ++w) x[i] += of_warps[i][w];
  }
}

// Sums over all tensors.
struct Totals {
  const Tile* tiles;
  uint32_t count;       // of the launch's tiles
  double* sums;         // of each block, those of earlier launches first
  uint32_t* ticket;     // 0 between launches
  uint32_t first, all;  // the place of the launch's first block, and how many blocks there are in the end

  FK_DEVICE_MEMBER bool is_last_launch() const { return first + gridDim.x == all; }
};

template <int kCount>
struct TotalRoom {
  double of_warps[kCount][kShortThreads / kWarp];
  bool is_last[1];
};

// Calls finish(sums) in one thread, with kCount sums over all tiles of what add_tile(tile, sums) adds. Each block calls
// it once.
template <int kCount, class AddTile, class Finish>
FK_DEVICE void total_sums(const Totals& total, TotalRoom<kCount>& room, const AddTile& add_tile, const Finish& finish) {
  double sums[kCount] = {};
  for_each_tile(total.tiles, total.count, [&](const Tile& t) { add_tile(t, sums); });
  block_sums(sums, room.of_warps);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.sums[kCount * (total.first + blockIdx.x) + i] = sums[i];
  }
  // Earlier launches are done when the last one begins, so that it alone counts: a call that fails between two of them
  // leaves no count.
  if (!total.is_last_launch() || !comes_last(total.ticket, room.is_last)) return;
  double all[kCount] = {};
  for (uint32_t b = threadIdx.x; b < total.all; b += kShortThreads) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) all[i] += __ldcg(total.sums + kCount * b + i);
  }
  block_sums(all, room.of_warps);
  if (threadIdx.x == 0) finish(all);
}

// norm <- sqrt(sum over all tiles of sum_tile(tile)).
template <class SumTile>
FK_DEVICE void total_norm(const Totals& total, float* norm, TotalRoom<1>& room, const SumTile& sum_tile) {
  total_sums(
      total, room, [&](const Tile& t, double (&sums)[1]) { sums[0] += sum_tile(t); },
      [&](const double (&sums)[1]) { *norm = math::norm(sums[0]); });
}

}  // namespace flatkern::cuda
