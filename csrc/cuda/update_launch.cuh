// From the arguments of an update to its launches, for every rule.
#pragma once

#include "host.cuh"
#include "operations.h"
#include "update.cuh"

namespace flatkern::cuda {

constexpr int kFlatEights = 2;

// A rule, as the host sees it: `Device<Types>` is its struct in a kernel, `Own` its arguments of a tensor.
//   own(k)             those of tensor k
//   state_is(dtype)    whether all of its state is of a dtype, and
//   state_codes(k)     the codes of tensor k's
//   kCountsSteps       blocks are counted off, so that the last one counts the step of a tensor
//   kRowEights         eights that a thread of a block of 256 takes of a row
//   blocks<Types>()    blocks of 256 that a multiprocessor holds: what the registers of a kernel allow
template <class Rule, template <size_t> class Arguments>
class UpdateLauncher {
 public:
  UpdateLauncher(const char* op, const Update& a, const Rule& rule, const Plan& plan, Stream stream)
      : op_(op), a_(a), rule_(rule), plan_(plan), stream_(stream) {}

  // Types that have a kernel of their own; all others share one, which is slower.
  void run() const {
    const bool general =
        a_.history || a_.masks || a_.lrs || a_.sigmas || (a_.noise && a_.clean_grads) || key_of(a_.noise).at != nullptr;
    const DType param = a_.params[0].dtype, clean = this->clean()[0].dtype;
    const bool alike = all_are(param, {&a_.params, &a_.grads, &a_.clean_grads}) && all_are(clean, {&this->clean()}) &&
                       rule_.state_is(clean);
    if (alike && param == DType::kFloat32 && clean == DType::kFloat32) {
      run_kind<float, float>(general);
    } else if (alike && param == DType::kBFloat16 && clean == DType::kFloat32) {
      run_kind<BFloat16, float>(general);
    } else if (alike && param == DType::kBFloat16 && clean == DType::kBFloat16 && !general) {
      run_kind<BFloat16, BFloat16>(false);
    } else {
      launch_all<AnyTypes>();
    }
  }

  const Table& clean() const { return a_.masters ? a_.masters : a_.backups ? a_.backups : a_.params; }

 private:
  using AnyTypes = UpdateTypes<AnyFloat, AnyFloat, AnyFloat, AnyFloat, Kind::kGeneral>;

  template <class P, class C>
  void run_kind(bool general) const {
    if (general) {
      // Not of bfloat16 alone, which goes the way of all other types.
      if constexpr (std::is_same_v<C, float>) launch_all<UpdateTypes<P, P, C, C, Kind::kGeneral>>();
    } else if (a_.noise) {
      launch_all<UpdateTypes<P, P, C, C, Kind::kRolling>>();
    } else {
      launch_all<UpdateTypes<P, P, C, C, Kind::kPlain>>();
    }
  }

  template <class Types>
  void launch_all() const {
    using Device = typename Rule::template Device<Types>;
    for_each_launch<Arguments>(plan_.launches, [&](const Launch& launch, auto& args) {
      using Args = std::decay_t<decltype(args)>;
      fill(args, launch);
      constexpr int kBlocks = Rule::template blocks<Types>();
      constexpr int kEights = Types::kKind == Kind::kPlain ? kFlatEights : Rule::kRowEights;
      auto* chosen = &kernel<update_kernel<Device, Types, kShortThreads, kBlocks, kEights, Args>>;
      // Where nothing is summed by rows none is longer than a segment.
      if constexpr (Types::kHasRows) {
        // In blocks of 1024 threads the general kernel has too few registers to move 16 bytes at a time.
        using Long = std::conditional_t<Types::kGeneral, AnyTypes, Types>;
        using LongDevice = typename Rule::template Device<Long>;
        if (is_long(launch)) chosen = &kernel<update_kernel<LongDevice, Long, kLongThreads, 1, kLongEights, Args>>;
      }
      start(op_, *chosen, launch.count, launch.threads, stream_, args);
    });
  }

  static bool is_long(const Launch& launch) {
    return launch.threads > kShortThreads || launch.eights > Rule::kRowEights;
  }

