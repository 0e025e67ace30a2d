// perturb_gaussian_ for one tile.
#pragma once

#include <type_traits>

#include "perturbation.cuh"

namespace flatkern::cuda {

// Types of the lists of a call; backups are like params. Clean weights are masters, or the params themselves.
template <class P, class C>
struct PerturbTypes {
  using Param = P;
  using Clean = C;
};

struct PerturbCall {
  const Tile* tiles;
  LongRows long_rows;
  Key key;
  DeviceNumbers sigmas;
  bool measures_segments;  // this launch measures rows that are cut into segments, and another one perturbs them
};

template <size_t kBytes>
struct PerturbArguments : PerturbCall {
  static constexpr int kTensors = (kBytes - sizeof(PerturbCall)) / (5 * sizeof(void*) + 3 * sizeof(float) + 2);
  void* params[kTensors];
  void* backups[kTensors];
  const void* clean[kTensors];
  const float* norms[kTensors];
  const float* history[kTensors];
  float sigma[kTensors], eta[kTensors];
  uint32_t index[kTensors];
  uint16_t codes[kTensors];  // of params, backups, clean; two bits each
};

template <class Types, int kEights, bool kWhole, class Args, class Sums>
FK_DEVICE void perturb_tile(const Args& a, const Tile& t, Sums& sums) {
  using P = typename Types::Param;
  using C = typename Types::Clean;
  constexpr bool kGeneral = std::is_same_v<P, AnyFloat>;
  const uint32_t k = t.tensor, codes = kGeneral ? a.codes[k] : 0;
  const Team<kWhole> team(t);
  const Elements<P> param(a.params[k], codes & 3, team.start);
  const Elements<C> clean(a.clean[k], codes >> 4 & 3, team.start);
  const bool segments = (t.flags & kSegments) != 0, measures = a.norms[k] == nullptr;

  // What is not there counts as zero, so that it needs no branch.
  typename Elements<C>::Stored stored[kEights] = {};
  float squares[kEights] = {};
  for_each_eight<kEights>(team, [&](int i, const auto& s) { stored[i] = clean.load(s); });
  if (a.backups[k] != nullptr && !(segments && a.measures_segments)) {
    const Elements<P> backup(a.backups[k], codes >> 2 & 3, team.start);
    if constexpr (kGeneral) {
      for_each_eight<kEights>(team, [&](int, const auto& s) { backup.store(s, param.load(s)); });
    } else if constexpr (std::is_same_v<P, C>) {
      for_each_eight<kEights>(team, [&](int i, const auto& s) { backup.store(s, stored[i]); });
    }
  }
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    float w[8];
    stored[i].values(w);
    squares[i] = sum_squares(w);
  }

  float norm;
  if (measures && !(segments && !a.measures_segments)) {
    const float sum = row_sum<kEights>(t, team, squares, sums);
    if (segments) {
      add_segment(t, team, a.long_rows, sum, 0.0f, false,
                  [&](double all, double) { a.long_rows.norms[t.long_row] = math::norm(all); });
      return;
    }
    norm = math::root(sum);
  } else if (measures) {
    norm = a.long_rows.norms[t.long_row];
  } else {
    norm = team.is_there() ? a.norms[k][team.row(t)] : 0.0f;
  }
  if (!team.is_there()) return;
  const float* history = kGeneral ? a.history[k] : nullptr;
  if (history != nullptr) history += team.history_in(t);
  const NoiseScale scale = {
      norm,    static_cast<float>(kGeneral ? a.sigmas.get(k, a.sigma[k]) : a.sigma[k]), a.eta[k],
      history, history != nullptr && (t.flags & kFlat) == 0 ? *history : 0.0f,          a.index[k]};
  const Key key = kGeneral ? a.key.get() : a.key;
  if constexpr (kWhole && kEights == kLongEights) {
    // In a block of 1024 threads sm_120 has one register too few, unless the addresses are found out anew.
    const Tile& again = a.tiles[forget(static_cast<int>(blockIdx.x))];
    const Team<kWhole> same(again);
    add_noise<kEights>(key, again, same, scale, stored, Elements<P>(a.params[k], codes & 3, same.start));
  } else if constexpr (kWhole) {
    add_noise<kEights>(key, t, team, scale, stored, param);
  } else {
    add_noise_again<kEights>(key, t, team, scale, clean, param);
  }
}

template <class Types, int kThreads, int kBlocks, int kEights, class Args>
__global__ void __launch_bounds__(kThreads, blocks_here(kBlocks, false)) perturb_kernel(FK_PARAM(Args) a) {
  using Sums = ChunkSums<kThreads, kEights>;
  FK_SHARED(Sums, sums);
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    perturb_tile<Types, kEights, true>(a, t, sums);
  } else {
    perturb_tile<Types, kEights, false>(a, t, sums);
  }
}

}  // namespace flatkern::cuda
