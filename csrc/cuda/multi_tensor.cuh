// The engine: how a block finds its teams, and how a thread moves eight elements. It knows no equation.
#pragma once

#include "device.cuh"
#include "tile.h"

namespace flatkern::cuda {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// A dtype that only the call knows: one of DTypeCode for each tensor.
struct AnyFloat {};
enum DTypeCode : uint32_t { kIsFloat32, kIsHalf, kIsBFloat16 };

// Eight elements from column `place` of a team's row on; where no eight is cut short (kWhole), they are all there.
template <bool kWhole>
struct Span {
  static constexpr bool is_whole = kWhole;
  int place, count;  // how many of the eight are there, if any
};

// Eight elements as they are stored.
template <class T>
struct Eight {
  uint32_t words[4];

  FK_DEVICE_MEMBER static Eight of(const float (&x)[8]) {
    Eight e;
#pragma unroll
    for (int j = 0; j < 4; ++j) e.words[j] = T::pack(x[2 * j], x[2 * j + 1]);
    return e;
  }
  FK_DEVICE_MEMBER void values(float (&x)[8]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 both = T::unpack(words[j]);
      x[2 * j] = both.x;
      x[2 * j + 1] = both.y;
    }
  }
};
template <>
struct Eight<float> {
  float x[8];

  FK_DEVICE_MEMBER static Eight of(const float (&values)[8]) {
    Eight e;
#pragma unroll
    for (int j = 0; j < 8; ++j) e.x[j] = values[j];
    return e;
  }
  FK_DEVICE_MEMBER void values(float (&out)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = x[j];
  }
};

// How an operation uses memory: kOnce is not needed again soon, and should not push out what is.
enum class Use { kOnce, kAgain };

// The elements of one tensor, from where a team begins.
template <class T>
class Elements {
 public:
  using Stored = Eight<T>;
  FK_DEVICE_MEMBER Elements(const void* data, uint32_t, int64_t start)
      : at_(static_cast<T*>(const_cast<void*>(data)) + start) {}

  template <class S>
  FK_DEVICE_MEMBER Stored load(const S& s) const {
    Stored e;
    const T* p = at_ + s.place;
    if constexpr (S::is_whole) {
      const uint4 v = load_once(reinterpret_cast<const uint4*>(p));
      e.words[0] = v.x, e.words[1] = v.y, e.words[2] = v.z, e.words[3] = v.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = 2 * j < s.count ? p[2 * j].bits : 0, high = 2 * j + 1 < s.count ? p[2 * j + 1].bits : 0;
        e.words[j] = low | high << 16;
      }
    }
    return e;
  }
  template <Use use = Use::kOnce, class S>
  FK_DEVICE_MEMBER void store(const S& s, const Stored& e) const {
    T* p = at_ + s.place;
    if constexpr (S::is_whole) {
      const uint4 v = make_uint4(e.words[0], e.words[1], e.words[2], e.words[3]);
      if (use == Use::kOnce) {
        store_once(reinterpret_cast<uint4*>(p), v);
      } else {
        *reinterpret_cast<uint4*>(p) = v;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < s.count) p[j].bits = static_cast<uint16_t>(e.words[j / 2] >> 16 * (j % 2));
    }
  }
  // What numbers become when they are stored.
  FK_DEVICE_MEMBER Stored rounded(const float (&x)[8]) const { return Stored::of(x); }
  FK_DEVICE_MEMBER float rounded_one(float x) const { return T::unpack(T::pack(x, 0.0f)).x; }
  FK_DEVICE_MEMBER float get(int place) const { return T::unpack(at_[place].bits).x; }
  FK_DEVICE_MEMBER void put(int place, float x) const { at_[place].bits = static_cast<uint16_t>(T::pack(x, 0.0f)); }

 private:
  T* at_;
};

template <>
class Elements<float> {
 public:
  using Stored = Eight<float>;
  FK_DEVICE_MEMBER Elements(const void* data, uint32_t, int64_t start)
      : at_(static_cast<float*>(const_cast<void*>(data)) + start) {}

  template <class S>
  FK_DEVICE_MEMBER Stored load(const S& s) const {
    Stored e;
    const float* p = at_ + s.place;
    if constexpr (S::is_whole) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 v = load_once(reinterpret_cast<const float4*>(p) + h);
        e.x[4 * h] = v.x, e.x[4 * h + 1] = v.y, e.x[4 * h + 2] = v.z, e.x[4 * h + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) e.x[j] = j < s.count ? p[j] : 0.0f;
    }
    return e;
  }
  template <Use use = Use::kOnce, class S>
  FK_DEVICE_MEMBER void store(const S& s, const Stored& e) const {
    float* p = at_ + s.place;
    if constexpr (S::is_whole) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 v = make_float4(e.x[4 * h], e.x[4 * h + 1], e.x[4 * h + 2], e.x[4 * h + 3]);
        if (use == Use::kOnce) {
          store_once(reinterpret_cast<float4*>(p) + h, v);
        } else {
          reinterpret_cast<float4*>(p)[h] = v;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < s.count) p[j] = e.x[j];
    }
  }
  FK_DEVICE_MEMBER Stored rounded(const float (&x)[8]) const { return Stored::of(x); }
  FK_DEVICE_MEMBER float rounded_one(float x) const { return x; }
  FK_DEVICE_MEMBER float get(int place) const { return at_[place]; }
  FK_DEVICE_MEMBER void put(int place, float x) const { at_[place] = x; }

 private:
  float* at_;
};

