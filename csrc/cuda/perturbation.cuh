// Adding noise to the weights of a team: what the perturb and update families share.
#pragma once

#include "noise.cuh"
#include "rows.cuh"

namespace flatkern::cuda {

// What scales the noise of a row. ARWP's history damps a row as a whole, or, of a tensor of rank <= 1, each element.
struct NoiseScale {
  float norm, sigma, eta;
  const float* history;  // where it begins for a team; null without one
  float of_filter;       // what it is for a row
  uint32_t index;        // which parameter it is, for its normals

  FK_DEVICE_MEMBER float of_row() const {
    return history == nullptr ? math::noise_scale(norm, sigma) : math::noise_scale(norm, sigma, of_filter, eta);
  }
  FK_DEVICE_MEMBER float of_element(int place) const { return math::noise_scale(norm, sigma, history[place], eta); }
};

// p <- w + s z for a row of whole eights, whose weights are in registers.
template <int kEights, class Stored, class P>
FK_DEVICE void add_noise(const Key& key, const Tile& t, const Team<true>& team, const NoiseScale& scale,
                         const Stored (&clean)[kEights], const Elements<P>& param) {
  const Counters counters(t, team, scale.index);
  const float of_row = scale.of_row();
  for_each_eight<kEights>(team, [&](int i, const auto& s) {
    float z[8], w[8];
    draw(key, counters, s.place / kEight, z);
    clean[i].values(w);
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = math::perturb_gaussian(w[j], math::perturbation(z[j], of_row));
    param.template store<Use::kAgain>(s, param.rounded(w));
  });
}

// The same where the weights are read again, from caches.
template <int kEights, class C, class P>
FK_DEVICE void add_noise_again(const Key& key, const Tile& t, const Team<true>& team, const NoiseScale& scale,
                               const Elements<C>& clean, const Elements<P>& param) {
  const Counters counters(t, team, scale.index);
  const float of_row = scale.of_row();
  for_each_eight_in_turn<kEights>(team, [&](int, const auto& s) {
    float z[8], w[8];
    draw(key, counters, s.place / kEight, z);
    clean.load(s).values(w);
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = math::perturb_gaussian(w[j], math::perturbation(z[j], of_row));
    param.template store<Use::kAgain>(s, param.rounded(w));
  });
}

// The same for any row, element by element, because registers are short: weights are read again, from caches. A tensor
// of rank <= 1 may be a shard that begins inside an eight, and may have a history for each element.
template <int kEights, class C, class P>
FK_DEVICE void add_noise_again(const Key& key, const Tile& t, const Team<false>& team, const NoiseScale& scale,
                               const Elements<C>& clean, const Elements<P>& param) {
  const Counters counters(t, team, scale.index);
  const bool by_element = scale.history != nullptr && (t.flags & kFlat) != 0;
  const float of_row = by_element ? 0.0f : scale.of_row();
  for_each_eight_in_turn<kEights>(team, [&](int, const auto& s) {
    float z[8];
    shifted_normals(key, counters, s.place, z);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j >= s.count) continue;
      const float of_one = by_element ? scale.of_element(s.place + j) : of_row;
      const float e = math::perturbation(z[j], of_one);
      param.put(s.place + j, math::perturb_gaussian(clean.get(s.place + j), e));
    }
  });
}

}  // namespace flatkern::cuda
