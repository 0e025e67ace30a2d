// The norm family on CUDA: filter_norms_, ascent_norm_, gradient_norm_, gradient_products_.
#include <algorithm>

#include "gradient.cuh"
#include "host.cuh"
#include "operations.h"
#include "total.cuh"

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
const Walk kNorms = walk_of<NormsArguments>("filter_norms_", kEights, kResident, kLongRows);

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
  for_each_launch<NormsArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    args.tiles = launch.tiles;
    args.long_rows = plan.long_rows;
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.params[i] = a.params[k].data;
      args.norms[i] = a.norms[k].as<float>();
      args.codes[i] = static_cast<uint8_t>(code_of(a.params[k].dtype));
    }
    start(kNorms.op,
          launch.threads > kShortThreads ? kernel<norms_kernel<T, kLongThreads, std::decay_t<decltype(args)>>>
                                         : kernel<norms_kernel<T, kShortThreads, std::decay_t<decltype(args)>>>,
          launch.count, launch.threads, stream, args);
  });
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

// ---- sums over all tensors

namespace {

// Calls body(launch, blocks, args) for each launch of a plan, with as many blocks as walk its tiles.
template <template <size_t> class Arguments, class Body>
void for_each_total(const Plan& plan, const Body& body) {
  const auto walkers = [](const Launch& launch) { return std::min(launch.count, kMostWalkers); };
  uint32_t first = 0, all = 0;
  for (const Launch& launch : plan.launches) all += walkers(launch);
  for_each_launch<Arguments>(plan.launches, [&](const Launch& launch, auto& args) {
    const unsigned blocks = walkers(launch);
    args.total = {launch.tiles, launch.count, plan.sums, plan.tickets, first, all};
    body(launch, blocks, args);
    first += blocks;
  });
}

// The squares of eight elements, in float64: those of large gradients are beyond float32.
FK_DEVICE double sum_of_doubles(const float (&x)[8]) {
  double sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
  return sum;
}

}  // namespace

// ---- ascent_norm_

namespace {

// What a tensor has besides, without a mean and with Friendly-SAM's, which is like the weights.
struct WithoutMean {
  uint8_t codes;  // of grads and params, two bits each
};
struct WithMean {
  const void* mean;
  float sigma;
  uint8_t codes;  // of the mean, too
};

template <class Own, size_t kBytes>
struct AscentArguments {
  enum : bool { kHasMeans = std::is_same_v<Own, WithMean> };  // a constant that nobody warns of where it is not read
  static constexpr int kTensors =
      (kBytes - sizeof(Totals) - sizeof(float*)) / (2 * sizeof(void*) + sizeof(float) + sizeof(Own)) - 1;
  Totals total;
  float* norm;
  const void* grads[kTensors];
  const void* params[kTensors];  // null where there is no T_w
  Own own[kTensors];
  float eta[kTensors];
};
template <size_t kBytes>
struct PlainArguments : AscentArguments<WithoutMean, kBytes> {};
template <size_t kBytes>
struct MeanArguments : AscentArguments<WithMean, kBytes> {};

const Walk kAscent = walk_of<PlainArguments>("ascent_norm_", kEights, kSegment, kTotals);
const Walk kMeanAscent = walk_of<MeanArguments>("ascent_norm_", kEights, kSegment, kTotals);

template <class G, class C, bool kWhole, class Args>
FK_DEVICE double sum_ascent(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor, codes = a.own[k].codes;
  const Elements<G> grad(a.grads[k], codes & 3, team.start);
  const Elements<C> param(a.params[k], codes >> 2 & 3, team.start);
  double sum = 0;
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float g[8];
    grad.load(s).values(g);
    if constexpr (Args::kHasMeans) {
      float m[8];
      Elements<C>(a.own[k].mean, codes >> 4, team.start).load(s).values(m);
#pragma unroll
      for (int j = 0; j < 8; ++j) g[j] = math::direction(g[j], m[j], a.own[k].sigma);
    }
    if (a.params[k] != nullptr) {
      float w[8];
      param.load(s).values(w);
#pragma unroll
      for (int j = 0; j < 8; ++j) g[j] = math::ascent_term(w[j], g[j], a.eta[k]);
    }
    sum += sum_of_doubles(g);
  });
  return sum;
}

template <class G, class C, class Args>
__global__ void __launch_bounds__(kShortThreads) ascent_norm_kernel(FK_PARAM(Args) a) {
  FK_SHARED(TotalRoom<1>, room);
  total_norm(a.total, a.norm, room, [&](const Tile& t) {
    return (t.flags & kWhole) != 0 ? sum_ascent<G, C, true>(a, t) : sum_ascent<G, C, false>(a, t);
  });
}

