// The perturb family on CUDA: perturb_gaussian_, perturb_ascent_, restore_.
#include "host.cuh"
#include "operations.h"
#include "perturb.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kEights = 3;

const Walk kPerturb = walk_of<PerturbArguments>("perturb_gaussian_", kEights, kResident, kLongRows);

template <class Args>
void fill(Args& a, const PerturbLists& lists, const Plan& plan, const Launch& launch, bool measures) {
  static_cast<PerturbCall&>(a) = {launch.tiles, plan.long_rows, key_of(lists.noise),
                                  numbers_of(lists.sigmas, launch.begin), measures};
  for (int64_t k = launch.begin; k < launch.end; ++k) {
    const int64_t i = k - launch.begin;
    const View &param = (*lists.params)[k], &clean = (*lists.clean)[k];
    a.params[i] = param.data;
    a.clean[i] = clean.data;
    a.backups[i] = pointer<void>(lists.backups, k);
    a.norms[i] = pointer<float>(lists.norms, k);
    a.history[i] = pointer<float>(lists.history, k);
    a.sigma[i] = static_cast<float>(lists.sigma[k]);
    a.eta[i] = static_cast<float>(lists.eta[k]);
    a.index[i] = static_cast<uint32_t>(lists.index[k]);
    const DType backup = a.backups[i] != nullptr ? (*lists.backups)[k].dtype : param.dtype;
    a.codes[i] = static_cast<uint16_t>(code_of(param.dtype) | code_of(backup) << 2 | code_of(clean.dtype) << 4);
  }
}

template <class P, class C, int kBlocks>
void run(const char* op, const PerturbLists& lists, const Plan& plan, const std::vector<Launch>& launches,
         Stream stream, bool measures) {
  using Types = PerturbTypes<P, C>;
  for_each_launch<PerturbArguments>(launches, [&](const Launch& launch, auto& args) {
    using Args = std::decay_t<decltype(args)>;
    fill(args, lists, plan, launch, measures);
    start(op,
          launch.eights == kEights ? kernel<perturb_kernel<Types, kShortThreads, kBlocks, kEights, Args>>
                                   : kernel<perturb_kernel<Types, kLongThreads, 1, kLongEights, Args>>,
          launch.count, launch.threads, stream, args);
  });
}

}  // namespace

void launch_perturb(const char* op, const PerturbLists& lists, const Plan& plan, const std::vector<Launch>& launches,
                    Stream stream, bool measures) {
  const bool has_history = lists.history != nullptr && *lists.history;
  const bool has_copy = lists.clean != lists.params, has_backups = lists.backups != nullptr && *lists.backups;
  const bool plain = !has_history && key_of(lists.noise).at == nullptr && !lists.sigmas && !(has_copy && has_backups);
  const Table& backups = has_backups ? *lists.backups : *lists.params;
  if (plain && all_are(DType::kFloat32, {lists.params, &backups, lists.clean})) {
    run<float, float, 5>(op, lists, plan, launches, stream, measures);
  } else if (plain && all_are(DType::kBFloat16, {lists.params, &backups, lists.clean})) {
    run<BFloat16, BFloat16, 4>(op, lists, plan, launches, stream, measures);
  } else if (plain && all_are(DType::kBFloat16, {lists.params}) && all_are(DType::kFloat32, {lists.clean})) {
    run<BFloat16, float, 4>(op, lists, plan, launches, stream, measures);
  } else {
    run<AnyFloat, AnyFloat, 4>(op, lists, plan, launches, stream, measures);
  }
}

void perturb_gaussian_(const PerturbGaussian& a) {
  if (a.params.size() == 0) return;
  const Place place = place_of(kPerturb.op, a.params);
  const Table& clean = a.masters ? a.masters : a.params;
  const auto plan =
      find_plan(kPerturb, {true, a.history.present, a.params, {&a.backups, &a.masters, &a.history}, &a.offset}, place);
  const PerturbLists lists = {&a.params, &a.backups, &clean,  &a.norms, &a.history,
                              a.sigmas,  a.noise,    a.sigma, a.eta,    a.index};
  const bool measures = !a.norms && !plan->segments.empty();
  const Launching launching(*plan);
  launch_perturb(kPerturb.op, lists, *plan, plan->launches, place.stream, measures);
  if (measures) launch_perturb(kPerturb.op, lists, *plan, plan->segments, place.stream, false);
}

// ---- perturb_ascent_

