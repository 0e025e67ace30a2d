// The pass that every rule shares, for one tile: restore, form the gradient, apply the rule, update the history, store,
// and perturb again. A rule is a struct: its arguments of a tensor, and `apply` for four elements (sgd.cuh, adam.cuh).
#pragma once

#include <type_traits>

#include "../math/update.h"
#include "gradient.cuh"
#include "mask.cuh"
#include "perturbation.cuh"

namespace flatkern::cuda {

// What a kernel is compiled for. The general one has what the fast ones leave out: histories, masks, a key and rates
// that are on the device, and everything at once.
enum class Kind { kPlain, kRolling, kGeneral };

// Types of the lists of a call; clean gradients are like gradients.
template <class P, class G, class C, class S, Kind kGiven>
struct UpdateTypes {
  using Param = P;
  using Grad = G;
  using Clean = C;
  using State = S;
  static constexpr Kind kKind = kGiven;
  static constexpr bool kGeneral = kKind == Kind::kGeneral, kHasRows = kKind != Kind::kPlain;

  // Rolling: noise is added to what was stored.
  template <class Args>
  FK_DEVICE_MEMBER static bool perturbs(const Args& a) {
    return kKind == Kind::kRolling || (kGeneral && a.perturbs);
  }
  // A clean gradient is part of the final one.
  template <class Args>
  FK_DEVICE_MEMBER static bool mixes(const Args& a, uint32_t k) {
    return kKind != Kind::kRolling && a.clean_grads[k] != nullptr;
  }
};

struct UpdateCall {
  const Tile* tiles;
  LongRows long_rows;
  uint32_t* step_tickets;        // how many blocks have read the step of a tensor; 0 between launches
  const uint32_t* step_readers;  // how many there are
  Key key;
  DeviceNumbers lrs, sigmas;
  const float* component;
  Scalar grad_scale, clip, found_inf;
  bool perturbs;    // rolling
  bool has_copy;    // clean weights are in masters or backups,
  bool keeps_copy;  // and are written there
};

// Codes of dtypes, two bits each.
enum UpdateCode { kParamCode = 0, kCleanCode = 2, kGradCode = 4, kCleanGradCode = 6, kFirstCode = 8, kSecondCode = 10 };

template <class Own, size_t kBytes>
struct UpdateArguments : UpdateCall {
  static constexpr int kTensors =
      (kBytes - sizeof(UpdateCall)) / (6 * sizeof(void*) + sizeof(Own) + 7 * sizeof(float) + sizeof(uint16_t));
  void* params[kTensors];
  void* clean[kTensors];
  float* history[kTensors];
  const void* grads[kTensors];
  const void* clean_grads[kTensors];
  const uint8_t* masks[kTensors];
  Own own[kTensors];
  float grad_weight[kTensors], clean_weight[kTensors], kappa[kTensors], beta[kTensors], sigma[kTensors], eta[kTensors];
  uint32_t index[kTensors];
  uint16_t codes[kTensors];
};

// The dtype of a tensor's state, where only the call knows it.
template <class T, class Args>
FK_DEVICE uint32_t code_of(const Args& a, uint32_t k, UpdateCode which) {
  return std::is_same_v<T, AnyFloat> ? a.codes[k] >> which & 3 : 0;
}

// The lists of a tensor, from a team's row on.
template <class Types, bool kWhole, class Args>
struct Rows {
  using P = typename Types::Param;
  using G = typename Types::Grad;
  using C = typename Types::Clean;
  static constexpr bool kGeneral = Types::kGeneral;

  const Args& a;
  const Tile& t;
  const Team<kWhole>& team;

  FK_DEVICE_MEMBER uint32_t code(UpdateCode which) const { return code_of<P>(a, t.tensor, which); }
  FK_DEVICE_MEMBER Elements<P> param() const { return {a.params[t.tensor], code(kParamCode), team.start}; }
  FK_DEVICE_MEMBER Elements<C> clean() const { return {a.clean[t.tensor], code(kCleanCode), team.start}; }
  FK_DEVICE_MEMBER Elements<G> grad() const { return {a.grads[t.tensor], code(kGradCode), team.start}; }
  FK_DEVICE_MEMBER Elements<G> clean_grad() const {
    return {a.clean_grads[t.tensor], code(kCleanGradCode), team.start};
  }
  FK_DEVICE_MEMBER bool has_history() const { return kGeneral && a.history[t.tensor] != nullptr; }
  FK_DEVICE_MEMBER bool has_mask() const { return kGeneral && a.masks[t.tensor] != nullptr; }
  FK_DEVICE_MEMBER bool is_flat() const { return (t.flags & kFlat) != 0; }
};

// What a tile's first pass is made of.
template <class Types, bool kWhole, class Args, class Rule>
struct Step : Rows<Types, kWhole, Args> {
  using Base = Rows<Types, kWhole, Args>;
  using Base::a, Base::t, Base::team, Base::param, Base::clean, Base::grad, Base::clean_grad;
  using Base::has_history, Base::has_mask, Base::is_flat;
  using typename Base::C;
  using typename Base::G;
  using typename Base::P;

