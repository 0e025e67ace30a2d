// Adam's and AdamW's rule on the device.
#pragma once

#include "update.cuh"

namespace flatkern::cuda {

struct AdamOwn {
  void *exp_avg, *exp_avg_sq;
  float* step;  // of the device; null where the host has counted, and what follows from the step is in `scalars`
  double lr, weight_decay, log2_beta1, log2_beta2;
  math::AdamScalars scalars;
};

template <class Types>
struct Adam {
  using Own = AdamOwn;
  using State = typename Types::State;
  struct Shared {
    float step_size, correction, decay_factor;
    float inverse;  // of the correction
  };

  static constexpr bool kIsShortOfRegisters = true;

  const Shared& shared;
  bool skip;

  template <class Args>
  FK_DEVICE_MEMBER Adam(const Args& a, uint32_t k, Shared& room) : shared(room), skip(a.found_inf.get() != 0.0f) {
    if (threadIdx.x < 2) count_step(a, k, room);
    __syncthreads();
  }

  // The rule for four neighbours from `first` on.
  template <class Args>
  FK_DEVICE_MEMBER void apply(const Args& a, uint32_t k, int64_t first, float (&w)[4], const float (&g)[4]) const {
    const math::AdamScalars scalars = scalars_of(a, k);
    Quad<State> moments(a.own[k].exp_avg, first), squares(a.own[k].exp_avg_sq, first);
    float m[4], v[4];
    moments.get(m);
    squares.get(v);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = math::adam_moments(w[j], g[j], m[j], v[j], scalars);
    moments.put(m);
    squares.put(v);
    // What is rare is computed for all four again, apart, so that its registers are not needed where it is not.
    float next[4];
    bool rare = shared.inverse == 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) next[j] = math::ordinary_adam_step(w[j], m[j], v[j], scalars, shared.inverse, rare);
    if (rare) {
#pragma unroll
      for (int j = 0; j < 4; ++j) next[j] = forget(math::adam_step(w[j], forget(m[j]), v[j], scalars));  // one by one
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = next[j];
  }

  template <class Args>
  FK_DEVICE_MEMBER void apply_one(const Args& a, uint32_t k, int64_t start, int place, float& w, float g) const {
    const Elements<State> moments(a.own[k].exp_avg, code_of<State>(a, k, kFirstCode), start);
    const Elements<State> squares(a.own[k].exp_avg_sq, code_of<State>(a, k, kSecondCode), start);
    float m = moments.get(place), v = squares.get(place);
    w = math::adam(w, g, m, v, scalars_of(a, k));
    moments.put(place, m);
    squares.put(place, v);
  }

 private:
  template <class Args>
  FK_DEVICE_MEMBER math::AdamScalars scalars_of(const Args& a, uint32_t k) const {
    math::AdamScalars scalars = a.own[k].scalars;
    scalars.step_size = shared.step_size;
    scalars.correction = shared.correction;
    scalars.decay_factor = shared.decay_factor;
    return scalars;
  }

  // Two threads, one for each power of a beta: float64, rounded once. The last block that reads a step advances it.
  template <class Args>
  FK_DEVICE_MEMBER void count_step(const Args& a, uint32_t k, Shared& room) const {
    const AdamOwn& own = a.own[k];
    math::AdamScalars scalars = own.scalars;
    const bool first = threadIdx.x == 0;
    float step = 0.0f;
    if (own.step != nullptr) {
      step = *own.step + 1.0f;
      const double rest = 1.0 - exp2(static_cast<double>(step) * (first ? own.log2_beta1 : own.log2_beta2));
      const double lr = Types::kGeneral ? a.lrs.get(k, own.lr) : own.lr;
      scalars.step_size = static_cast<float>(lr / rest);
      scalars.decay_factor = static_cast<float>(1.0 - lr * own.weight_decay);
      scalars.correction = static_cast<float>(sqrt(rest));
    }
    if (first) {
      room.step_size = scalars.step_size;
      room.decay_factor = scalars.decay_factor;
    } else {
      room.correction = scalars.correction;
      room.inverse = math::ordinary_correction(scalars);
    }
    // Both have read the step before the first one counts the block.
    __syncwarp(3);
    if (!first || own.step == nullptr) return;
    __threadfence();
    const uint32_t readers = a.step_readers[k];
    if (atomicInc(a.step_tickets + k, readers - 1) != readers - 1 || skip) return;
    __threadfence();  // behind what the other blocks have read
    *own.step = step;
  }
};

}  // namespace flatkern::cuda
