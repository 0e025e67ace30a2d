// SGD's rule on the device.
#pragma once

#include "update.cuh"

namespace flatkern::cuda {

struct SgdOwn {
  void* momentum_buffer;
  math::SgdScalars scalars;
};

template <class Types>
struct Sgd {
  using Own = SgdOwn;
  using State = typename Types::State;
  struct Shared {};
  static constexpr bool kIsShortOfRegisters = false;

  bool skip;

  template <class Args>
  FK_DEVICE_MEMBER Sgd(const Args& a, uint32_t, Shared&) : skip(a.found_inf.get() != 0.0f) {}

  // The rule for four neighbours from `first` on.
  template <class Args>
  FK_DEVICE_MEMBER void apply(const Args& a, uint32_t k, int64_t first, float (&w)[4], const float (&g)[4]) const {
    const math::SgdScalars scalars = scalars_of(a, k);
    if (a.own[k].momentum_buffer == nullptr) {
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = math::sgd(w[j], g[j], scalars);
      return;
    }
    Quad<State> buffer(a.own[k].momentum_buffer, first);
    float v[4];
    buffer.get(v);
    if (scalars.nesterov) {
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = math::sgd(w[j], g[j], v[j], with_nesterov(scalars, true));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = math::sgd(w[j], g[j], v[j], with_nesterov(scalars, false));
    }
    buffer.put(v);
  }

  template <class Args>
  FK_DEVICE_MEMBER void apply_one(const Args& a, uint32_t k, int64_t start, int place, float& w, float g) const {
    const math::SgdScalars scalars = scalars_of(a, k);
    if (a.own[k].momentum_buffer == nullptr) {
      w = math::sgd(w, g, scalars);
      return;
    }
    const Elements<State> buffers = buffers_of(a, k, start);
    float v = buffers.get(place);
    w = math::sgd(w, g, v, scalars);
    buffers.put(place, v);
  }

 private:
  // A selection would compute both for every element.
  FK_DEVICE_MEMBER static math::SgdScalars with_nesterov(math::SgdScalars scalars, bool nesterov) {
    scalars.nesterov = nesterov;
    return scalars;
  }

  template <class Args>
  FK_DEVICE_MEMBER static math::SgdScalars scalars_of(const Args& a, uint32_t k) {
    math::SgdScalars scalars = a.own[k].scalars;
    if (Types::kGeneral) scalars.lr = static_cast<float>(a.lrs.get(k, scalars.lr));
    return scalars;
  }
  template <class Args>
  FK_DEVICE_MEMBER static Elements<State> buffers_of(const Args& a, uint32_t k, int64_t start) {
    return {a.own[k].momentum_buffer, code_of<State>(a, k, kFirstCode), start};
  }
};

}  // namespace flatkern::cuda
