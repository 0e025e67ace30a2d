// The norm family on CUDA: filter_norms_, gradient_norm_.
#include "../math/norm.h"
#include "host.cuh"
#include "operations.h"
#include "rows.cuh"

namespace flatkern::cuda {
namespace {

template <size_t kBytes>
struct NormsArguments {
  static constexpr int kTensors = (kBytes - sizeof(void*) - sizeof(LongRows)) / (2 * sizeof(void*) + 1) - 1;
  const Tile* tiles;
  LongRows long_rows;
  const void* params[kTensors];
  float* norms[kTensors];
  uint8_t codes[kTensors];
};

constexpr int kEights = 4;
const Walk kNorms = {"filter_norms_",
                     NormsArguments<kSmall>::kTensors,
                     NormsArguments<kLarge>::kTensors,
                     kEights,
                     kResident,
                     true,
                     false};

template <class T, int kThreads, bool kWhole, class Args, class Sums>
FK_DEVICE void norms_tile(const Args& a, const Tile& t, Sums& sums) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> param(a.params[k], a.codes[k], team.start);
  float squares[kEights] = {};
  for_each_eight<kEights>(team, [&](int i, const auto& s) {
    float w[8];
    param.load(s).values(w);
    squares[i] = sum_squares(w);
  });
  const float sum = row_sum<kEights>(t, team, squares, sums);
  if ((t.flags & kSegments) != 0) {
    add_segment(t, team, a.long_rows, sum, 0.0f, false,
                [&](double all, double) { a.norms[k][t.row] = math::norm(all); });
  } else if (team.leads()) {
    a.norms[k][team.row(t)] = math::root(sum);
  }
}

template <class T, int kThreads, class Args>
__global__ void __launch_bounds__(kThreads) norms_kernel(FK_PARAM(Args) a) {
  using Sums = ChunkSums<kThreads, kEights>;
  FK_SHARED(Sums, sums);
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    norms_tile<T, kThreads, true>(a, t, sums);
  } else {
    norms_tile<T, kThreads, false>(a, t, sums);
  }
}

template <class T>
void run(const FilterNorms& a, const Plan& plan, Stream stream) {
  for (const Launch& launch : plan.launches) {
    with_size<NormsArguments>(launch.end - launch.begin, [&](auto bytes) {
      NormsArguments<decltype(bytes)::value> args;
      args.tiles = launch.tiles;
      args.long_rows = plan.long_rows;
      for (int64_t k = launch.begin; k < launch.end; ++k) {
        const int64_t i = k - launch.begin;
        args.params[i] = a.params[k].data;
        args.norms[i] = a.norms[k].as<float>();
        args.codes[i] = static_cast<uint8_t>(code_of(a.params[k].dtype));
      }
      start(kNorms.op,
            launch.threads > kShortThreads ? kernel<norms_kernel<T, kLongThreads, decltype(args)>>
                                           : kernel<norms_kernel<T, kShortThreads, decltype(args)>>,
            launch.count, launch.threads, stream, args);
    });
  }
}

}  // namespace

void filter_norms_(const FilterNorms& a) {
  if (a.params.size() == 0) return;
  const Place place = place_of(kNorms.op, a.params);
  const auto plan = find_plan(kNorms, {true, false, a.params, {}, nullptr}, place);
  const Launching launching(*plan);
  if (all_are(DType::kFloat32, {&a.params})) {
    run<float>(a, *plan, place.stream);
  } else {
    run<AnyFloat>(a, *plan, place.stream);
  }
}

// ---- gradient_norm_