  template <class Args>
  void fill(Args& args, const Launch& launch) const {
    const bool has_masters = a_.masters.present, perturbs = a_.noise.present;
    const Table& clean = this->clean();
    static_cast<UpdateCall&>(args) = {launch.tiles, plan_.long_rows, plan_.tickets + launch.begin,
                                      plan_.blocks + launch.begin, key_of(a_.noise), numbers_of(a_.lrs, launch.begin),
                                      numbers_of(a_.sigmas, launch.begin), pointer<float>(&a_.component, 0),
                                      scalar_of(a_.grad_scale, 1.0f), scalar_of(a_.clip, 1.0f),
                                      scalar_of(a_.found_inf, 0.0f), perturbs, &clean != &a_.params,
                                      // Without noise a backup has served once it is read.
                                      has_masters || (a_.backups.present && perturbs)};
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      const int64_t i = k - launch.begin;
      args.params[i] = a_.params[k].data;
      args.clean[i] = clean[k].data;
      args.history[i] = pointer<float>(&a_.history, k);
      args.grads[i] = a_.grads[k].data;
      args.clean_grads[i] = pointer<void>(&a_.clean_grads, k);
      args.masks[i] = pointer<uint8_t>(&a_.masks, k);
      args.own[i] = rule_.own(k);
      args.grad_weight[i] = static_cast<float>(a_.grad_weight[k]);
      args.clean_weight[i] = static_cast<float>(a_.clean_weight[k]);
      args.kappa[i] = static_cast<float>(a_.kappa[k]);
      args.beta[i] = static_cast<float>(a_.beta[k]);
      args.sigma[i] = static_cast<float>(a_.sigma[k]);
      args.eta[i] = static_cast<float>(a_.eta[k]);
      args.index[i] = static_cast<uint32_t>(a_.index[k]);
      args.codes[i] = codes(k, clean);
    }
  }

  uint16_t codes(int64_t k, const Table& clean) const {
    const DType clean_grad = a_.clean_grads ? a_.clean_grads[k].dtype : a_.grads[k].dtype;
    return static_cast<uint16_t>(code_of(a_.params[k].dtype) << kParamCode | code_of(clean[k].dtype) << kCleanCode |
                                 code_of(a_.grads[k].dtype) << kGradCode | code_of(clean_grad) << kCleanGradCode |
                                 rule_.state_codes(k));
  }

  const char* op_;
  const Update& a_;
  const Rule& rule_;
  const Plan& plan_;
  Stream stream_;
};

// Starts an update, and the perturbation of those rows that it could only measure.
template <class Rule, template <size_t> class Arguments>
void launch_update(const char* op, const Update& a, const Rule& rule, const Plan& plan, Stream stream) {
  const UpdateLauncher<Rule, Arguments> launcher(op, a, rule, plan, stream);
  launcher.run();
  if (!a.noise || plan.segments.empty()) return;
  const Table& clean = launcher.clean();
  const PerturbLists lists = {&a.params, nullptr, &clean,  nullptr, &a.history,
                              a.sigmas,  a.noise, a.sigma, a.eta,   a.index};
  launch_perturb(op, lists, plan, plan.segments, stream, false);
}

// How updates walk: by filters where something is summed, drawn or kept for each of them.
struct UpdateWalks {
  Walk flat, by_rows;
};
template <class Rule, template <size_t> class Arguments>
constexpr UpdateWalks update_walks(const char* op) {
  constexpr unsigned kCounts = Rule::kCountsSteps ? unsigned{kTotals} : 0u;
  return {walk_of<Arguments>(op, kFlatEights, kSegment, kCounts),
          walk_of<Arguments>(op, Rule::kRowEights, kResident, kCounts | kLongRows)};
}

inline std::shared_ptr<const Plan> find_update_plan(const UpdateWalks& walks, const Update& a,
                                                    std::initializer_list<const Table*> beside, const Place& place) {
  const bool by_rows = a.noise || a.history || a.masks;
  const bool odd_vectors = a.history || a.masks;
  return find_plan(by_rows ? walks.by_rows : walks.flat, {by_rows, odd_vectors, a.params, beside, &a.offset}, place);
}

}  // namespace flatkern::cuda
