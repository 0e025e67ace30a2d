// The refusals of check.h. Short texts: flatkern/checks.py says the same at length, with the remedy.
#include "check.h"

#include <cmath>
#include <string>

#include "../math/mask.h"

namespace flatkern::cpu {
namespace {

bool is_weight(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

bool is_float32(DType dtype) { return dtype == DType::kFloat32; }

bool same_layout(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d] && a.numel != 0) return false;
  }
  return true;
}

// The arguments of one call, checked against its first list of full tensors.
class Checker {
 public:
  Checker(const char* op, const char* name, const Table& like, bool outer) : op_(op), like_name_(name), like_(like) {
    for (int64_t k = 0; k < like.size(); ++k) {
      const View& t = memory(name, like, k);
      if (!is_weight(t.dtype)) fail(name, k, "is not float32, float16 or bfloat16");
      if (!t.dense) fail(name, k, "is not dense in memory");
      if (outer && !t.outer) fail(name, k, "does not have dim 0 outermost in memory");
    }
  }

  const Checker& weights(const char* name, const Table& list) const { return full(name, list, is_weight); }
  const Checker& masters(const char* name, const Table& list) const { return full(name, list, is_float32); }

  // One float32 per filter.
  const Checker& norms(const char* name, const Table& list) const {
    return vectors(name, list, [](const View& t) { return t.rows; });
  }
  // One float32 per filter, per element for tensors of rank <= 1.
  const Checker& history(const char* name, const Table& list) const {
    return vectors(name, list, [](const View& t) { return t.ndim < 2 ? t.numel : t.rows; });
  }
  const Checker& steps(const char* name, const Table& list) const {
    return vectors(name, list, [](const View&) { return int64_t{1}; });
  }

  // A bit per element of each row, or a byte per element.
  const Checker& masks(const char* name, const Table& list) const {
    if (!list) return *this;
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k) {
      const View &t = memory(name, list, k), &like = like_[k];
      if (t.dtype != DType::kUInt8) fail(name, k, "is not uint8");
      const int64_t size = like.ndim < 2 ? like.numel : like.rows * ((like.cols + 7) / 8);
      if (t.numel != size || t.ndim != (like.ndim < 2 ? 1 : 2) || !t.outer || !t.dense)
        fail(name, k, "is not a dense mask of " + std::to_string(size) + " bytes");
    }
    return *this;
  }

  // A 0-dim float32 tensor.
  const Checker& scalar(const char* name, const Table& list) const {
    if (!list) return *this;
    const View& t = memory(name, list, 0);
    if (!is_float32(t.dtype) || t.ndim != 0) fail(name, 0, "is not a 0-dim float32");
    return *this;
  }
  // A float64 for each tensor, at any stride.
  const Checker& numbers(const char* name, const Table& list) const {
    if (!list) return *this;
    const View& t = memory(name, list, 0);
    if (t.dtype != DType::kFloat64 || t.ndim != 1) fail(name, 0, "is not a float64 vector");
    count(name, t.numel);
    return *this;
  }
  const Checker& noise(const Table& list, const Ints& index, const Ints& offset) const {
    count("index", index.size());
    count("offset", offset.size());
    if (!list) return *this;
    const View& t = memory("noise", list, 0);
    if (t.dtype != DType::kInt64 || t.numel != 3 || !t.dense) fail("noise", 0, "is not int64 (3,)");
    for (int j = 0; j < 3; ++j)
      if (!word(t.as<int64_t>()[j])) fail("noise", j, "is outside [0, 2^32)");
    for (int64_t k = 0; k < index.size(); ++k)
      if (!word(index[k])) fail("index", k, "is outside [0, 2^32)");
    for (int64_t k = 0; k < offset.size(); ++k)
      if (offset[k] < 0) fail("offset", k, "is negative");
    return *this;
  }

  template <class T>
  const Checker& scalars(const char* name, const Array<T>& list) const {
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k)
      if (!std::isfinite(static_cast<double>(list[k]))) fail(name, k, "is not finite");
    return *this;
  }

 private:
  [[noreturn]] void fail(const char* name, int64_t k, const std::string& what) const {
    throw Mismatch(std::string(op_) + ": " + name + "[" + std::to_string(k) + "] " + what);
  }

  static bool word(int64_t x) { return x >= 0 && x < (int64_t{1} << 32); }

  void count(const char* name, int64_t size) const {
    if (size != like_.size())
      throw Mismatch(std::string(op_) + ": " + name + " has " + std::to_string(size) + " entries, but " + like_name_ +
                     " has " + std::to_string(like_.size()));
  }

  const View& memory(const char* name, const Table& list, int64_t k) const {
    const View& t = list[k];
    if (!t.on_cpu) fail(name, k, "is not on the CPU");
    if (t.data == nullptr && t.numel != 0) fail(name, k, "has no memory");
    return t;
  }

  const Checker& full(const char* name, const Table& list, bool (*allowed)(DType)) const {
    if (!list) return *this;
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k) {
      const View& t = memory(name, list, k);
      if (!allowed(t.dtype)) fail(name, k, allowed == is_float32 ? "is not float32" : "is not a float dtype");
      if (!same_layout(t, like_[k])) fail(name, k, std::string("does not have the layout of ") + like_name_);
    }
    return *this;
  }

  template <class Length>
  const Checker& vectors(const char* name, const Table& list, Length length) const {
    if (!list) return *this;
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k) {
      const View& t = memory(name, list, k);
      if (!is_float32(t.dtype)) fail(name, k, "is not float32");
      if (t.numel != length(like_[k]) || !t.dense)
        fail(name, k, "is not dense with " + std::to_string(length(like_[k])) + " elements");
    }
    return *this;
  }

  const char* op_;
  const char* like_name_;
  const Table& like_;
};