namespace {

// What a tensor has besides, without a mean and with Friendly-SAM's, which is like the clean weights.
struct WithoutMean {
  uint8_t codes;  // of params, backups, clean, grads; two bits each
};
struct WithMean {
  const void* mean;
  void* new_mean;  // null where it stays
  float sigma, momentum, one_minus_momentum;
  uint16_t codes;  // of mean and new_mean, too
};

template <class Own, size_t kBytes>
struct AscentArguments {
  enum : bool { kHasMeans = std::is_same_v<Own, WithMean> };  // a constant that nobody warns of where it is not read
  static constexpr int kTensors =
      (kBytes - 2 * sizeof(void*)) / (4 * sizeof(void*) + 2 * sizeof(float) + sizeof(Own)) - 1;
  const Tile* tiles;
  const float* norm;
  void* params[kTensors];
  void* backups[kTensors];
  const void* clean[kTensors];
  const void* grads[kTensors];
  Own own[kTensors];
  float rho[kTensors], eta[kTensors];
};
template <size_t kBytes>
struct PlainArguments : AscentArguments<WithoutMean, kBytes> {};
template <size_t kBytes>
struct MeanArguments : AscentArguments<WithMean, kBytes> {};

constexpr int kAscentEights = 4;
const Walk kAscent = walk_of<PlainArguments>("perturb_ascent_", kAscentEights, kSegment);
const Walk kMeanAscent = walk_of<MeanArguments>("perturb_ascent_", kAscentEights, kSegment);

// g becomes d = g - sigma m, and the mean is renewed, or stays where the norm is not finite.
template <class C, bool kWhole, class S>
FK_DEVICE void take_mean(const WithMean& own, const Team<kWhole>& team, const S& s, bool finite, float (&g)[8]) {
  const Elements<C> mean(own.mean, own.codes >> 8 & 3, team.start);
  float m[8];
  mean.load(s).values(m);
  if (own.new_mean != nullptr) {
    const Elements<C> new_mean(own.new_mean, own.codes >> 10, team.start);
    float next[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      next[j] = finite ? math::new_mean(m[j], g[j], own.momentum, own.one_minus_momentum) : m[j];
    new_mean.store(s, new_mean.rounded(next));
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) g[j] = math::direction(g[j], m[j], own.sigma);
}

template <class Types, bool kWhole, class Args>
FK_DEVICE void ascend_tile(const Args& a, const Tile& t) {
  using P = typename Types::Param;
  using C = typename Types::Clean;
  constexpr bool kGeneral = std::is_same_v<P, AnyFloat>;
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor, codes = a.own[k].codes;
  const Elements<P> param(a.params[k], codes & 3, team.start);
  const Elements<C> clean(a.clean[k], codes >> 4 & 3, team.start);
  const Elements<P> grad(a.grads[k], codes >> 6 & 3, team.start);  // of the parameter's dtype, unless it has any
  const Elements<P> backup(a.backups[k], codes >> 2 & 3, team.start);
  const float norm = *a.norm, scale = math::ascent_scale(a.rho[k], norm), eta = a.eta[k];
  const auto ascend = [&](auto adaptive) {
    for_each_eight_in_turn<kAscentEights>(team, [&](int, const auto& s) {
      const auto weights = clean.load(s);
      float w[8], g[8];
      weights.values(w);
      grad.load(s).values(g);
      if (a.backups[k] != nullptr) {
        if constexpr (kGeneral) {
          backup.store(s, param.load(s));
        } else if constexpr (std::is_same_v<P, C>) {
          backup.store(s, weights);
        }
      }
      if constexpr (Args::kHasMeans) take_mean<C>(a.own[k], team, s, math::is_finite(norm), g);
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] = math::perturb_ascent(w[j], g[j], scale, eta, decltype(adaptive)::value);
      param.template store<Use::kAgain>(s, param.rounded(w));
    });
  };
  eta >= 0.0f ? ascend(std::true_type()) : ascend(std::false_type());
}

// With means four blocks, where ptxas would take the registers of three for sm_80.
template <class Types, class Args>
__global__ void __launch_bounds__(kShortThreads, Args::kHasMeans ? 4 : 0) ascent_kernel(FK_PARAM(Args) a) {
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    ascend_tile<Types, true>(a, t);
  } else {
    ascend_tile<Types, false>(a, t);
  }
}

template <class P, class C, template <size_t> class Arguments>
void run_ascent(const PerturbAscent& a, const Plan& plan, Stream stream) {
  const Table& clean = a.masters ? a.masters : a.params;
  for_each_launch<Arguments>(plan.launches, [&](const Launch& launch, auto& args) {
    using Args = std::decay_t<decltype(args)>;
    args.tiles = launch.tiles;
    args.norm = a.norm[0].as<float>();
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.params[i] = a.params[k].data;
      args.backups[i] = pointer<void>(&a.backups, k);
      args.clean[i] = clean[k].data;
      args.grads[i] = a.grads[k].data;
      args.rho[i] = static_cast<float>(a.rho[k]);
      args.eta[i] = a.eta[k] >= 0 ? static_cast<float>(a.eta[k]) : -1.0f;
      const DType backup = a.backups ? a.backups[k].dtype : a.params[k].dtype;
      const int codes = code_of(a.params[k].dtype) | code_of(backup) << 2 | code_of(clean[k].dtype) << 4 |
                        code_of(a.grads[k].dtype) << 6;
      if constexpr (Args::kHasMeans) {
        const DType new_mean = a.new_means ? a.new_means[k].dtype : a.means[k].dtype;
        args.own[i] = {a.means[k].data,
                       pointer<void>(&a.new_means, k),
                       static_cast<float>(a.sigma[k]),
                       static_cast<float>(a.momentum[k]),
                       static_cast<float>(1 - a.momentum[k]),
                       static_cast<uint16_t>(codes | code_of(a.means[k].dtype) << 8 | code_of(new_mean) << 10)};
      } else {
        args.own[i].codes = static_cast<uint8_t>(codes);
      }
    }
    start(kAscent.op, kernel<ascent_kernel<PerturbTypes<P, C>, Args>>, launch.count, launch.threads, stream, args);
  });
}