template <class G, class C, template <size_t> class Arguments>
void run(const AscentNorm& a, const Plan& plan, Stream stream) {
  for_each_total<Arguments>(plan, [&](const Launch& launch, unsigned blocks, auto& args) {
    using Args = std::decay_t<decltype(args)>;
    args.norm = a.norm[0].as<float>();
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      const bool adaptive = a.eta[k] >= 0;
      args.grads[i] = a.grads[k].data;
      args.params[i] = adaptive ? a.params[k].data : nullptr;
      args.eta[i] = static_cast<float>(a.eta[k]);
      const DType param = adaptive ? a.params[k].dtype : a.grads[k].dtype;
      args.own[i].codes = static_cast<uint8_t>(code_of(a.grads[k].dtype) | code_of(param) << 2);
      if constexpr (Args::kHasMeans) {
        args.own[i].mean = a.means[k].data;
        args.own[i].sigma = static_cast<float>(a.sigma[k]);
        args.own[i].codes |= static_cast<uint8_t>(code_of(a.means[k].dtype) << 4);
      }
    }
    start(kAscent.op, kernel<ascent_norm_kernel<G, C, Args>>, blocks, launch.threads, stream, args);
  });
}

template <class G, class C>
void run(const AscentNorm& a, const Plan& plan, Stream stream) {
  a.means ? run<G, C, MeanArguments>(a, plan, stream) : run<G, C, PlainArguments>(a, plan, stream);
}

}  // namespace

void ascent_norm_(const AscentNorm& a) {
  const Place place = place_of(kAscent.op, a.grads.size() > 0 ? a.grads : a.norm);
  const auto plan =
      find_plan(a.means ? kMeanAscent : kAscent, {false, false, a.grads, {&a.params, &a.means}, nullptr}, place);
  const Launching launching(*plan);
  if (all_are(DType::kFloat32, {&a.grads, &a.params, &a.means})) {
    run<float, float>(a, *plan, place.stream);
  } else if (all_are(DType::kBFloat16, {&a.grads, &a.params, &a.means})) {
    run<BFloat16, BFloat16>(a, *plan, place.stream);
  } else if (all_are(DType::kBFloat16, {&a.grads}) && all_are(DType::kFloat32, {&a.params, &a.means})) {
    run<BFloat16, float>(a, *plan, place.stream);
  } else {
    run<AnyFloat, AnyFloat>(a, *plan, place.stream);
  }
}

// ---- gradient_norm_

namespace {

template <size_t kBytes>
struct GradientArguments {
  static constexpr int kTensors = (kBytes - sizeof(Totals) - 2 * sizeof(void*) - 2 * sizeof(Scalar)) /
                                      (2 * sizeof(void*) + 2 * sizeof(float) + sizeof(uint8_t)) -
                                  1;
  Totals total;
  float* norm;
  const float* component;
  Scalar grad_scale, clip;
  const void* grads[kTensors];
  const void* clean_grads[kTensors];
  float grad_weight[kTensors], clean_weight[kTensors];
  uint8_t codes[kTensors];
};

const Walk kGradient = walk_of<GradientArguments>("gradient_norm_", kEights, kSegment, kTotals);

template <class T, bool kWhole, class Args>
FK_DEVICE double sum_gradient(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> grad(a.grads[k], a.codes[k] & 3, team.start);
  const Elements<T> clean_grad(a.clean_grads[k], a.codes[k] >> 2, team.start);
  const FinalGradient final(a, k, a.clean_grads[k] != nullptr);
  double sum = 0;
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float g[8], clean[8] = {};
    grad.load(s).values(g);
    if (final.mixes) clean_grad.load(s).values(clean);
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = final.of(g[j], clean[j]);
    sum += sum_of_doubles(g);
  });
  return sum;
}

// Six blocks, where ptxas would take the registers of five for sm_100; the kernel of any type needs more for sm_80.
template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads, std::is_same_v<T, AnyFloat> ? 0 : 6)
    gradient_norm_kernel(FK_PARAM(Args) a) {
  FK_SHARED(TotalRoom<1>, room);
  total_norm(a.total, a.norm, room, [&](const Tile& t) {
    return (t.flags & kWhole) != 0 ? sum_gradient<T, true>(a, t) : sum_gradient<T, false>(a, t);
  });
}

