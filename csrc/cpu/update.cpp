// The update family on the CPU: SGD, Adam and AdamW with what a method wraps around them, and mix_gradients_.
#include "../math/update.h"

#include "../math/mask.h"
#include "bits.h"
#include "gradient.h"
#include "normals.h"

namespace flatkern::cpu::FK_ISA {
namespace {

// What happens to a rule's new weight w, given the previous one.
struct StoreResult {
  float* out;
  FK_INLINE void operator()(int64_t i, float, float w) const { out[i] = w; }
};
struct StoreAmplified {
  float* out;
  const uint8_t* flags;
  float kappa;
  FK_INLINE void operator()(int64_t i, float previous, float w) const {
    out[i] = flags[i] ? math::amplified(w, previous, kappa) : w;
  }
};

struct Sgd {
  static constexpr bool kWaitsForMemory = true;

  const SgdUpdate& a;
  Numbers lr = {a.lr, a.lrs};

  void prefetch(const Block& b, Prefetcher& prefetcher) const {
    if (a.momentum_buffers) prefetcher.add_before_load(a.momentum_buffers[b.k], b);
  }

  template <class Gradient, class Out, class Step>
  void apply(const Block& b, const float* w, const Gradient& g, const Out& out, const Step& step,
             Scratch& scratch) const {
    const math::SgdScalars s = {static_cast<float>(lr[b.k]), static_cast<float>(a.momentum[b.k]),
                                static_cast<float>(1 - a.dampening[b.k]), static_cast<float>(a.weight_decay[b.k]),
                                a.nesterov[b.k]};
    if (!a.momentum_buffers) {
      FK_SIMD
      for (int64_t i = 0; i < b.n; ++i) out(i, w[i], math::sgd(w[i], g(i), s));
      return;
    }
    float* v = load(a.momentum_buffers[b.k], b.begin, b.n, scratch.v);
    for_each_part(b.n, step, [&](int64_t begin, int64_t end) {
      FK_SIMD
      for (int64_t i = begin; i < end; ++i) out(i, w[i], math::sgd(w[i], g(i), v[i], s));
    });
    store(a.momentum_buffers[b.k], b.begin, b.n, v);
  }
};

struct Adam {
  // Its divisions leave the hardware prefetchers enough time, unless normals are drawn meanwhile.
  static constexpr bool kWaitsForMemory = false;

  const AdamUpdate& a;
  Numbers lr = {a.lr, a.lrs};
  Array<math::AdamScalars> scalars;  // one per tensor

  void prefetch(const Block& b, Prefetcher& prefetcher) const {
    prefetcher.add_before_load(a.exp_avgs[b.k], b);
    prefetcher.add_before_load(a.exp_avg_sqs[b.k], b);
  }

  explicit Adam(const AdamUpdate& args) : a(args), scalars(args.params.size()) {}

  // Advances every step and computes what depends on it.
  void advance() {
    int64_t last = -1;
    for (int64_t k = 0; k < a.params.size(); ++k) {
      float& step = *a.steps[k].as<float>();
      step += 1.0f;
      // Powers are slow, and usually all tensors share them.
      const bool same = last >= 0 && step == *a.steps[last].as<float>() && lr[k] == lr[last] &&
                        a.beta1[k] == a.beta1[last] && a.beta2[k] == a.beta2[last] && a.eps[k] == a.eps[last] &&
                        a.weight_decay[k] == a.weight_decay[last];
      scalars[k] =
          same ? scalars[last]
               : math::adam_scalars(step, lr[k], a.beta1[k], a.beta2[k], a.eps[k], a.weight_decay[k], a.decoupled);
      last = k;
    }
  }

