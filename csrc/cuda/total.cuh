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

// The sum over a block, in its first thread. To be called again only behind a barrier.
FK_DEVICE double block_sum(double x, double (&of_warps)[kShortThreads / kWarp]) {
  x = fold_lanes(x);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kShortThreads / kWarp; ++w) sum += of_warps[w];
  return sum;
}

// A norm over all tensors.
struct TotalNorm {
  const Tile* tiles;
  uint32_t count;       // of the launch's tiles
  double* sums;         // of each block, those of earlier launches first
  uint32_t* ticket;     // 0 between launches
  uint32_t first, all;  // the place of the launch's first block, and how many sums there are in the end
  float* norm;

  FK_DEVICE_MEMBER bool is_last_launch() const { return first + gridDim.x == all; }
};

struct TotalRoom {
  double of_warps[kShortThreads / kWarp];
  bool is_last[1];
};

// norm <- sqrt(sum over all tiles of sum_tile(tile)). Each block calls it once.
template <class SumTile>
FK_DEVICE void total_norm(const TotalNorm& total, TotalRoom& room, const SumTile& sum_tile) {
  double sum = 0;
  for_each_tile(total.tiles, total.count, [&](const Tile& t) { sum += sum_tile(t); });
  sum = block_sum(sum, room.of_warps);
  if (threadIdx.x == 0) total.sums[total.first + blockIdx.x] = sum;
  // Earlier launches are done when the last one begins, so that it alone counts: a call that fails between two of them
  // leaves no count.
  if (!total.is_last_launch() || !comes_last(total.ticket, room.is_last)) return;
  double all = 0;
  for (uint32_t i = threadIdx.x; i < total.all; i += kShortThreads) all += __ldcg(total.sums + i);
  all = block_sum(all, room.of_warps);
  if (threadIdx.x == 0) *total.norm = math::norm(all);
}

}  // namespace flatkern::cuda