  const Rule& rule;
  uint32_t k;
  FinalGradient final;
  bool skip, stores_param;

  FK_DEVICE_MEMBER Step(const Base& rows, const Rule& rule)
      : Base(rows), rule(rule), k(t.tensor), final(a, k, Types::mixes(a, k)), skip(rule.skip) {
    // Now, unless it will be perturbed in this block, from its copy.
    stores_param = Types::perturbs(a) ? !a.has_copy && !skip : a.has_copy || !skip;
  }

  // Eight whole elements, or none: their new weights. `squares` are those of what is stored, `gradient` those that a
  // history takes. To be called by every thread of a warp.
  FK_DEVICE_MEMBER void whole(const Span<true>& s, float& squares, float& gradient) const {
    const int mine = s.count > 0 ? team.place_in(t) + s.place : -1;
    const uint32_t my_bits = has_mask() && s.count > 0 ? mask_bits(a.masks[k], a.long_rows, t, team, s) : 0;
#pragma unroll
    for (int turn = 0; turn < SharedEights::kTurns; ++turn) {
      in_order();
      const int eight = SharedEights::shared(turn, mine);
      const bool second = SharedEights::is_second();
      const uint32_t bits = has_mask() ? SharedEights::shared(turn, my_bits) >> (second ? 4 : 0) : 0;
      float w[4] = {}, scaled[4] = {};
      if (eight >= 0) take_four(t.start + (eight + (second ? 4 : 0)), bits, w, scaled);
      if constexpr (Types::kHasRows) squares = SharedEights::given(turn, sum_squares_of_both(w), squares);
      if (has_history()) gradient = SharedEights::given(turn, sum_squares_of_both(scaled), gradient);
    }
  }

  // Four of them: `w` becomes the new weights, `scaled` the gradient that a history takes.
  FK_DEVICE_MEMBER void take_four(int64_t first, uint32_t bits, float (&w)[4], float (&scaled)[4]) const {
    Quad<C> clean(a.clean[k], first);
    Quad<P> param(a.params[k], first);
    clean.get(w);
    if (!skip) {
      float g[4];
      Quad<G>(a.grads[k], first).get(g);
      if (has_history()) {
        const float scale = a.grad_scale.get();
#pragma unroll
        for (int j = 0; j < 4; ++j) scaled[j] = g[j] * scale;
      }
      if (final.mixes) {
        float other[4];
        Quad<G>(a.clean_grads[k], first).get(other);
#pragma unroll
        for (int j = 0; j < 4; ++j) g[j] = math::mixed(g[j], other[j], final.factor, final.clean_weight, final.clip);
      } else if (final.scales) {
#pragma unroll
        for (int j = 0; j < 4; ++j) g[j] = math::mixed(g[j], final.factor, final.clip);
      }
      take_step(first, bits, w, g);
      Quad<C>::round(w);
      if (a.keeps_copy) clean.put(w);
    }
    if (stores_param) param.template put<Use::kAgain>(w);
  }

  // The rule for four elements, and IRE's longer step where a bit is set.
  FK_DEVICE_MEMBER void take_step(int64_t first, uint32_t bits, float (&w)[4], float (&g)[4]) const {
    if (!has_mask()) return rule.apply(a, k, first, w, g);
    float old[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) old[j] = w[j];
    rule.apply(a, k, first, w, g);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if ((bits >> j & 1) != 0) w[j] = math::amplified(w[j], old[j], a.kappa[k]);
  }