  template <class Gradient, class Out, class Step>
  void apply(const Block& b, const float* w, const Gradient& g, const Out& out, const Step& step,
             Scratch& scratch) const {
    const math::AdamScalars s = scalars[b.k];
    float* m = load(a.exp_avgs[b.k], b.begin, b.n, scratch.m);
    float* v = load(a.exp_avg_sqs[b.k], b.begin, b.n, scratch.v);
    for_each_part(b.n, step, [&](int64_t begin, int64_t end) {
      FK_SIMD
      for (int64_t i = begin; i < end; ++i) out(i, w[i], math::adam(w[i], g(i), m[i], v[i], s));
    });
    store(a.exp_avgs[b.k], b.begin, b.n, m);
    store(a.exp_avg_sqs[b.k], b.begin, b.n, v);
  }
};

// The pass that every rule shares: restore, form the gradient, apply the rule, update the history, store, perturb
// again.
template <class Rule>
struct UpdateWalk {
  const Update& a;
  const Rule& rule;
  bool skip, large;
  Perturbation perturbation;

  const View& clean(int64_t k) const { return (a.masters ? a.masters : a.backups ? a.backups : a.params)[k]; }

  // Applies the rule to a block; beside its loop the next block is fetched, and normals are drawn that `finish` scales
  // once the norms of the rows are known: the rule waits for the divider or the memory, they for the multipliers.
  template <class Gradient, class Out>
  void apply(const Block& b, const float* w, const Gradient& gradient, const Out& out, Scratch& scratch) const {
    const bool draws = a.noise && perturbation.draw_ahead(b, scratch);
    scratch.prefetcher.clear();
    if (draws || Rule::kWaitsForMemory) fetch_next(b, scratch.prefetcher);
    if (draws) {
      const auto step = [&]() FK_INLINE_LAMBDA {
        scratch.prefetcher.fetch<kPart / 16>();
        perturbation.draw_part(scratch);
      };
      rule.apply(b, w, gradient, out, step, scratch);
    } else if constexpr (Rule::kWaitsForMemory) {
      const auto step = [&]() FK_INLINE_LAMBDA { scratch.prefetcher.fetch<kPart / 16>(); };
      rule.apply(b, w, gradient, out, step, scratch);
    } else {
      rule.apply(b, w, gradient, out, NoStep{}, scratch);
    }
  }

  void fetch_next(const Block& b, Prefetcher& prefetcher) const {
    if (b.next == 0) return;
    prefetcher.add_before_load(clean(b.k), b);
    prefetcher.add_before_load(a.grads[b.k], b);
    if (a.clean_grads) prefetcher.add_before_load(a.clean_grads[b.k], b);
    rule.prefetch(b, prefetcher);
  }

  Squares prepare(const Block& b, Scratch& scratch) const {
    const View &clean = this->clean(b.k), &param = a.params[b.k];
    // Without noise nobody reads a backup again, so the new weight goes straight to the parameter.
    const bool keep = a.noise || a.masters || !a.backups;
    Squares squares;
    float* w = load(clean, b.begin, b.n, scratch.w);
    if (!skip) {
      const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
      float* out = keep ? w : target_around_caches(param, b.begin, scratch.w, large);
      with_final_gradient(a, &a.clip, b, g, scratch, [&](const auto& gradient) {
        if (a.masks) {
          const uint8_t* flags = unpack(a.masks[b.k], param, b, scratch);
          apply(b, w, gradient, StoreAmplified{out, flags, static_cast<float>(a.kappa[b.k])}, scratch);
        } else {
          apply(b, w, gradient, StoreResult{out}, scratch);
        }
      });
      keep ? store(clean, b.begin, b.n, out) : store_around_caches(param, b.begin, b.n, out, large);
      if (a.history) squares.of[1] = update_history(a, b, g, scratch.m);
    }
    if (a.noise) {
      // Norm and perturbation are those of the weight as stored, rounded to its dtype.
      squares.of[0] = skip ? w : load(clean, b.begin, b.n, scratch.w);
    } else if (a.masters || (skip && a.backups)) {
      copy(param, clean, b.begin, b.n, scratch.w, large);
    }
    return squares;
  }

