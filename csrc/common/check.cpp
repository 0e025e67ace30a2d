// The refusals of check.h. Short texts: flatkern/checks.py says the same at length, with the remedy.
#include "check.h"

#include <cmath>
#include <optional>
#include <string>

#include "../math/mask.h"

namespace flatkern {
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

// Of dense weights.
bool overlap(const View& a, const View& b) {
  const auto end = [](const View& t) { return t.as<char>() + t.numel * (is_float32(t.dtype) ? 4 : 2); };
  return a.numel != 0 && a.as<char>() < end(b) && b.as<char>() < end(a);
}

// The arguments of one call, checked against its first list of full tensors.
class Checker {
 public:
  Checker(DeviceType on, const char* op, const char* name, const Table& like, bool outer)
      : on_(on), op_(op), like_name_(name), like_(like) {
    for (int64_t k = 0; k < like.size(); ++k) {
      const View& t = on_device(name, like, k);
      if (!is_weight(t.dtype)) fail(name, k, "is not float32, float16 or bfloat16");
      if (!t.dense) fail(name, k, "is not dense in memory");
      if (outer && !t.outer) fail(name, k, "does not have dim 0 outermost in memory");
    }
  }

  // Tensors that are only read: they may be those of the first list.
  Checker& weights(const char* name, const Table& list) { return full(name, list, is_weight); }
  // Weights and state that the call keeps there, so that they must not be where the first list is.
  Checker& kept(const char* name, const Table& list) { return full(name, list, is_weight).separate(name, list); }
  Checker& masters(const char* name, const Table& list) { return full(name, list, is_float32).separate(name, list); }

  // One float32 per filter.
  Checker& norms(const char* name, const Table& list) {
    return vectors(name, list, [](const View& t) { return t.rows; });
  }
  // One float32 per filter, per element for tensors of rank <= 1.
  Checker& history(const char* name, const Table& list) {
    return vectors(name, list, [](const View& t) { return t.ndim < 2 ? t.numel : t.rows; });
  }
  // A float32 each: torch keeps them on the CPU unless an optimizer is captured in a CUDA graph.
  Checker& steps(const char* name, const Table& list) {
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k) {
      const View& t = on_device_or_cpu(name, list, k);
      if (t.device != list[0].device) fail(name, k, std::string("is not on the device of ") + name + "[0]");
      if (!is_float32(t.dtype) || t.numel != 1) fail(name, k, "is not one float32");
    }
    return *this;
  }

