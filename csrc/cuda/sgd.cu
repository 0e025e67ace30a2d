// SGD on CUDA.
#include "sgd.cuh"
#include "update_launch.cuh"

namespace flatkern::cuda {
namespace {

template <size_t kBytes>
struct Arguments : UpdateArguments<SgdOwn, kBytes> {};

struct Rule {
  template <class Types>
  using Device = Sgd<Types>;
  static constexpr bool kCountsSteps = false;
  static constexpr int kRowEights = 4;
  template <class Types>
  static constexpr int blocks() {
    constexpr bool kHasMasters = !std::is_same_v<typename Types::Param, typename Types::Clean>;
    return Types::kGeneral ? 4 : Types::kKind == Kind::kPlain && kHasMasters ? 4 : 5;
  }

  const SgdUpdate& a;

  SgdOwn own(int64_t k) const {
    return {pointer<void>(&a.momentum_buffers, k),
            {static_cast<float>(a.lr[k]), static_cast<float>(a.momentum[k]), static_cast<float>(1 - a.dampening[k]),
             static_cast<float>(a.weight_decay[k]), a.nesterov[k]}};
  }
  bool state_is(DType dtype) const { return all_are(dtype, {&a.momentum_buffers}); }
  int state_codes(int64_t k) const {
    return a.momentum_buffers ? code_of(a.momentum_buffers[k].dtype) << kFirstCode : 0;
  }
};

const UpdateWalks kWalks = update_walks<Rule, Arguments>("sgd_update_");

}  // namespace

void sgd_update_(const SgdUpdate& a) {
  if (a.params.size() == 0) return;
  const Place place = place_of("sgd_update_", a.params);
  const auto plan = find_update_plan(
      kWalks, a, {&a.backups, &a.masters, &a.history, &a.grads, &a.clean_grads, &a.momentum_buffers}, place);
  const Launching launching(*plan);
  launch_update<Rule, Arguments>("sgd_update_", a, Rule{a}, *plan, place.stream);
}

}  // namespace flatkern::cuda
