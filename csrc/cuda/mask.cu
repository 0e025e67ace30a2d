// The mask family on CUDA: count_magnitudes_, pack_mask_, amplify_.
#include <algorithm>

#include "host.cuh"
#include "mask.cuh"
#include "operations.h"
#include "total.cuh"

namespace flatkern::cuda {

// ---- count_magnitudes_

namespace {

constexpr int kEights = 4;
constexpr int kMostValues = 1 << math::kDigitWidth[0], kLaterWidth = math::kDigitWidth[1];

struct CountCall {
  const Tile* tiles;
  uint32_t count;
  const int64_t* prefix;
  int64_t stride;  // of the prefix
  int known;       // digits in it
  int shift, width;
  unsigned long long* counters;  // one for each value, for what is below the prefix, for what is not finite; zero
  uint32_t* ticket;              // between calls, as this is between launches
  int64_t* counts;
  bool is_last;  // of the call's launches
};

template <size_t kBytes>
struct CountArguments : CountCall {
  static constexpr int kTensors = (kBytes - sizeof(CountCall)) / (sizeof(void*) + sizeof(uint8_t)) - 1;
  const void* grads[kTensors];
  uint8_t codes[kTensors];
};

const Walk kCount = walk_of<CountArguments>("count_magnitudes_", kEights, kSegment, kTotals, 2 * (kMostValues + 2));

// What a thread finds beside the values of the digit.
struct Others {
  uint32_t below = 0, infinite = 0;
};

template <class T, bool kWhole, class Args>
FK_DEVICE void count_tile(const Args& a, const Tile& t, uint32_t higher, uint32_t (&bins)[kMostValues],
                          Others& others) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor, last = (1u << a.width) - 1;
  const Elements<T> grad(a.grads[k], a.codes[k], team.start);
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float g[8];
    grad.load(s).values(g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!kWhole && j >= s.count) continue;
      const uint32_t bits = math::magnitude_bits(g[j]), digits = bits >> a.shift, before = digits >> a.width;
      others.below += before < higher;
      others.infinite += bits >= math::kInfinityBits;
      if (before == higher) atomicAdd(&bins[digits & last], 1u);
    }
  });
}

// Every block counts in its own memory, and adds what is not zero to the call's counters. The block that comes last
// hands them over, and leaves zeros for the next call.
template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads) count_kernel(FK_PARAM(Args) a) {
  FK_SHARED(uint32_t[kMostValues], bins);
  FK_SHARED(bool[1], room);
  const int values = 1 << a.width;
  for (int d = threadIdx.x; d < values; d += kShortThreads) bins[d] = 0;
  uint32_t higher = 0;
  for (int j = 0; j < a.known; ++j) higher = higher << kLaterWidth | static_cast<uint32_t>(a.prefix[j * a.stride]);
  __syncthreads();
  Others others;
  for_each_tile(a.tiles, a.count, [&](const Tile& t) {
    if ((t.flags & kWhole) != 0) {
      count_tile<T, true>(a, t, higher, bins, others);
    } else {
      count_tile<T, false>(a, t, higher, bins, others);
    }
  });
  __syncthreads();
  for (int d = threadIdx.x; d < values; d += kShortThreads)
    if (bins[d] != 0) atomicAdd(a.counters + d, static_cast<unsigned long long>(bins[d]));
  const uint32_t below = fold_lanes(others.below), infinite = fold_lanes(others.infinite);
  if (threadIdx.x % kWarp == 0) {
    if (below != 0) atomicAdd(a.counters + values, static_cast<unsigned long long>(below));
    if (infinite != 0) atomicAdd(a.counters + values + 1, static_cast<unsigned long long>(infinite));
  }
  if (!comes_last(a.ticket, room) || !a.is_last) return;
  for (int d = threadIdx.x; d < values + 2; d += kShortThreads) {
    a.counts[d] = static_cast<int64_t>(__ldcg(a.counters + d));
    a.counters[d] = 0;
  }
}

template <class T>
void run(const CountMagnitudes& a, const Plan& plan, Stream stream) {
  const View& prefix = a.prefix[0];
  const int known = static_cast<int>(prefix.numel);
  for_each_launch<CountArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    static_cast<CountCall&>(args) = {launch.tiles,
                                     launch.count,
                                     prefix.as<int64_t>(),
                                     prefix.strides[0],
                                     known,
                                     math::kDigitShift[known],
                                     math::kDigitWidth[known],
                                     reinterpret_cast<unsigned long long*>(plan.words),
                                     plan.tickets,
                                     a.counts[0].as<int64_t>(),
                                     &launch == &plan.launches.back()};
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      args.grads[k - launch.begin] = a.grads[k].data;
      args.codes[k - launch.begin] = static_cast<uint8_t>(code_of(a.grads[k].dtype));
    }
    start(kCount.op, kernel<count_kernel<T, std::decay_t<decltype(args)>>>, std::min(launch.count, kMostWalkers),
          launch.threads, stream, args);
  });
}

}  // namespace

void count_magnitudes_(const CountMagnitudes& a) {
  const Place place = place_of(kCount.op, a.grads.size() > 0 ? a.grads : a.counts);
  const auto plan = find_plan(kCount, {false, false, a.grads, {}, nullptr}, place);
  const Launching launching(*plan);
  with_dtype({&a.grads}, [&](auto type) { run<typename decltype(type)::Element>(a, *plan, place.stream); });
}

