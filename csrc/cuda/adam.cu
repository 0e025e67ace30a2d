// Adam and AdamW on CUDA.
#include <cmath>
#include <cstring>

#include "adam.cuh"
#include "update_launch.cuh"

namespace flatkern::cuda {
namespace {

template <size_t kBytes>
struct Arguments : UpdateArguments<AdamOwn, kBytes> {};

// Steps that torch keeps on the host are counted there. Whether they count, the host must then know.
class Steps {
 public:
  Steps(const char* op, const AdamUpdate& a, const Place& place)
      : a_(a), on_host_(steps_are_on_host || !is_on_device(a.steps[0])) {
    if (on_host_ && place.captured)
      throw LaunchError(std::string(op) +
                        ": steps are on the CPU, which a captured graph cannot count; move them beside the parameters");
    if (on_host_ && kDevice != DeviceType::kCpu) {
      check_readable(op, "found_inf", a.found_inf);
      check_readable(op, "lrs", a.lrs);
    }
    counts_ = !on_host_ || !a.found_inf || *a.found_inf[0].as<float>() == 0.0f;
  }

  bool on_host() const { return on_host_; }
  double next(int64_t k) const { return static_cast<double>(*a_.steps[k].as<float>() + 1.0f); }
  void advance() const {
    for (int64_t k = 0; on_host_ && counts_ && k < a_.steps.size(); ++k) *a_.steps[k].as<float>() += 1.0f;
  }

 private:
  static void check_readable(const char* op, const char* name, const Table& t) {
    if (t && is_on_device(t[0]))
      throw Mismatch(std::string(op) + ": steps are on the CPU, but " + name +
                     " is on the device, where the host does not read it; move the steps beside the parameters");
  }

  const AdamUpdate& a_;
  bool on_host_, counts_;
};

struct Rule {
  template <class Types>
  using Device = Adam<Types>;
  static constexpr bool kCountsSteps = true;
  static constexpr int kRowEights = 2;
  template <class Types>
  static constexpr int blocks() {
    return Types::kGeneral ? 4 : 5;
  }

  const AdamUpdate& a;
  const Steps& steps;

  // What tensors of one group share. Its logarithms and powers take the host longer than all the rest of a tensor.
  struct Rates {
    double step, lr, beta1, beta2, eps, weight_decay;
  };
  mutable Rates rates = {};
  mutable AdamOwn of_rates = {};
  mutable bool is_first = true;

  AdamOwn own(int64_t k) const {
    const double lr = a.lrs && steps.on_host() && kDevice == DeviceType::kCpu
                          ? a.lrs[0].as<double>()[k * a.lrs[0].strides[0]]
                          : a.lr[k];
    const double step = steps.on_host() ? steps.next(k) : 1.0;
    const Rates here = {step, lr, a.beta1[k], a.beta2[k], a.eps[k], a.weight_decay[k]};
    if (is_first || std::memcmp(&here, &rates, sizeof here) != 0) find(here);
    AdamOwn own = of_rates;
    own.exp_avg = a.exp_avgs[k].data;
    own.exp_avg_sq = a.exp_avg_sqs[k].data;
    own.step = steps.on_host() ? nullptr : a.steps[k].as<float>();
    return own;
  }
  void find(const Rates& here) const {
    is_first = false;
    rates = here;
    of_rates.lr = here.lr;
    of_rates.weight_decay = here.weight_decay;
    of_rates.log2_beta1 = std::log2(here.beta1);
    of_rates.log2_beta2 = std::log2(here.beta2);
    of_rates.scalars =
        math::adam_scalars(here.step, here.lr, here.beta1, here.beta2, here.eps, here.weight_decay, a.decoupled);
  }
  bool state_is(DType dtype) const { return all_are(dtype, {&a.exp_avgs, &a.exp_avg_sqs}); }
  int state_codes(int64_t k) const {
    return code_of(a.exp_avgs[k].dtype) << kFirstCode | code_of(a.exp_avg_sqs[k].dtype) << kSecondCode;
  }
};

const UpdateWalks kWalks = update_walks<Rule, Arguments>("adam_update_");

}  // namespace

void adam_update_(const AdamUpdate& a) {
  if (a.params.size() == 0) return;
  const char* op = a.decoupled ? "adamw_update_" : "adam_update_";
  const Place place = place_of(op, a.params);
  const Steps steps(op, a, place);
  const auto plan = find_update_plan(
      kWalks, a, {&a.backups, &a.masters, &a.history, &a.grads, &a.clean_grads, &a.exp_avgs, &a.exp_avg_sqs}, place);
  const Launching launching(*plan);
  launch_update<Rule, Arguments>(op, a, Rule{a, steps}, *plan, place.stream);
  steps.advance();
}

}  // namespace flatkern::cuda
