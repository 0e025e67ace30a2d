// The update family on the CPU: SGD, Adam and AdamW with what a method wraps around them, and mix_gradients_.
#include "../math/update.h"

#include "gradient.h"
#include "normals.h"

namespace flatkern::cpu::FK_ISA {
namespace {

struct Sgd {
  const SgdUpdate& a;

  void ahead(const Block& b, Ahead& ahead) const {
    if (a.momentum_buffers) ahead.add(a.momentum_buffers[b.k], b);
  }

  void apply(const Block& b, float* w, const float* g, Scratch& scratch) const {
    const math::SgdScalars s = {static_cast<float>(a.lr[b.k]), static_cast<float>(a.momentum[b.k]),
                                static_cast<float>(1 - a.dampening[b.k]), static_cast<float>(a.weight_decay[b.k]),
                                a.nesterov[b.k]};
    if (!a.momentum_buffers) {
      FK_SIMD
      for (int64_t i = 0; i < b.n; ++i) w[i] = math::sgd(w[i], g[i], s);
      return;
    }
    float* v = load(a.momentum_buffers[b.k], b.begin, b.n, scratch.v);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) w[i] = math::sgd(w[i], g[i], v[i], s);
    store(a.momentum_buffers[b.k], b.begin, b.n, v);
  }
};

struct Adam {
  const AdamUpdate& a;
  Array<math::AdamScalars> scalars;  // one per tensor

  // The moments are left to the processor: its divisions give it the time.
  void ahead(const Block&, Ahead&) const {}

  explicit Adam(const AdamUpdate& args) : a(args), scalars(args.params.size()) {}

  // Advances every step and computes what depends on it.
  void advance() {
    int64_t last = -1;
    for (int64_t k = 0; k < a.params.size(); ++k) {
      float& step = *a.steps[k].as<float>();
      step += 1.0f;
      // Powers are slow, and as a rule all tensors share them.
      const bool same = last >= 0 && step == *a.steps[last].as<float>() && a.lr[k] == a.lr[last] &&
                        a.beta1[k] == a.beta1[last] && a.beta2[k] == a.beta2[last] && a.eps[k] == a.eps[last] &&
                        a.weight_decay[k] == a.weight_decay[last];
      scalars[k] =
          same ? scalars[last]
               : math::adam_scalars(step, a.lr[k], a.beta1[k], a.beta2[k], a.eps[k], a.weight_decay[k], a.decoupled);
      last = k;
    }
  }

  void apply(const Block& b, float* w, const float* g, Scratch& scratch) const {
    const math::AdamScalars s = scalars[b.k];
    float* m = load(a.exp_avgs[b.k], b.begin, b.n, scratch.m);
    float* v = load(a.exp_avg_sqs[b.k], b.begin, b.n, scratch.v);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) w[i] = math::adam(w[i], g[i], m[i], v[i], s);
    store(a.exp_avgs[b.k], b.begin, b.n, m);
    store(a.exp_avg_sqs[b.k], b.begin, b.n, v);
  }
};

// The pass that every rule shares: restore, form the gradient, apply the rule, remember, store, and perturb again.
template <class Rule>
struct UpdateWalk {
  const Update& a;
  const Rule& rule;
  bool skip, large;
  Perturbation perturbation;

  const View& clean(int64_t k) const { return (a.masters ? a.masters : a.backups ? a.backups : a.params)[k]; }

  Squares prepare(const Block& b, Scratch& scratch) const {
    const View& store_of_w = clean(b.k);
    Squares squares;
    float* w = load(store_of_w, b.begin, b.n, scratch.w);
    if (!skip) {
      const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
      rule.apply(b, w, final_gradient(a, &a.clip, b, g, scratch.e, scratch), scratch);
      store(store_of_w, b.begin, b.n, w);
      if (a.history) squares.of[1] = remember(a, b, g, scratch.m);
    }
    if (!a.noise) {
      if (&store_of_w != &a.params[b.k]) copy(a.params[b.k], store_of_w, b.begin, b.n, scratch.w, large);
    } else {
      // Norm and perturbation see the weight that was stored.
      squares.of[0] = skip ? w : load(store_of_w, b.begin, b.n, scratch.w);
    }
    return squares;
  }

  float settle(int64_t k, int64_t row, const double* sums) const {
    if (a.history && !skip) remember_row(a, k, row, sums[1]);
    return a.noise ? perturbation.scale(k, row, math::norm(sums[0])) : 0.0f;
  }

  void finish(const Block& b, const float* w, Scratch& scratch) const {
    if (!a.noise) return;
    const View& param = a.params[b.k];
    if (w == nullptr) w = load(clean(b.k), b.begin, b.n, scratch.w);
    // A large float32 weight is written past the caches, from scratch.
    const bool past = large && param.dtype == DType::kFloat32;
    float* p = past ? scratch.v : target(param, b.begin, scratch.v);
    scratch.ahead.clear();
    if (b.next > 0 && !skip) {
      scratch.ahead.add(clean(b.k), b);
      scratch.ahead.add(a.grads[b.k], b);
      if (a.clean_grads) scratch.ahead.add(a.clean_grads[b.k], b);
      rule.ahead(b, scratch.ahead);
    }
    perturbation.add(b, w, p, scratch);
    if (past) {
      write_past(reinterpret_cast<char*>(param.as<float>() + b.begin), reinterpret_cast<char*>(p), b.n * sizeof(float));
    } else {
      store(param, b.begin, b.n, p);
    }
  }
};

template <class Rule>
void update(const Update& a, const Rule& rule, bool skip) {
  const Perturbation perturbation(a.params, a.history, a.noise, a.sigma, a.eta, a.index, a.offset);
  const UpdateWalk<Rule> walk{a, rule, skip, numel(a.params) > kLarge, perturbation};
  if (a.noise || (a.history && !skip)) {
    for_each_row(a.params, walk);
  } else {
    for_each_block(a.params, [&](const Block& b, Scratch& scratch) { walk.prepare(b, scratch); });
  }
}

struct MixGradientsWalk {
  const MixGradients& a;

  Squares prepare(const Block& b, Scratch& scratch) const {
    const View& grad = a.grads[b.k];
    const float* g = load(grad, b.begin, b.n, scratch.g);
    Squares squares;
    if (a.history) {
      squares.of[1] = remember(a, b, g, scratch.m);
      // The final gradient is about to take its place.
      if (squares.of[1] == g) squares.of[1] = static_cast<float*>(std::memcpy(scratch.m, g, b.n * sizeof(float)));
    }
    store(grad, b.begin, b.n, final_gradient(a, &a.clip, b, g, target(grad, b.begin, scratch.v), scratch));
    return squares;
  }
  float settle(int64_t k, int64_t row, const double* sums) const {
    remember_row(a, k, row, sums[1]);
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
  const MixGradientsWalk walk{a};
  if (a.history) {
    for_each_row(a.grads, walk);
  } else {
    for_each_block(a.grads, [&](const Block& b, Scratch& scratch) { walk.prepare(b, scratch); });
  }
}

}  // namespace flatkern::cpu::FK_ISA