// ---- pack_mask_

namespace {

struct PackCall {
  const Tile* tiles;
  LongRows long_rows;
  const float* threshold;
};

template <size_t kBytes>
struct PackArguments : PackCall {
  static constexpr int kTensors = (kBytes - sizeof(PackCall)) / (2 * sizeof(void*) + sizeof(uint8_t)) - 1;
  uint8_t* masks[kTensors];
  const void* grads[kTensors];
  uint8_t codes[kTensors];
};

const Walk kPack = walk_of<PackArguments>("pack_mask_", kEights, kSegment, kLongRows);

template <class T, bool kWhole, class Args>
FK_DEVICE void pack_tile(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> grad(a.grads[k], a.codes[k], team.start);
  const float threshold = *a.threshold;
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float g[8];
    grad.load(s).values(g);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if ((kWhole || j < s.count) && math::is_small(g[j], threshold)) bits |= 1u << j;
    if constexpr (!kWhole) {
      if ((t.flags & kFlat) != 0) return store_bytes(a.masks[k] + team.start, s, bits);
    }
    a.masks[k][mask_byte(a.long_rows, t, team, s.place)] = static_cast<uint8_t>(bits);
  });
}

template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads) pack_kernel(FK_PARAM(Args) a) {
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    pack_tile<T, true>(a, t);
  } else {
    pack_tile<T, false>(a, t);
  }
}

template <class T>
void run(const PackMask& a, const Plan& plan, Stream stream) {
  for_each_launch<PackArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    static_cast<PackCall&>(args) = {launch.tiles, plan.long_rows, a.threshold[0].as<float>()};
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.masks[i] = a.masks[k].as<uint8_t>();
      args.grads[i] = a.grads[k].data;
      args.codes[i] = static_cast<uint8_t>(code_of(a.grads[k].dtype));
    }
    start(kPack.op, kernel<pack_kernel<T, std::decay_t<decltype(args)>>>, launch.count, launch.threads, stream, args);
  });
}

}  // namespace

void pack_mask_(const PackMask& a) {
  if (a.grads.size() == 0) return;
  const Place place = place_of(kPack.op, a.grads);
  const auto plan = find_plan(kPack, {true, true, a.grads, {}, nullptr}, place);
  const Launching launching(*plan);
  with_dtype({&a.grads}, [&](auto type) { run<typename decltype(type)::Element>(a, *plan, place.stream); });
}

// ---- amplify_

namespace {

struct AmplifyCall {
  const Tile* tiles;
  LongRows long_rows;
};

template <size_t kBytes>
struct AmplifyArguments : AmplifyCall {
  static constexpr int kTensors =
      (kBytes - sizeof(AmplifyCall)) / (3 * sizeof(void*) + sizeof(float) + sizeof(uint8_t)) - 1;
  void* params[kTensors];
  const void* previous[kTensors];
  const uint8_t* masks[kTensors];
  float kappa[kTensors];
  uint8_t codes[kTensors];  // of params and previous
};

constexpr int kAmplifyEights = 2;
const Walk kAmplify = walk_of<AmplifyArguments>("amplify_", kAmplifyEights, kSegment, kLongRows);

template <class T, bool kWhole, class Args>
FK_DEVICE void amplify_tile(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> param(a.params[k], a.codes[k] & 3, team.start);
  const Elements<T> previous(a.previous[k], a.codes[k] >> 2, team.start);
  const float kappa = a.kappa[k];
  for_each_eight<kAmplifyEights>(team, [&](int, const auto& s) {
    const uint32_t bits = mask_bits(a.masks[k], a.long_rows, t, team, s);
    float w[8], old[8];
    param.load(s).values(w);
    previous.load(s).values(old);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if ((bits >> j & 1) != 0) w[j] = math::amplified(w[j], old[j], kappa);
    param.template store<Use::kAgain>(s, param.rounded(w));
  });
}

template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads) amplify_kernel(FK_PARAM(Args) a) {
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    amplify_tile<T, true>(a, t);
  } else {
    amplify_tile<T, false>(a, t);
  }
}

template <class T>
void run(const Amplify& a, const Plan& plan, Stream stream) {
  for_each_launch<AmplifyArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    static_cast<AmplifyCall&>(args) = {launch.tiles, plan.long_rows};
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.params[i] = a.params[k].data;
      args.previous[i] = a.previous[k].data;
      args.masks[i] = a.masks[k].as<uint8_t>();
      args.kappa[i] = static_cast<float>(a.kappa[k]);
      args.codes[i] = static_cast<uint8_t>(code_of(a.params[k].dtype) | code_of(a.previous[k].dtype) << 2);
    }
    start(kAmplify.op, kernel<amplify_kernel<T, std::decay_t<decltype(args)>>>, launch.count, launch.threads, stream,
          args);
  });
}

}  // namespace

void amplify_(const Amplify& a) {
  if (a.params.size() == 0) return;
  const Place place = place_of(kAmplify.op, a.params);
  const auto plan = find_plan(kAmplify, {true, true, a.params, {&a.previous}, nullptr}, place);
  const Launching launching(*plan);
  with_dtype({&a.params, &a.previous},
             [&](auto type) { run<typename decltype(type)::Element>(a, *plan, place.stream); });
}

}  // namespace flatkern::cuda