template <>
class Elements<AnyFloat> {
 public:
  using Stored = Eight<float>;
  FK_DEVICE_MEMBER Elements(const void* data, uint32_t code, int64_t start)
      : at_(const_cast<void*>(data)), code_(code), start_(start) {}

  template <class S>
  FK_DEVICE_MEMBER Stored load(const S& s) const {
    if (code_ == kIsFloat32) return Elements<float>(at_, 0, start_).load(s);
    float x[8];
    if (code_ == kIsHalf) {
      Elements<Half>(at_, 0, start_).load(s).values(x);
    } else {
      Elements<BFloat16>(at_, 0, start_).load(s).values(x);
    }
    return Stored::of(x);
  }
  template <Use use = Use::kOnce, class S>
  FK_DEVICE_MEMBER void store(const S& s, const Stored& e) const {
    if (code_ == kIsFloat32) {
      Elements<float>(at_, 0, start_).store<use>(s, e);
    } else if (code_ == kIsHalf) {
      Elements<Half>(at_, 0, start_).store<use>(s, Eight<Half>::of(e.x));
    } else {
      Elements<BFloat16>(at_, 0, start_).store<use>(s, Eight<BFloat16>::of(e.x));
    }
  }
  FK_DEVICE_MEMBER Stored rounded(const float (&x)[8]) const {
    if (code_ == kIsFloat32) return Stored::of(x);
    float stored[8];
    if (code_ == kIsHalf) {
      Eight<Half>::of(x).values(stored);
    } else {
      Eight<BFloat16>::of(x).values(stored);
    }
    return Stored::of(stored);
  }
  FK_DEVICE_MEMBER float rounded_one(float x) const {
    if (code_ == kIsFloat32) return x;
    return code_ == kIsHalf ? Half::unpack(Half::pack(x, 0.0f)).x : BFloat16::unpack(BFloat16::pack(x, 0.0f)).x;
  }
  FK_DEVICE_MEMBER float get(int place) const {
    if (code_ == kIsFloat32) return Elements<float>(at_, 0, start_).get(place);
    return code_ == kIsHalf ? Elements<Half>(at_, 0, start_).get(place) : Elements<BFloat16>(at_, 0, start_).get(place);
  }
  FK_DEVICE_MEMBER void put(int place, float x) const {
    if (code_ == kIsFloat32) {
      Elements<float>(at_, 0, start_).put(place, x);
    } else if (code_ == kIsHalf) {
      Elements<Half>(at_, 0, start_).put(place, x);
    } else {
      Elements<BFloat16>(at_, 0, start_).put(place, x);
    }
  }

 private:
  void* at_;
  uint32_t code_;
  int64_t start_;
};

// Four neighbours of one tensor. Where to store is found out anew: with the addresses of all lists in registers the
// arithmetic would have too few.
template <class T>
class Quad {
 public:
  FK_DEVICE_MEMBER Quad(const void* data, int64_t first) : data_(data), first_(first) {}

