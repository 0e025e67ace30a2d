// The norm family on the CPU: filter_norms_, ascent_norm_, gradient_norm_, gradient_products_.
#include "../math/norm.h"

#include "apply.h"
#include "gradient.h"

namespace flatkern::cpu::FK_ISA {
namespace {

struct FilterNormsWalk {
  const FilterNorms& a;

  Squares prepare(const Block& b, Scratch& scratch) const { return {{load(a.params[b.k], b.begin, b.n, scratch.w)}}; }
  float finish_row(int64_t k, int64_t row, const double* sums) const {
    return a.norms[k].as<float>()[row] = math::norm(sums[0]);
  }
  void finish(const Block&, const float*, Scratch&) const {}
};

}  // namespace

void filter_norms_(const FilterNorms& a) { for_each_row(a.params, FilterNormsWalk{a}); }

void ascent_norm_(const AscentNorm& a) {
  *a.norm[0].as<float>() = total_norm(a.grads, [&](const Block& b, Scratch& scratch) -> const float* {
    const float* d = load(a.grads[b.k], b.begin, b.n, scratch.g);
    if (a.means) {
      const float* m = load(a.means[b.k], b.begin, b.n, scratch.m);
      scratch.prefetcher.clear();
      if (b.next > 0) {
        scratch.prefetcher.add_float32(a.grads[b.k], b);
        scratch.prefetcher.add_float32(a.means[b.k], b);
      }
      d = beside_mean(d, m, static_cast<float>(a.sigma[b.k]), b.n, scratch.clean, scratch.prefetcher);
    }
    if (!(a.eta[b.k] >= 0)) return d;
    const float* w = load(a.params[b.k], b.begin, b.n, scratch.w);
    const float eta = static_cast<float>(a.eta[b.k]);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) scratch.v[i] = math::ascent_term(w[i], d[i], eta);
    return scratch.v;
  });
}

void gradient_norm_(const GradientNorm& a) {
  *a.norm[0].as<float>() = total_norm(a.grads, [&](const Block& b, Scratch& scratch) {
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    with_final_gradient(a, nullptr, b, g, scratch, [&](const auto& gradient) {
      FK_SIMD
      for (int64_t i = 0; i < b.n; ++i) scratch.v[i] = gradient(i);
    });
    return scratch.v;
  });
}

void gradient_products_(const GradientProducts& a) {
  const Chunks chunks(a.grads);
  Array<Products> partials(chunks.count());
  for_each_block(a.grads, kBlocks, [&](const Block& b, Scratch& scratch) {
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    const float* clean = load(a.clean_grads[b.k], b.begin, b.n, scratch.clean);
    partials[chunks.number(b)] = sum_products(clean, g, b.n);
  });
  const Products total = sum_pairwise(&partials[0], partials.size());
  double* out = a.products[0].as<double>();
  for (int j = 0; j < 3; ++j) out[j] = total.of[j];
}

}  // namespace flatkern::cpu::FK_ISA