  float finish_row(int64_t k, int64_t row, const double* sums) const {
    if (a.history && !skip) update_history_row(a, k, row, sums[1]);
    return a.noise ? perturbation.scale(k, row, math::norm(sums[0])) : 0.0f;
  }

  void finish(const Block& b, const float* w, Scratch& scratch) const {
    if (!a.noise) return;
    const View& param = a.params[b.k];
    if (w == nullptr) w = load(clean(b.k), b.begin, b.n, scratch.w);
    float* p = target_around_caches(param, b.begin, scratch.v, large);
    if (!scratch.draws.cover(b)) {
      scratch.prefetcher.clear();
      if (b.next > 0 && !skip) {
        scratch.prefetcher.add(clean(b.k), b);
        scratch.prefetcher.add(a.grads[b.k], b);
        if (a.clean_grads) scratch.prefetcher.add(a.clean_grads[b.k], b);
        rule.prefetch(b, scratch.prefetcher);
      }
    }
    perturbation.add(b, w, p, scratch);
    store_around_caches(param, b.begin, b.n, p, large);
  }
};

template <class Rule>
void update(const Update& a, const Rule& rule, bool skip) {
  const Perturbation perturbation(a.params, a.history, a.noise, {a.sigma, a.sigmas}, a.eta, a.index, a.offset);
  const UpdateWalk<Rule> walk{a, rule, skip, numel(a.params) > kLarge, perturbation};
  if (a.noise || ((a.history || a.masks) && !skip)) {
    for_each_row(a.params, walk);
  } else {
    for_each_block(a.params, elementwise_walk(a.params),
                   [&](const Block& b, Scratch& scratch) { walk.prepare(b, scratch); });
  }
}

struct MixGradientsWalk {
  const MixGradients& a;
  bool large;

  Squares prepare(const Block& b, Scratch& scratch) const {
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    Squares squares;
    if (a.history) {
      squares.of[1] = update_history(a, b, g, scratch.m);
      // In float32 the final gradient overwrites g in place.
      if (squares.of[1] == g && !a.outs)
        squares.of[1] = static_cast<float*>(std::memcpy(scratch.m, g, b.n * sizeof(float)));
    }
    const View& result = (a.outs ? a.outs : a.grads)[b.k];
    // What is read in place is in the caches already.
    const bool around = a.outs && large;
    float* out = target_around_caches(result, b.begin, scratch.v, around);
    with_final_gradient(a, &a.clip, b, g, scratch, [&](const auto& gradient) {
      FK_SIMD
      for (int64_t i = 0; i < b.n; ++i) out[i] = gradient(i);
    });
    store_around_caches(result, b.begin, b.n, out, around);
    return squares;
  }
  float finish_row(int64_t k, int64_t row, const double* sums) const {
    update_history_row(a, k, row, sums[1]);
    return 0.0f;
  }
  void finish(const Block&, const float*, Scratch&) const {}
};

bool nonzero(const Table& found_inf) { return value_or(found_inf, 0.0f) != 0.0f; }

}  // namespace

void sgd_update_(const SgdUpdate& a) { update(a, Sgd{a}, nonzero(a.found_inf)); }

void adam_update_(const AdamUpdate& a) {
  const bool skip = nonzero(a.found_inf);
  Adam rule(a);
  if (!skip) rule.advance();
  update(a, rule, skip);
}

void mix_gradients_(const MixGradients& a) {
  if (nonzero(a.found_inf)) return;
  const MixGradientsWalk walk{a, numel(a.grads) > kLarge};
  if (a.history) {
    for_each_row(a.grads, walk);
  } else {
    for_each_block(a.grads, elementwise_walk(a.grads),
                   [&](const Block& b, Scratch& scratch) { walk.prepare(b, scratch); });
  }
}

}  // namespace flatkern::cpu::FK_ISA