  // The same for elements one by one.
  FK_DEVICE_MEMBER void one_by_one(const Span<false>& s, float& squares, float& gradient) const {
    const uint32_t bits = has_mask() ? mask_bits(a.masks[k], a.long_rows, t, team, s) : 0;
    Squares of_weights, of_gradient;
#pragma unroll 1
    for (int j = 0; j < s.count; ++j) {
      const int place = s.place + j;
      float w = clean().get(place);
      if (!skip) {
        const float g = grad().get(place), old = w;
        if (has_history()) {
          const float scaled = g * a.grad_scale.get();
          of_gradient.take(j, scaled);
          if (is_flat()) {
            float& history = a.history[k][team.start + place];
            history = math::update_history(history, math::square(scaled), a.beta[k]);
          }
        }
        rule.apply_one(a, k, team.start, place, w, final.of(g, final.mixes ? clean_grad().get(place) : 0.0f));
        if ((bits >> j & 1) != 0) w = math::amplified(w, old, a.kappa[k]);
        // It goes straight to its parameter where a backup has served.
        if (a.keeps_copy || !a.has_copy) w = clean().rounded_one(w);
        if (a.keeps_copy) clean().put(place, w);
      }
      if (stores_param) param().put(place, w);
      of_weights.take(j, w);
    }
    squares = of_weights.sum();
    gradient = of_gradient.sum();
  }
};

// Appends a number to some, of which the first one goes. To put it at an index that the compiler does not know would
// take twice the instructions, or memory.
template <int kCount>
FK_DEVICE void push(float (&x)[kCount], float value) {
#pragma unroll
  for (int j = 0; j + 1 < kCount; ++j) x[j] = x[j + 1];
  x[kCount - 1] = value;
}

// The two sums of a row: of the squares of its new weights, and of its gradient, which a history takes.
template <int kThreads, int kEights>
struct UpdateSums {
  ChunkSums<kThreads, kEights> weights, gradients;
};

// The second pass: what takes the sums of a row, its history and its noise.
template <class Types, int kEights, bool kWhole, class Args, class Sums>
FK_DEVICE void finish_rows(const Args& a, const Tile& t, const Team<kWhole>& team, bool skip,
                           const float (&of_weights)[kEights], const float (&of_gradient)[kEights], Sums& sums) {
  const Rows<Types, kWhole, Args> rows{a, t, team};
  const uint32_t k = t.tensor;
  const bool perturbs = Types::perturbs(a), segments = (t.flags & kSegments) != 0;
  const bool has_rows = rows.has_history() && !rows.is_flat();
  if (!perturbs && !has_rows) return;
  float* history = rows.has_history() ? a.history[k] + team.history_in(t) : nullptr;
  float past = 0.0f, squares = 0.0f;
  if (has_rows) {
    if (team.is_there()) past = *history;
    squares = row_sum<kEights>(t, team, of_gradient, sums.gradients);
    __syncwarp();  // all have read it
  }
  const float norm_square = perturbs ? row_sum<kEights>(t, team, of_weights, sums.weights) : 0.0f;
  if (segments) {
    add_segment(t, team, a.long_rows, norm_square, squares, has_rows, [&](double all, double all_squares) {
      a.long_rows.norms[t.long_row] = math::norm(all);
      if (has_rows && !skip) *history = math::update_history(*history, static_cast<float>(all_squares), a.beta[k]);
    });
    return;
  }
  if (!team.is_there()) return;
  if (has_rows && !skip) {
    past = math::update_history(past, squares, a.beta[k]);
    if (team.leads()) *history = past;
  }
  if (!perturbs) return;
  const float sigma = static_cast<float>(Types::kGeneral ? a.sigmas.get(k, a.sigma[k]) : a.sigma[k]);
  const NoiseScale scale = {math::root(norm_square), sigma, a.eta[k], history, past, a.index[k]};
  add_noise_again<kEights>(Types::kGeneral ? a.key.get() : a.key, t, team, scale, rows.clean(), rows.param());
}

// One tile. Eights come one after the other, so that registers suffice for many blocks on a multiprocessor; the new
// weights, which the noise needs when their row is measured, are then in a cache.
template <class Types, int kEights, bool kWhole, class Args, class Rule, class Sums>
FK_DEVICE void update_tile(const Args& a, const Tile& t, const Rule& rule, Sums& sums) {
  const Team<kWhole> team(t);
  const Step<Types, kWhole, Args, Rule> step({a, t, team}, rule);
  float of_weights[kEights] = {}, of_gradient[kEights] = {};
  for_each_eight_in_turn<kEights, true>(team, [&](int, const auto& s) {
    float weights = 0.0f, gradient = 0.0f;
    if constexpr (kWhole) {
      step.whole(s, weights, gradient);
    } else if (s.count > 0) {
      step.one_by_one(s, weights, gradient);
    }
    push(of_weights, weights);
    push(of_gradient, gradient);
  });
  // Noise is added to weights that other lanes of the warp have stored.
  if constexpr (kWhole && Types::kHasRows) __syncwarp();
  if constexpr (Types::kHasRows && (Types::kGeneral || Rule::kIsShortOfRegisters)) {
    // What the first pass does not need is found out anew.
    const Tile& again = a.tiles[forget(static_cast<int>(blockIdx.x))];
    finish_rows<Types>(a, again, Team<kWhole>(again), rule.skip, of_weights, of_gradient, sums);
  } else if constexpr (Types::kHasRows) {
    finish_rows<Types>(a, t, team, rule.skip, of_weights, of_gradient, sums);
  }
}

template <class Rule, class Types, int kThreads, int kBlocks, int kEights, class Args>
__global__ void __launch_bounds__(kThreads, blocks_here(kBlocks, Rule::kIsShortOfRegisters))
    update_kernel(FK_PARAM(Args) a) {
  using Sums = UpdateSums<kThreads, kEights>;
  FK_SHARED(Sums, sums);
  FK_SHARED(typename Rule::Shared, shared);
  const Tile& t = a.tiles[blockIdx.x];
  const Rule rule(a, t.tensor, shared);
  if constexpr (!std::is_same_v<typename Types::Param, AnyFloat>) {
    if ((t.flags & kWhole) != 0) return update_tile<Types, kEights, true>(a, t, rule, sums);
  }
  update_tile<Types, kEights, false>(a, t, rule, sums);
}

}  // namespace flatkern::cuda
