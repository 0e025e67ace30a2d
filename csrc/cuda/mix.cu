// mix_gradients_ of the update family on CUDA.
#include "../math/update.h"
#include "gradient.cuh"
#include "host.cuh"
#include "operations.h"
#include "rows.cuh"

namespace flatkern::cuda {
namespace {

struct MixCall {
  const Tile* tiles;
  LongRows long_rows;
  const float* component;
  Scalar grad_scale, clip, found_inf;

  FK_DEVICE_MEMBER bool skips() const { return found_inf.get() != 0.0f; }
};

template <size_t kBytes>
struct MixArguments : MixCall {
  static constexpr int kTensors =
      (kBytes - sizeof(MixCall)) / (4 * sizeof(void*) + 3 * sizeof(float) + sizeof(uint8_t)) - 1;
  const void* grads[kTensors];
  void* outs[kTensors];  // where the final gradients go: the gradients themselves, or other tensors
  const void* clean_grads[kTensors];
  float* history[kTensors];
  float grad_weight[kTensors], clean_weight[kTensors], beta[kTensors];
  uint8_t codes[kTensors];  // of grads, clean_grads, outs; two bits each
};

constexpr int kEights = 4;
const Walk kFlatWalk = walk_of<MixArguments>("mix_gradients_", kEights, kSegment);
const Walk kRowWalk = walk_of<MixArguments>("mix_gradients_", kEights, kResident, kLongRows);

template <class T, bool kWhole, class Args>
FK_DEVICE void mix_tile(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> grad(a.grads[k], a.codes[k] & 3, team.start);
  const Elements<T> clean_grad(a.clean_grads[k], a.codes[k] >> 2 & 3, team.start);
  const Elements<T> out(a.outs[k], a.codes[k] >> 4, team.start);
  const FinalGradient final(a, k, a.clean_grads[k] != nullptr);
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float g[8], clean[8] = {};
    grad.load(s).values(g);
    if (final.mixes) clean_grad.load(s).values(clean);
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = final.of(g[j], clean[j]);
    out.store(s, out.rounded(g));
  });
}

// Eight blocks, where ptxas would take one register more than they leave for sm_90.
template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads, std::is_same_v<T, AnyFloat> ? 0 : 6) mix_kernel(FK_PARAM(Args) a) {
  if (a.skips()) return;
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    mix_tile<T, true>(a, t);
  } else {
    mix_tile<T, false>(a, t);
  }
}

// With ARWP's history, which takes the squares of the unscaled gradients: of a row, or, of a tensor of rank <= 1, of
// each element.
template <int kThreads, class Args>
__global__ void __launch_bounds__(kThreads) mix_rows_kernel(FK_PARAM(Args) a) {
  using Sums = ChunkSums<kThreads, kEights>;
  FK_SHARED(Sums, sums);
  if (a.skips()) return;
  const Tile& t = a.tiles[blockIdx.x];
  const Team<false> team(t);
  const uint32_t k = t.tensor;
  const bool is_flat = (t.flags & kFlat) != 0;
  const Elements<AnyFloat> grad(a.grads[k], a.codes[k] & 3, team.start);
  const Elements<AnyFloat> clean_grad(a.clean_grads[k], a.codes[k] >> 2 & 3, team.start);
  const Elements<AnyFloat> out(a.outs[k], a.codes[k] >> 4, team.start);
  const FinalGradient final(a, k, a.clean_grads[k] != nullptr);
  const float scale = a.grad_scale.get(), beta = a.beta[k];
  float* history = a.history[k] + team.history_in(t);
  float squares[kEights] = {};
  for_each_eight<kEights>(team, [&](int i, const auto& s) {
    float g[8], clean[8] = {}, scaled[8];
    grad.load(s).values(g);
    if (final.mixes) clean_grad.load(s).values(clean);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      scaled[j] = g[j] * scale;
      g[j] = final.of(g[j], clean[j]);
      if (!is_flat || j >= s.count) continue;
      float& past = history[s.place + j];
      past = math::update_history(past, math::square(scaled[j]), beta);
    }
    squares[i] = sum_squares(scaled);
    out.store(s, out.rounded(g));
  });
  if (is_flat) return;
  const float sum = row_sum<kEights>(t, team, squares, sums);
  if ((t.flags & kSegments) != 0) {
    add_segment(t, team, a.long_rows, sum, 0.0f, false,
                [&](double all, double) { *history = math::update_history(*history, static_cast<float>(all), beta); });
  } else if (team.leads()) {
    *history = math::update_history(*history, sum, beta);
  }
}

template <class Args>
void fill(Args& args, const MixGradients& a, const Plan& plan, const Launch& launch) {
  const Table& outs = a.outs ? a.outs : a.grads;
  static_cast<MixCall&>(args) = {launch.tiles,
                                 plan.long_rows,
                                 pointer<float>(&a.component, 0),
                                 scalar_of(a.grad_scale, 1.0f),
                                 scalar_of(a.clip, 1.0f),
                                 scalar_of(a.found_inf, 0.0f)};
  for (int64_t k = launch.begin; k < launch.end; ++k) {
    const int64_t i = k - launch.begin;
    args.grads[i] = a.grads[k].data;
    args.outs[i] = outs[k].data;
    args.clean_grads[i] = pointer<void>(&a.clean_grads, k);
    args.history[i] = pointer<float>(&a.history, k);
    args.grad_weight[i] = static_cast<float>(a.grad_weight[k]);
    args.clean_weight[i] = static_cast<float>(a.clean_weight[k]);
    args.beta[i] = static_cast<float>(a.beta[k]);
    const DType clean = a.clean_grads ? a.clean_grads[k].dtype : a.grads[k].dtype;
    args.codes[i] = static_cast<uint8_t>(code_of(a.grads[k].dtype) | code_of(clean) << 2 | code_of(outs[k].dtype) << 4);
  }
}

template <class T>
void run(const MixGradients& a, const Plan& plan, Stream stream) {
  for_each_launch<MixArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    fill(args, a, plan, launch);
    start(kFlatWalk.op, kernel<mix_kernel<T, std::decay_t<decltype(args)>>>, launch.count, launch.threads, stream,
          args);
  });
}

void run_rows(const MixGradients& a, const Plan& plan, Stream stream) {
  for_each_launch<MixArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    fill(args, a, plan, launch);
    using Args = std::decay_t<decltype(args)>;
    start(kRowWalk.op,
          launch.threads > kShortThreads ? kernel<mix_rows_kernel<kLongThreads, Args>>
                                         : kernel<mix_rows_kernel<kShortThreads, Args>>,
          launch.count, launch.threads, stream, args);
  });
}

}  // namespace

void mix_gradients_(const MixGradients& a) {
  if (a.grads.size() == 0) return;
  const Place place = place_of(kFlatWalk.op, a.grads);
  const auto plan =
      find_plan(a.history ? kRowWalk : kFlatWalk,
                {a.history.present, a.history.present, a.grads, {&a.outs, &a.clean_grads, &a.history}, nullptr}, place);
  const Launching launching(*plan);
  if (a.history) return run_rows(a, *plan, place.stream);
  with_dtype({&a.grads, &a.outs, &a.clean_grads},
             [&](auto type) { run<typename decltype(type)::Element>(a, *plan, place.stream); });
}

}  // namespace flatkern::cuda