  // A bit per element of each row, or a byte per element.
  Checker& masks(const char* name, const Table& list) {
    if (!list) return *this;
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k) {
      const View &t = on_device(name, list, k), &like = like_[k];
      if (t.dtype != DType::kUInt8) fail(name, k, "is not uint8");
      const int64_t size = like.ndim < 2 ? like.numel : like.rows * ((like.cols + 7) / 8);
      if (t.numel != size || t.ndim != (like.ndim < 2 ? 1 : 2) || !t.outer || !t.dense)
        fail(name, k, "is not a dense mask of " + std::to_string(size) + " bytes");
    }
    return *this;
  }

  // A 0-dim float32 tensor.
  Checker& scalar(const char* name, const Table& list) {
    if (list) zero_dim(name, on_device(name, list, 0));
    return *this;
  }
  // The same where it is only read.
  Checker& read_scalar(const char* name, const Table& list) {
    if (list) zero_dim(name, on_device_or_cpu(name, list, 0));
    return *this;
  }
  // A few numbers, contiguous.
  Checker& vector(const char* name, const Table& list, DType dtype, int64_t size) {
    const View& t = on_device(name, list, 0);
    if (t.dtype != dtype || t.ndim != 1 || t.numel != size || !t.dense)
      fail(name, 0,
           std::string("is not ") + (is_float32(dtype) ? "float32" : "float64") + " with " + std::to_string(size) +
               " elements");
    return *this;
  }
  // What of the clean gradients enters: q and r.
  Checker& component(const Table& list, const Table& clean_grads) {
    if (!list) return *this;
    if (!clean_grads) throw Mismatch(std::string(op_) + ": component is given, but clean_grads is absent");
    return vector("component", list, DType::kFloat32, 2);
  }
  // A float64 for each tensor, at any stride.
  Checker& numbers(const char* name, const Table& list) {
    if (!list) return *this;
    const View& t = on_device(name, list, 0);
    if (t.dtype != DType::kFloat64 || t.ndim != 1) fail(name, 0, "is not a float64 vector");
    count(name, t.numel);
    return *this;
  }
  Checker& noise(const Table& list, const Ints& index, const Ints& offset) {
    count("index", index.size());
    count("offset", offset.size());
    if (!list) return *this;
    const View& t = on_device_or_cpu("noise", list, 0);
    if (t.dtype != DType::kInt64 || t.numel != 3 || !t.dense) fail("noise", 0, "is not int64 (3,)");
    for (int j = 0; j < 3 && t.device.type == DeviceType::kCpu; ++j)
      if (!word(t.as<int64_t>()[j])) fail("noise", j, "is outside [0, 2^32)");
    for (int64_t k = 0; k < index.size(); ++k)
      if (!word(index[k])) fail("index", k, "is outside [0, 2^32)");
    for (int64_t k = 0; k < offset.size(); ++k)
      if (offset[k] < 0) fail("offset", k, "is negative");
    return *this;
  }

  template <class T>
  Checker& scalars(const char* name, const Array<T>& list) {
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k)
      if (!std::isfinite(static_cast<double>(list[k]))) fail(name, k, "is not finite");
    return *this;
  }

  // Every value of a digit counted, at the level that `prefix` has reached.
  Checker& digits(const Table& counts, const Table& prefix) {
    const View &known = on_device("prefix", prefix, 0), &out = on_device("counts", counts, 0);
    if (known.dtype != DType::kInt64 || known.ndim != 1 || known.numel >= math::kDigits)
      fail("prefix", 0, "is not int64 with fewer than 3 digits");
    if (out.dtype != DType::kInt64 || out.ndim != 1 || !out.dense ||
        out.numel != (int64_t{1} << math::kDigitWidth[known.numel]) + 2)
      fail("counts", 0, "is not int64 with an entry per value of the digit, and two more");
    for (int64_t j = 0; j < known.numel && known.device.type == DeviceType::kCpu; ++j)
      if (known.as<int64_t>()[j * known.strides[0]] >> math::kDigitWidth[j] != 0)
        fail("prefix", j, "is outside the range of its digit");
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

  const View& with_memory(const char* name, const Table& list, int64_t k) const {
    const View& t = list[k];
    if (t.data == nullptr && t.numel != 0) fail(name, k, "has no memory");
    return t;
  }

  // A call's device is that of the first tensor which has to be there.
  const View& on_device(const char* name, const Table& list, int64_t k) {
    const View& t = list[k];
    if (t.device.type != on_) fail(name, k, on_ == DeviceType::kCpu ? "is not on the CPU" : "is not on a CUDA device");
    if (!device_) device_ = t.device;
    if (t.device != *device_) fail(name, k, "is not on CUDA device " + std::to_string(device_->index));
    return with_memory(name, list, k);
  }

  const View& on_device_or_cpu(const char* name, const Table& list, int64_t k) {
    return list[k].device.type == DeviceType::kCpu ? with_memory(name, list, k) : on_device(name, list, k);
  }

  void zero_dim(const char* name, const View& t) const {
    if (!is_float32(t.dtype) || t.ndim != 0) fail(name, 0, "is not a 0-dim float32");
  }

  Checker& full(const char* name, const Table& list, bool (*allowed)(DType)) {
    if (!list) return *this;
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k) {
      const View& t = on_device(name, list, k);
      if (!allowed(t.dtype)) fail(name, k, allowed == is_float32 ? "is not float32" : "is not a float dtype");
      if (!same_layout(t, like_[k])) fail(name, k, std::string("does not have the layout of ") + like_name_);
    }
    return *this;
  }

  Checker& separate(const char* name, const Table& list) {
    for (int64_t k = 0; list && k < list.size(); ++k)
      if (overlap(list[k], like_[k]))
        fail(name, k, std::string("shares memory with ") + like_name_ + "[" + std::to_string(k) + "]");
    return *this;
  }

  template <class Length>
  Checker& vectors(const char* name, const Table& list, Length length) {
    if (!list) return *this;
    count(name, list.size());
    for (int64_t k = 0; k < list.size(); ++k) {
      const View& t = on_device(name, list, k);
      if (!is_float32(t.dtype)) fail(name, k, "is not float32");
      if (t.numel != length(like_[k]) || !t.dense)
        fail(name, k, "is not dense with " + std::to_string(length(like_[k])) + " elements");
    }
    return *this;
  }

  DeviceType on_;
  std::optional<Device> device_;
  const char* op_;
  const char* like_name_;
  const Table& like_;
};

// Everything of an update but its own rule.
Checker check_update(DeviceType on, const char* op, const Update& a) {
  Checker checker(on, op, "params", a.params, a.noise || a.history || a.masks);
  checker.kept("backups", a.backups).masters("masters", a.masters).history("history", a.history);
  checker.weights("grads", a.grads).weights("clean_grads", a.clean_grads).masks("masks", a.masks);
  checker.scalars("kappa", a.kappa).noise(a.noise, a.index, a.offset).component(a.component, a.clean_grads);
  checker.read_scalar("grad_scale", a.grad_scale).read_scalar("clip", a.clip).read_scalar("found_inf", a.found_inf);
  checker.scalars("grad_weight", a.grad_weight).scalars("clean_weight", a.clean_weight).scalars("beta", a.beta);
  checker.scalars("sigma", a.sigma).scalars("eta", a.eta).numbers("lrs", a.lrs).numbers("sigmas", a.sigmas);
  return checker;
}

}  // namespace