// Everything of an update but its own rule.
Checker check_update(const char* op, const Update& a) {
  const Checker checker(op, "params", a.params, a.noise || a.history || a.masks);
  checker.weights("backups", a.backups).masters("masters", a.masters).history("history", a.history);
  checker.weights("grads", a.grads).weights("clean_grads", a.clean_grads).masks("masks", a.masks);
  checker.scalars("kappa", a.kappa).noise(a.noise, a.index, a.offset);
  checker.scalar("grad_scale", a.grad_scale).scalar("clip", a.clip).scalar("found_inf", a.found_inf);
  checker.scalars("grad_weight", a.grad_weight).scalars("clean_weight", a.clean_weight).scalars("beta", a.beta);
  checker.scalars("sigma", a.sigma).scalars("eta", a.eta).numbers("lrs", a.lrs).numbers("sigmas", a.sigmas);
  return checker;
}

}  // namespace

void check(const FillNormal& a) { Checker("fill_normal_", "outs", a.outs, true).noise(a.noise, a.index, a.offset); }

void check(const FilterNorms& a) { Checker("filter_norms_", "params", a.params, true).norms("norms", a.norms); }

void check(const AscentNorm& a) {
  const Checker checker("ascent_norm_", "grads", a.grads, false);
  checker.scalar("norm", a.norm).weights("params", a.params).scalars("eta", a.eta);
  for (int64_t k = 0; k < a.eta.size(); ++k)
    if (a.eta[k] >= 0 && !a.params) throw Mismatch("ascent_norm_: params is absent, but eta[k] is not negative");
}

void check(const GradientNorm& a) {
  const Checker checker("gradient_norm_", "grads", a.grads, false);
  checker.scalar("norm", a.norm).weights("clean_grads", a.clean_grads).scalar("grad_scale", a.grad_scale);
  checker.scalars("grad_weight", a.grad_weight).scalars("clean_weight", a.clean_weight);
}

void check(const PerturbGaussian& a) {
  const Checker checker("perturb_gaussian_", "params", a.params, true);
  checker.weights("backups", a.backups).masters("masters", a.masters).norms("norms", a.norms);
  checker.history("history", a.history).numbers("sigmas", a.sigmas).noise(a.noise, a.index, a.offset);
  checker.scalars("sigma", a.sigma).scalars("eta", a.eta);
}

void check(const PerturbAscent& a) {
  const Checker checker("perturb_ascent_", "params", a.params, false);
  checker.weights("backups", a.backups).masters("masters", a.masters).weights("grads", a.grads);
  checker.scalar("norm", a.norm).scalars("rho", a.rho).scalars("eta", a.eta);
}

void check(const Restore& a) { Checker("restore_", "params", a.params, false).weights("backups", a.backups); }

void check(const MixGradients& a) {
  const Checker checker("mix_gradients_", "grads", a.grads, static_cast<bool>(a.history));
  checker.history("history", a.history).weights("clean_grads", a.clean_grads);
  checker.scalar("grad_scale", a.grad_scale).scalar("clip", a.clip);
  checker.scalars("grad_weight", a.grad_weight).scalars("clean_weight", a.clean_weight).scalars("beta", a.beta);
}

void check(const SgdUpdate& a) {
  const Checker checker = check_update("sgd_update_", a);
  checker.weights("momentum_buffers", a.momentum_buffers).scalars("lr", a.lr).scalars("momentum", a.momentum);
  checker.scalars("dampening", a.dampening).scalars("weight_decay", a.weight_decay).scalars("nesterov", a.nesterov);
}

void check(const AdamUpdate& a) {
  const Checker checker = check_update(a.decoupled ? "adamw_update_" : "adam_update_", a);
  checker.weights("exp_avgs", a.exp_avgs).weights("exp_avg_sqs", a.exp_avg_sqs).steps("steps", a.steps);
  checker.scalars("lr", a.lr).scalars("beta1", a.beta1).scalars("beta2", a.beta2).scalars("eps", a.eps);
  checker.scalars("weight_decay", a.weight_decay);
}

void check(const CountMagnitudes& a) {
  const Checker checker("count_magnitudes_", "grads", a.grads, false);
  const View &prefix = a.prefix[0], &counts = a.counts[0];
  if (!prefix.on_cpu || prefix.dtype != DType::kInt64 || prefix.ndim != 1 || prefix.numel >= math::kDigits)
    throw Mismatch("count_magnitudes_: prefix is not int64 with fewer than 3 digits");
  if (!counts.on_cpu || counts.dtype != DType::kInt64 || counts.ndim != 1 || !counts.dense ||
      counts.numel != (int64_t{1} << math::kDigitWidth[prefix.numel]) + 2)
    throw Mismatch("count_magnitudes_: counts is not int64 with an entry per value of the digit, and two more");
}

void check(const PackMask& a) {
  Checker("pack_mask_", "grads", a.grads, true).masks("masks", a.masks).scalar("threshold", a.threshold);
}

void check(const Amplify& a) {
  const Checker checker("amplify_", "params", a.params, true);
  checker.weights("previous", a.previous).masks("masks", a.masks).scalars("kappa", a.kappa);
}

}  // namespace flatkern::cpu