template <class P, class C>
void run_ascent(const PerturbAscent& a, const Plan& plan, Stream stream) {
  a.means ? run_ascent<P, C, MeanArguments>(a, plan, stream) : run_ascent<P, C, PlainArguments>(a, plan, stream);
}

}  // namespace

void perturb_ascent_(const PerturbAscent& a) {
  if (a.params.size() == 0) return;
  const Place place = place_of(kAscent.op, a.params);
  const auto plan =
      find_plan(a.means ? kMeanAscent : kAscent,
                {false, false, a.params, {&a.backups, &a.new_means, &a.masters, &a.grads, &a.means}, nullptr}, place);
  const Launching launching(*plan);
  const auto are = [&](DType dtype) { return all_are(dtype, {&a.params, &a.backups, &a.grads}); };
  const auto clean_are = [&](DType dtype) { return all_are(dtype, {&a.masters, &a.means, &a.new_means}); };
  // What has both keeps a copy of the perturbed weights, which is rare.
  const bool has_both = a.masters && a.backups;
  if (!has_both && are(DType::kFloat32) && clean_are(DType::kFloat32)) {
    run_ascent<float, float>(a, *plan, place.stream);
  } else if (!has_both && are(DType::kBFloat16) && !a.masters && clean_are(DType::kBFloat16)) {
    run_ascent<BFloat16, BFloat16>(a, *plan, place.stream);
  } else if (!has_both && are(DType::kBFloat16) && a.masters && clean_are(DType::kFloat32)) {
    run_ascent<BFloat16, float>(a, *plan, place.stream);
  } else {
    run_ascent<AnyFloat, AnyFloat>(a, *plan, place.stream);
  }
}

// ---- restore_

namespace {

template <size_t kBytes>
struct RestoreArguments {
  static constexpr int kTensors = (kBytes - sizeof(void*)) / (2 * sizeof(void*) + 1) - 1;
  const Tile* tiles;
  void* params[kTensors];
  const void* backups[kTensors];
  uint8_t codes[kTensors];  // of params and backups
};

constexpr int kRestoreEights = 4;
const Walk kRestore = walk_of<RestoreArguments>("restore_", kRestoreEights, kSegment);

template <class T, bool kWhole, class Args>
FK_DEVICE void restore_tile(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const uint32_t k = t.tensor;
  const Elements<T> param(a.params[k], a.codes[k] & 3, team.start), backup(a.backups[k], a.codes[k] >> 2, team.start);
  typename Elements<T>::Stored stored[kRestoreEights];
  for_each_eight<kRestoreEights>(team, [&](int i, const auto& s) { stored[i] = backup.load(s); });
  for_each_eight<kRestoreEights>(team, [&](int i, const auto& s) { param.template store<Use::kAgain>(s, stored[i]); });
}

template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads) restore_kernel(FK_PARAM(Args) a) {
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    restore_tile<T, true>(a, t);
  } else {
    restore_tile<T, false>(a, t);
  }
}

template <class T>
void run_restore(const Restore& a, const Plan& plan, Stream stream) {
  for_each_launch<RestoreArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    args.tiles = launch.tiles;
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.params[i] = a.params[k].data;
      args.backups[i] = a.backups[k].data;
      args.codes[i] = static_cast<uint8_t>(code_of(a.params[k].dtype) | code_of(a.backups[k].dtype) << 2);
    }
    start(kRestore.op, kernel<restore_kernel<T, std::decay_t<decltype(args)>>>, launch.count, launch.threads, stream,
          args);
  });
}

}  // namespace

void restore_(const Restore& a) {
  if (a.params.size() == 0) return;
  const Place place = place_of(kRestore.op, a.params);
  const auto plan = find_plan(kRestore, {false, false, a.params, {&a.backups}, nullptr}, place);
  const Launching launching(*plan);
  // What is equal is moved as it is, whatever it means.
  if (all_are(DType::kFloat32, {&a.params, &a.backups})) {
    run_restore<float>(a, *plan, place.stream);
  } else if (all_are(DType::kBFloat16, {&a.params, &a.backups}) || all_are(DType::kFloat16, {&a.params, &a.backups})) {
    run_restore<BFloat16>(a, *plan, place.stream);
  } else {
    run_restore<AnyFloat>(a, *plan, place.stream);
  }
}

}  // namespace flatkern::cuda