void check(const FillNormal& a, DeviceType on) {
  Checker(on, "fill_normal_", "outs", a.outs, true).noise(a.noise, a.index, a.offset);
}

void check(const FilterNorms& a, DeviceType on) {
  Checker(on, "filter_norms_", "params", a.params, true).norms("norms", a.norms);
}

void check(const AscentNorm& a, DeviceType on) {
  Checker checker(on, "ascent_norm_", "grads", a.grads, false);
  checker.scalar("norm", a.norm).weights("params", a.params).weights("means", a.means);
  checker.scalars("eta", a.eta).scalars("sigma", a.sigma);
  for (int64_t k = 0; k < a.eta.size(); ++k)
    if (a.eta[k] >= 0 && !a.params) throw Mismatch("ascent_norm_: params is absent, but eta[k] is not negative");
}

void check(const GradientNorm& a, DeviceType on) {
  Checker checker(on, "gradient_norm_", "grads", a.grads, false);
  checker.scalar("norm", a.norm).weights("clean_grads", a.clean_grads).read_scalar("grad_scale", a.grad_scale);
  checker.scalars("grad_weight", a.grad_weight).scalars("clean_weight", a.clean_weight);
  checker.component(a.component, a.clean_grads);
}

void check(const GradientProducts& a, DeviceType on) {
  Checker(on, "gradient_products_", "grads", a.grads, false)
      .vector("products", a.products, DType::kFloat64, 3)
      .weights("clean_grads", a.clean_grads);
}

void check(const PerturbGaussian& a, DeviceType on) {
  Checker checker(on, "perturb_gaussian_", "params", a.params, true);
  checker.kept("backups", a.backups).masters("masters", a.masters).norms("norms", a.norms);
  checker.history("history", a.history).numbers("sigmas", a.sigmas).noise(a.noise, a.index, a.offset);
  checker.scalars("sigma", a.sigma).scalars("eta", a.eta);
}

void check(const PerturbAscent& a, DeviceType on) {
  Checker checker(on, "perturb_ascent_", "params", a.params, false);
  checker.kept("backups", a.backups).kept("new_means", a.new_means).masters("masters", a.masters);
  checker.weights("grads", a.grads).weights("means", a.means).scalar("norm", a.norm);
  checker.scalars("rho", a.rho).scalars("eta", a.eta).scalars("sigma", a.sigma).scalars("momentum", a.momentum);
  if (a.new_means && !a.means) throw Mismatch("perturb_ascent_: new_means is given, but means is absent");
}

void check(const Restore& a, DeviceType on) {
  Checker(on, "restore_", "params", a.params, false).kept("backups", a.backups);
}

void check(const MixGradients& a, DeviceType on) {
  Checker checker(on, "mix_gradients_", "grads", a.grads, static_cast<bool>(a.history));
  checker.history("history", a.history).kept("outs", a.outs).weights("clean_grads", a.clean_grads);
  checker.component(a.component, a.clean_grads).read_scalar("grad_scale", a.grad_scale).read_scalar("clip", a.clip);
  checker.read_scalar("found_inf", a.found_inf);
  checker.scalars("grad_weight", a.grad_weight).scalars("clean_weight", a.clean_weight).scalars("beta", a.beta);
}

void check(const SgdUpdate& a, DeviceType on) {
  Checker checker = check_update(on, "sgd_update_", a);
  checker.kept("momentum_buffers", a.momentum_buffers).scalars("lr", a.lr).scalars("momentum", a.momentum);
  checker.scalars("dampening", a.dampening).scalars("weight_decay", a.weight_decay).scalars("nesterov", a.nesterov);
}

void check(const AdamUpdate& a, DeviceType on) {
  Checker checker = check_update(on, a.decoupled ? "adamw_update_" : "adam_update_", a);
  checker.kept("exp_avgs", a.exp_avgs).kept("exp_avg_sqs", a.exp_avg_sqs).steps("steps", a.steps);
  checker.scalars("lr", a.lr).scalars("beta1", a.beta1).scalars("beta2", a.beta2).scalars("eps", a.eps);
  checker.scalars("weight_decay", a.weight_decay);
}

void check(const CountMagnitudes& a, DeviceType on) {
  Checker(on, "count_magnitudes_", "grads", a.grads, false).digits(a.counts, a.prefix);
}

void check(const PackMask& a, DeviceType on) {
  Checker(on, "pack_mask_", "grads", a.grads, true).masks("masks", a.masks).scalar("threshold", a.threshold);
}

void check(const Amplify& a, DeviceType on) {
  Checker checker(on, "amplify_", "params", a.params, true);
  checker.weights("previous", a.previous).masks("masks", a.masks).scalars("kappa", a.kappa);
}

}  // namespace flatkern