namespace {

struct GradientCall {
  const Tile* tiles;
  double* sums;         // of each tile, those of earlier launches before them
  uint32_t* ticket;     // tiles of the last launch that are summed; 0 between launches
  uint32_t first, all;  // the launch's first tile, and tiles of all launches
  float* norm;
  Scalar grad_scale;
};

template <size_t kBytes>
struct GradientArguments : GradientCall {
  static constexpr int kTensors =
      (kBytes - sizeof(GradientCall)) / (2 * sizeof(void*) + 2 * sizeof(float) + sizeof(uint8_t)) - 1;
  const void* grads[kTensors];
  const void* clean_grads[kTensors];
  float grad_weight[kTensors], clean_weight[kTensors];
  uint8_t codes[kTensors];
};

const Walk kGradient = {"gradient_norm_",
                        GradientArguments<kSmall>::kTensors,
                        GradientArguments<kLarge>::kTensors,
                        kEights,
                        kSegment,
                        false,
                        true};

// The squares of a thread's elements, in float64: those of large gradients are beyond float32.
template <class T, bool kWhole, class Args>
FK_DEVICE double sum_tile(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> grad(a.grads[k], a.codes[k] & 3, team.start);
  const Elements<T> clean_grad(a.clean_grads[k], a.codes[k] >> 2, team.start);
  const float factor = a.grad_weight[k] * a.grad_scale.get();
  double sum = 0;
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float g[8], clean[8] = {};
    grad.load(s).values(g);
    if (a.clean_grads[k] != nullptr) clean_grad.load(s).values(clean);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const double x = a.clean_grads[k] != nullptr ? math::mixed(g[j], clean[j], factor, a.clean_weight[k], 1.0f)
                                                   : math::mixed(g[j], factor, 1.0f);
      sum += x * x;
    }
  });
  return sum;
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

template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads) gradient_kernel(FK_PARAM(Args) a) {
  FK_SHARED(double[kShortThreads / kWarp], of_warps);
  FK_SHARED(bool[1], is_last);
  const Tile& t = a.tiles[blockIdx.x];
  const double sum = block_sum((t.flags & kWhole) != 0 ? sum_tile<T, true>(a, t) : sum_tile<T, false>(a, t), of_warps);
  if (threadIdx.x == 0) a.sums[a.first + blockIdx.x] = sum;
  // Earlier launches are done when the last one begins, so that it alone counts: a call that fails between two of them
  // leaves no count.
  if (a.first + gridDim.x != a.all) return;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last[0]) return;
  // The block that comes last adds all of them, in an order that does not depend on which one it is.
  double all = 0;
  for (uint32_t i = threadIdx.x; i < a.all; i += kShortThreads) all += __ldcg(a.sums + i);
  all = block_sum(all, of_warps);
  if (threadIdx.x == 0) *a.norm = math::norm(all);
}

template <class T>
void run(const GradientNorm& a, const Plan& plan, Stream stream) {
  uint32_t first = 0;
  for (const Launch& launch : plan.launches) {
    with_size<GradientArguments>(launch.end - launch.begin, [&](auto bytes) {
      GradientArguments<decltype(bytes)::value> args;
      static_cast<GradientCall&>(args) = {launch.tiles,
                                          plan.sums,
                                          plan.tickets,
                                          first,
                                          plan.tiles,
                                          a.norm[0].as<float>(),
                                          scalar_of(a.grad_scale, 1.0f)};
      for (int64_t k = launch.begin; k < launch.end; ++k) {
        const int64_t i = k - launch.begin;
        args.grads[i] = a.grads[k].data;
        args.clean_grads[i] = pointer<void>(&a.clean_grads, k);
        args.grad_weight[i] = static_cast<float>(a.grad_weight[k]);
        args.clean_weight[i] = static_cast<float>(a.clean_weight[k]);
        const DType clean = a.clean_grads ? a.clean_grads[k].dtype : a.grads[k].dtype;
        args.codes[i] = static_cast<uint8_t>(code_of(a.grads[k].dtype) | code_of(clean) << 2);
      }
      start(kGradient.op, kernel<gradient_kernel<T, decltype(args)>>, launch.count, launch.threads, stream, args);
    });
    first += launch.count;
  }
}

}  // namespace

void gradient_norm_(const GradientNorm& a) {
  const Place place = place_of(kGradient.op, a.grads.size() > 0 ? a.grads : a.norm);
  const auto plan = find_plan(kGradient, {false, false, a.grads, {&a.clean_grads}, nullptr}, place);
  const Launching launching(*plan);
  if (all_are(DType::kFloat32, {&a.grads, &a.clean_grads})) {
    run<float>(a, *plan, place.stream);
  } else {
    run<AnyFloat>(a, *plan, place.stream);
  }
}

}  // namespace flatkern::cuda
