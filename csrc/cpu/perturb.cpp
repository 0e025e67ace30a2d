// The perturb family on the CPU: perturb_gaussian_, perturb_ascent_, restore_.
#include "../math/perturb.h"

#include "gradient.h"
#include "normals.h"

namespace flatkern::cpu::FK_ISA {
namespace {

struct PerturbGaussianWalk {
  const PerturbGaussian& a;
  Perturbation perturbation;
  bool large;

  const View& clean(int64_t k) const { return (a.masters ? a.masters : a.params)[k]; }

  Squares prepare(const Block& b, Scratch& scratch) const {
    if (a.norms) return {};
    return {{load(clean(b.k), b.begin, b.n, scratch.w)}};
  }
  float finish_row(int64_t k, int64_t row, const double* sums) const {
    return perturbation.scale(k, row, a.norms ? a.norms[k].as<float>()[row] : math::norm(sums[0]));
  }
  void finish(const Block& b, const float* w, Scratch& scratch) const {
    const View& param = a.params[b.k];
    if (w == nullptr) w = load(clean(b.k), b.begin, b.n, scratch.w);
    if (a.backups) copy(a.backups[b.k], param, b.begin, b.n, scratch.v, large);
    float* p = target(param, b.begin, scratch.v);
    scratch.prefetcher.clear();
    if (b.next > 0) scratch.prefetcher.add(clean(b.k), b);
    perturbation.add(b, w, p, scratch);
    store(param, b.begin, b.n, p);
  }
};

// Friendly-SAM's mean of a block with this gradient in it.
const float* renewed(const PerturbAscent& a, const Block& b, const float* g, const float* m, float* out) {
  const float momentum = static_cast<float>(a.momentum[b.k]), rest = static_cast<float>(1 - a.momentum[b.k]);
  FK_SIMD
  for (int64_t i = 0; i < b.n; ++i) out[i] = math::new_mean(m[i], g[i], momentum, rest);
  return out;
}

}  // namespace

void perturb_gaussian_(const PerturbGaussian& a) {
  const Perturbation perturbation(a.params, a.history, a.noise, {a.sigma, a.sigmas}, a.eta, a.index, a.offset);
  for_each_row(a.params, PerturbGaussianWalk{a, perturbation, numel(a.params) > kLarge});
}

void perturb_ascent_(const PerturbAscent& a) {
  const float norm = *a.norm[0].as<float>();
  const bool large = numel(a.params) > kLarge, finite = math::is_finite(norm);
  for_each_block(a.params, elementwise_walk(a.params), [&](const Block& b, Scratch& scratch) {
    const View& param = a.params[b.k];
    const float* w = load((a.masters ? a.masters : a.params)[b.k], b.begin, b.n, scratch.w);
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    scratch.prefetcher.clear();
    if (b.next > 0) {
      scratch.prefetcher.add_float32((a.masters ? a.masters : a.params)[b.k], b);
      scratch.prefetcher.add_float32(a.grads[b.k], b);
      if (a.means) scratch.prefetcher.add_float32(a.means[b.k], b);
    }
    if (a.backups) copy(a.backups[b.k], param, b.begin, b.n, scratch.v, large);
    const float* d = g;
    if (a.means) {
      const float* m = load(a.means[b.k], b.begin, b.n, scratch.m);
      d = beside_mean(g, m, static_cast<float>(a.sigma[b.k]), b.n, scratch.clean, scratch.prefetcher);
      if (a.new_means)
        store_around_caches(a.new_means[b.k], b.begin, b.n, finite ? renewed(a, b, g, m, scratch.e) : m, large);
    }
    const float scale = math::ascent_scale(static_cast<float>(a.rho[b.k]), norm);
    const float eta = static_cast<float>(a.eta[b.k]);
    const bool adaptive = a.eta[b.k] >= 0;
    // Beside masters the old weight is not read, and so must not be fetched to be overwritten.
    const bool around = large && a.masters;
    float* p = target_around_caches(param, b.begin, scratch.v, around);
    for_each_part(b.n, scratch.prefetcher, [&](int64_t begin, int64_t end) {
      FK_SIMD
      for (int64_t i = begin; i < end; ++i) p[i] = math::perturb_ascent(w[i], d[i], scale, eta, adaptive);
    });
    store_around_caches(param, b.begin, b.n, p, around);
  });
}

void restore_(const Restore& a) {
  const bool large = numel(a.params) > kLarge;
  // Nothing is converted, if dtypes agree, which leaves the memory alone to wait for.
  for_each_block(a.params, large ? kSteps : kBlocks, [&](const Block& b, Scratch& scratch) {
    copy(a.params[b.k], a.backups[b.k], b.begin, b.n, scratch.w, large);
  });
}

}  // namespace flatkern::cpu::FK_ISA