template <class T>
void run(const GradientNorm& a, const Plan& plan, Stream stream) {
  for_each_total<GradientArguments>(plan, [&](const Launch& launch, unsigned blocks, auto& args) {
    args.norm = a.norm[0].as<float>();
    args.component = pointer<float>(&a.component, 0);
    args.grad_scale = scalar_of(a.grad_scale, 1.0f);
    args.clip = {nullptr, 1.0f};
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.grads[i] = a.grads[k].data;
      args.clean_grads[i] = pointer<void>(&a.clean_grads, k);
      args.grad_weight[i] = static_cast<float>(a.grad_weight[k]);
      args.clean_weight[i] = static_cast<float>(a.clean_weight[k]);
      const DType clean = a.clean_grads ? a.clean_grads[k].dtype : a.grads[k].dtype;
      args.codes[i] = static_cast<uint8_t>(code_of(a.grads[k].dtype) | code_of(clean) << 2);
    }
    start(kGradient.op, kernel<gradient_norm_kernel<T, std::decay_t<decltype(args)>>>, blocks, launch.threads, stream,
          args);
  });
}

}  // namespace

void gradient_norm_(const GradientNorm& a) {
  const Place place = place_of(kGradient.op, a.grads.size() > 0 ? a.grads : a.norm);
  const auto plan = find_plan(kGradient, {false, false, a.grads, {&a.clean_grads}, nullptr}, place);
  const Launching launching(*plan);
  with_dtype({&a.grads, &a.clean_grads},
             [&](auto type) { run<typename decltype(type)::Element>(a, *plan, place.stream); });
}

// ---- gradient_products_

namespace {

template <size_t kBytes>
struct ProductArguments {
  static constexpr int kTensors =
      (kBytes - sizeof(Totals) - sizeof(double*)) / (2 * sizeof(void*) + sizeof(uint8_t)) - 1;
  Totals total;
  double* products;
  const void* grads[kTensors];
  const void* clean_grads[kTensors];
  uint8_t codes[kTensors];  // of grads and clean_grads
};

const Walk kProduct = walk_of<ProductArguments>("gradient_products_", kEights, kSegment, kTotals | kProducts);

// A product of two float32 is exact in float64, so that the fma rounds as a product and a sum would.
template <class T, bool kWhole, class Args>
FK_DEVICE void add_products(const Args& a, const Tile& t, double (&sums)[3]) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> grad(a.grads[k], a.codes[k] & 3, team.start);
  const Elements<T> clean_grad(a.clean_grads[k], a.codes[k] >> 2, team.start);
  double of_tile[3] = {};
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float g[8], clean[8];
    grad.load(s).values(g);
    clean_grad.load(s).values(clean);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const double x = clean[j], y = g[j];
      of_tile[0] = __builtin_fma(x, x, of_tile[0]);
      of_tile[1] = __builtin_fma(x, y, of_tile[1]);
      of_tile[2] = __builtin_fma(y, y, of_tile[2]);
    }
  });
#pragma unroll
  for (int i = 0; i < 3; ++i) sums[i] += of_tile[i];
}

template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads) gradient_products_kernel(FK_PARAM(Args) a) {
  FK_SHARED(TotalRoom<3>, room);
  total_sums(
      a.total, room,
      [&](const Tile& t, double (&sums)[3]) {
        (t.flags & kWhole) != 0 ? add_products<T, true>(a, t, sums) : add_products<T, false>(a, t, sums);
      },
      [&](const double (&sums)[3]) {
#pragma unroll
        for (int i = 0; i < 3; ++i) a.products[i] = sums[i];
      });
}

template <class T>
void run(const GradientProducts& a, const Plan& plan, Stream stream) {
  for_each_total<ProductArguments>(plan, [&](const Launch& launch, unsigned blocks, auto& args) {
    args.products = a.products[0].as<double>();
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.grads[i] = a.grads[k].data;
      args.clean_grads[i] = a.clean_grads[k].data;
      args.codes[i] = static_cast<uint8_t>(code_of(a.grads[k].dtype) | code_of(a.clean_grads[k].dtype) << 2);
    }
    start(kProduct.op, kernel<gradient_products_kernel<T, std::decay_t<decltype(args)>>>, blocks, launch.threads,
          stream, args);
  });
}

}  // namespace

void gradient_products_(const GradientProducts& a) {
  const Place place = place_of(kProduct.op, a.grads.size() > 0 ? a.grads : a.products);
  const auto plan = find_plan(kProduct, {false, false, a.grads, {&a.clean_grads}, nullptr}, place);
  const Launching launching(*plan);
  with_dtype({&a.grads, &a.clean_grads},
             [&](auto type) { run<typename decltype(type)::Element>(a, *plan, place.stream); });
}

}  // namespace flatkern::cuda