  FK_DEVICE_MEMBER void get(float (&x)[4]) const {
    const uint2 v = load_once(reinterpret_cast<const uint2*>(static_cast<const T*>(data_) + first_));
    const float2 low = T::unpack(v.x), high = T::unpack(v.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
  template <Use use = Use::kOnce>
  FK_DEVICE_MEMBER void put(const float (&x)[4]) {
    const uint2 v = make_uint2(T::pack(x[0], x[1]), T::pack(x[2], x[3]));
    uint2* at = reinterpret_cast<uint2*>(static_cast<T*>(const_cast<void*>(data_)) + forget(first_));
    if (use == Use::kOnce) {
      store_once(at, v);
    } else {
      *at = v;
    }
  }
  // x becomes what is stored.
  FK_DEVICE_MEMBER static void round(float (&x)[4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 both = T::unpack(T::pack(x[2 * j], x[2 * j + 1]));
      x[2 * j] = both.x;
      x[2 * j + 1] = both.y;
    }
  }

 private:
  const void* data_;
  int64_t first_;
};

template <>
class Quad<float> {
 public:
  FK_DEVICE_MEMBER Quad(const void* data, int64_t first) : data_(data), first_(first) {}

  FK_DEVICE_MEMBER void get(float (&x)[4]) const {
    const float4 v = load_once(reinterpret_cast<const float4*>(static_cast<const float*>(data_) + first_));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
  template <Use use = Use::kOnce>
  FK_DEVICE_MEMBER void put(const float (&x)[4]) {
    const float4 v = make_float4(x[0], x[1], x[2], x[3]);
    float4* at = reinterpret_cast<float4*>(static_cast<float*>(const_cast<void*>(data_)) + forget(first_));
    if (use == Use::kOnce) {
      store_once(at, v);
    } else {
      *at = v;
    }
  }
  FK_DEVICE_MEMBER static void round(float (&)[4]) {}

 private:
  const void* data_;
  int64_t first_;
};

// The threads that have one row, or one segment of a row. What is seldom needed is computed from the tile each time.
template <bool kWhole>
struct Team {
  int first, step;  // the columns of a thread: eight from `first` on, eight from `first + step` on, ...
  int length;       // of the row or segment; -1 for threads that have none
  int64_t start;    // of it in its tensor

  FK_DEVICE_MEMBER explicit Team(const Tile& t) {
    const uint32_t number = number_in(t);
    first = kEight * static_cast<int>(threadIdx.x - number * t.threads);
    step = kEight * t.threads;
    length = number + 1 < t.teams ? t.length : number + 1 == t.teams ? t.last : -1;
    start = t.start + static_cast<int64_t>(number) * t.length;
  }

  // Where its row or segment begins in the tile, which has at most a block's eights.
  FK_DEVICE_MEMBER static int place_in(const Tile& t) { return static_cast<int>(number_in(t)) * t.length; }

  // Which of the tile's teams it is: threadIdx.x / t.threads, exact up to 1024.
  FK_DEVICE_MEMBER static uint32_t number_in(const Tile& t) { return threadIdx.x * t.reciprocal >> 20; }
  FK_DEVICE_MEMBER bool is_there() const { return length >= 0; }
  FK_DEVICE_MEMBER bool leads() const { return first == 0 && is_there(); }
  FK_DEVICE_MEMBER static int64_t row(const Tile& t) { return t.row + ((t.flags & kSegments) != 0 ? 0 : number_in(t)); }
  // Where a history begins: one number a row, or one an element.
  FK_DEVICE_MEMBER static int64_t history_in(const Tile& t) {
    return (t.flags & kFlat) != 0 ? t.start + static_cast<int64_t>(number_in(t)) * t.length : row(t);
  }

  FK_DEVICE_MEMBER Span<kWhole> span(int i) const {
    const int place = first + i * step, rest = length - place;
    return {place, kWhole || rest < kEight ? rest : kEight};
  }
};

// body(i, span) for each of a thread's eights that has elements.
template <int kEights, bool kWhole, class Body>
FK_DEVICE void for_each_eight(const Team<kWhole>& team, const Body& body) {
  Team<kWhole> again = team;
  again.first = kWhole ? team.first : forget(team.first);
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const Span<kWhole> s = again.span(i);
    if (s.count > 0) body(i, s);
  }
}

// The same, one after the other: where nothing of an eight is kept in registers for later. kAll: also for those without
// elements.
template <int kEights, bool kAll = false, bool kWhole, class Body>
FK_DEVICE void for_each_eight_in_turn(const Team<kWhole>& team, const Body& body) {
  Span<kWhole> s = team.span(0);
#pragma unroll 1
  for (int i = 0; i < kEights; ++i) {
    if (kAll || s.count > 0) body(i, s);
    s.place += team.step;
    const int rest = team.length - s.place;
    s.count = kWhole || rest < kEight ? rest : kEight;
  }
}

// How a warp moves the whole eights of its lanes four elements at a time, which needs fewer registers than eight: in
// two turns, in each of which two lanes share an eight, and all of them the sixteen eights of half the lanes. So an
// access of a warp has no gaps. (If each lane moved a half of its own eight and then the other, every access would
// touch twice the sectors of memory that it fills; on an H200 that cost twice the traffic.)
struct SharedEights {
  static constexpr int kTurns = 2;

  FK_DEVICE_MEMBER static int lane() { return static_cast<int>(threadIdx.x % kWarp); }
  // The lane whose eight this lane has a part in.
  FK_DEVICE_MEMBER static int owner(int turn) { return kWarp / kTurns * turn + lane() / 2; }
  FK_DEVICE_MEMBER static bool is_second() { return lane() % 2 != 0; }

  // What the owner has, in both lanes that share its eight.
  template <class T>
  FK_DEVICE_MEMBER static T shared(int turn, T of_owner) {
    return __shfl_sync(kAllLanes, of_owner, owner(turn));
  }
  // For owners, what the second of the lanes that share their eight has found; for others what they have.
  FK_DEVICE_MEMBER static float given(int turn, float found, float otherwise) {
    const float given = __shfl_sync(kAllLanes, found, 2 * (lane() % (kWarp / kTurns)) + 1);
    return lane() / (kWarp / kTurns) == turn ? given : otherwise;
  }
};

// A 0-dim float32 of the device, or its value where the host knows it.
struct Scalar {
  const float* at;
  float value;
  FK_DEVICE_MEMBER float get() const { return at != nullptr ? *at : value; }
};

// A float64 for each tensor that is on the device, or nothing.
struct DeviceNumbers {
  const double* at;
  int64_t stride;
  FK_DEVICE_MEMBER double get(uint32_t k, double host) const { return at != nullptr ? at[k * stride] : host; }
};

}  // namespace flatkern::cuda
