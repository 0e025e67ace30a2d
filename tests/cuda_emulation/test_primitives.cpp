// What each primitive does, against the CUDA C++ Programming Guide (12.x, chapter "C++ Language Extensions"), whose
// words are followed here without the formulas of emulation.h.
#include <cmath>
#include <limits>

#include "cases.h"

namespace {

using flatkern::cuda::launch;
namespace emulation = flatkern::cuda::emulation;

constexpr unsigned kAll = ~0u;
constexpr int kWidths[] = {1, 2, 4, 8, 16, 32};

// --- shuffles --------------------------------------------------------------------------------------------------------

enum Shuffle { kFrom, kXor, kUp, kDown };

template <class T>
struct ShuffleArguments {
  Shuffle kind;
  const T* in;
  T* out;
  int operand, width;
};

template <class T>
__global__ void shuffle_once(FK_PARAM(ShuffleArguments<T>) a) {
  const T value = a.in[threadIdx.x];
  T got{};
  if (a.kind == kFrom) got = __shfl_sync(kAll, value, a.operand, a.width);
  if (a.kind == kXor) got = __shfl_xor_sync(kAll, value, a.operand, a.width);
  if (a.kind == kUp) got = __shfl_up_sync(kAll, value, static_cast<unsigned>(a.operand), a.width);
  if (a.kind == kDown) got = __shfl_down_sync(kAll, value, static_cast<unsigned>(a.operand), a.width);
  a.out[threadIdx.x] = got;
}

// The lane whose value the guide gives to `lane`.
int source_lane(Shuffle kind, int lane, int operand, int width) {
  const int group = lane / width, logical = lane % width;
  switch (kind) {
    case kFrom:  // "srcLane modulo width" of the caller's own group
      return group * width + ((operand % width) + width) % width;
    case kXor:  // "elements from earlier groups", but of later ones "their own value"
      return (lane ^ operand) / width > group ? lane : lane ^ operand;
    case kUp:  // "the lower delta lanes will be unchanged"
      return logical - operand < 0 ? lane : lane - operand;
    default:  // "the upper delta lanes will remain unchanged"
      return logical + operand >= width ? lane : lane + operand;
  }
}

template <class T>
void check_shuffle(Shuffle kind, int operand, int width, const std::vector<T>& in) {
  std::vector<T> out(in.size());
  launch(shuffle_once<T>, 1, static_cast<unsigned>(in.size()), nullptr,
         ShuffleArguments<T>{kind, in.data(), out.data(), operand, width});
  for (size_t thread = 0; thread < in.size(); ++thread) {
    const auto lane = static_cast<int>(thread % 32);
    const size_t source = thread - thread % 32 + static_cast<size_t>(source_lane(kind, lane, operand, width));
    EXPECT(std::memcmp(&out[thread], &in[source], sizeof(T)) == 0);
  }
}

std::vector<int> count_up(int n) {
  std::vector<int> numbers;
  for (int i = 0; i < n; ++i) numbers.push_back(1000 + i);
  return numbers;
}

CASE(shuffles_follow_the_guide_for_every_width) {
  for (const std::string schedule : {"forward", "random:1", "warps:1"}) {
    emulation::set_schedule(schedule);
    for (const int width : kWidths)
      for (int operand = 0; operand < 32; ++operand)
        for (const Shuffle kind : {kFrom, kXor, kUp, kDown}) check_shuffle(kind, operand, width, count_up(64));
  }
}

CASE(shuffle_from_takes_its_source_modulo_the_width) {
  for (const int width : kWidths)
    for (const int operand : {-1, 32, 37, 100}) check_shuffle(kFrom, operand, width, count_up(32));
}

template <class T>
void check_type(std::vector<T> special) {
  special.resize(32, T{3});
  for (const Shuffle kind : {kFrom, kXor, kUp, kDown}) check_shuffle(kind, 1, 32, special);
}

CASE(shuffles_move_every_bit_of_every_type) {
  check_type<float>({-0.0f, std::numeric_limits<float>::quiet_NaN(), __uint_as_float(0x7FC12345), INFINITY, 1e-45f});
  check_type<double>({-0.0, std::numeric_limits<double>::quiet_NaN(), 5e-324, 1.0 / 3});
  check_type<int>({-1, std::numeric_limits<int>::min(), 7});
  check_type<unsigned>({0xFFFFFFFFu, 0x80000000u});
  check_type<long long>({-1, std::numeric_limits<long long>::min(), 0x123456789ABCDEFll});
}

// --- votes, masks ----------------------------------------------------------------------------------------------------

struct Votes {
  unsigned mask, truth;
  unsigned *ballots, *any, *all;
};

__global__ void vote(FK_PARAM(Votes) a) {
  const unsigned lane = threadIdx.x;
  if ((a.mask >> lane & 1) == 0) return;
  const bool mine = a.truth >> lane & 1;
  a.ballots[lane] = __ballot_sync(a.mask, mine);
  a.any[lane] = __any_sync(a.mask, mine);
  a.all[lane] = __all_sync(a.mask, mine);
}

CASE(votes_count_the_lanes_of_the_mask) {
  for (const unsigned mask : {kAll, 0x0000FFFFu, 0x80000001u, 0x00000100u})
    for (const unsigned truth : {0u, kAll, 0xAAAAAAAAu, 0x1u, 0x80000000u, mask}) {
      unsigned ballots[32], any[32], all[32];
      launch(vote, 1, 32, nullptr, Votes{mask, truth, ballots, any, all});
      for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
          EXPECT(ballots[lane] == (truth & mask));
          EXPECT(any[lane] == ((truth & mask) != 0));
          EXPECT(all[lane] == ((truth & mask) == mask));
        }
    }
}

struct Ints {
  int* out;
};

// Two halves of a warp apart: at two operations, and at one with two masks.
__global__ void halves(FK_PARAM(Ints) a) {
  const int lane = static_cast<int>(threadIdx.x), first = lane < 16 ? 0 : 16;
  const unsigned mask = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  int x = 0;
  if (lane < 16) {
    for (int i = 0; i < 5; ++i) x += __shfl_sync(0x0000FFFFu, lane, i);
  } else {
    x = __shfl_xor_sync(0xFFFF0000u, lane, 1);
    __syncwarp(0xFFFF0000u);
  }
  a.out[lane] = x + 1000 * __shfl_sync(mask, lane, first + 3);
}

CASE(disjoint_masks_do_not_wait_for_each_other) {
  for (const std::string& schedule : cases::schedules()) {
    emulation::set_schedule(schedule);
    int out[32];
    launch(halves, 1, 32, nullptr, Ints{out});
    for (int lane = 0; lane < 32; ++lane) EXPECT(out[lane] == (lane < 16 ? 10 + 3000 : (lane ^ 1) + 19000));
  }
}

// An operation in every lane of a loop that warps leave at different times, with the block's barrier behind it.
__global__ void uneven_warps(FK_PARAM(Ints) a) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  int x = 1;
  for (int i = 0; i < warp; ++i) x = __shfl_xor_sync(kAll, x, 16) + 1;
  __syncthreads();
  a.out[threadIdx.x] = x;
}

CASE(warps_advance_independently) {
  for (const std::string& schedule : cases::schedules()) {
    emulation::set_schedule(schedule);
    int out[1024];
    launch(uneven_warps, 1, 1024, nullptr, Ints{out});
    for (int i = 0; i < 1024; ++i) EXPECT(out[i] == 1 + i / 32);
  }
}

// --- indices, memory -------------------------------------------------------------------------------------------------

struct Indices {
  int* visits;
  int* wrong;
  int grid, block;
};

__global__ void visit(FK_PARAM(Indices) a) {
  ++a.visits[blockIdx.x * blockDim.x + threadIdx.x];
  *a.wrong += static_cast<int>(gridDim.x) != a.grid || static_cast<int>(blockDim.x) != a.block;
  *a.wrong += threadIdx.y + threadIdx.z + blockIdx.y + blockIdx.z != 0;
  *a.wrong += blockDim.y * blockDim.z * gridDim.y * gridDim.z != 1;
}

CASE(every_thread_of_every_block_runs_once) {
  for (const std::string& schedule : cases::schedules())
    for (const int block : {1, 31, 33, 256, 1024})
      for (const int grid : {1, 2, 7, 64}) {
        emulation::set_schedule(schedule);
        std::vector<int> visits(static_cast<size_t>(grid) * block);
        int wrong = 0;
        launch(visit, grid, block, nullptr, Indices{visits.data(), &wrong, grid, block});
        EXPECT(std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; }) && wrong == 0);
      }
}

struct Seen {
  float* out;
};

struct Pair {
  unsigned first;
  double second;
};

// Each block finds NaN, and the threads of a block find what the others have written.
__global__ void shared_values(FK_PARAM(Seen) a) {
  FK_SHARED(float[64], values);
  FK_SHARED(Pair, pair);
  a.out[3 * blockIdx.x] = values[63 - threadIdx.x];
  const bool fresh = pair.second != pair.second && pair.first == 0xFFFFFFFFu;
  __syncthreads();
  values[threadIdx.x] = static_cast<float>(blockIdx.x);
  if (threadIdx.x == 5) pair = {7, 0.5};
  __syncthreads();
  if (threadIdx.x > 0) return;
  a.out[3 * blockIdx.x + 1] = values[63];
  a.out[3 * blockIdx.x + 2] = fresh && pair.first == 7 && pair.second == 0.5;
}

CASE(shared_memory_is_each_blocks_own_and_begins_as_nan) {
  for (const std::string& schedule : cases::schedules()) {
    emulation::set_schedule(schedule);
    float out[3 * 5];
    launch(shared_values, 5, 64, nullptr, Seen{out});
    for (int block = 0; block < 5; ++block) {
      EXPECT(std::isnan(out[3 * block]));
      EXPECT(out[3 * block + 1] == static_cast<float>(block));
      EXPECT(out[3 * block + 2] == 1.0f);
    }
  }
}

struct Vectors {
  const float4* in;
  float4* out;
  const uint2* words;
  uint2* copies;
};

__global__ void copy_vectors(FK_PARAM(Vectors) a) {
  const unsigned i = threadIdx.x;
  const float4 x = i % 2 == 0 ? __ldg(a.in + i) : i % 3 == 0 ? __ldcs(a.in + i) : __ldcg(a.in + i);
  if (i % 2 == 0)
    __stcs(a.out + i, make_float4(x.w, x.z, x.y, x.x));
  else
    __stcg(a.out + i, make_float4(x.w, x.z, x.y, x.x));
  __stcs(a.copies + i, __ldg(a.words + i));
}

CASE(vectors_are_loaded_and_stored) {
  static_assert(alignof(float4) == 16 && alignof(uint4) == 16 && alignof(int4) == 16 && sizeof(float4) == 16);
  static_assert(alignof(float2) == 8 && alignof(uint2) == 8 && sizeof(float2) == 8);
  std::vector<float4> in(32), out(32);
  std::vector<uint2> words(32), copies(32);
  for (unsigned i = 0; i < 32; ++i) {
    const auto x = static_cast<float>(i);
    in[i] = make_float4(x, x + 0.25f, x + 0.5f, x + 0.75f);
    words[i] = make_uint2(i, ~i);
  }
  launch(copy_vectors, 1, 32, nullptr, Vectors{in.data(), out.data(), words.data(), copies.data()});
  for (unsigned i = 0; i < 32; ++i) {
    EXPECT(out[i].x == in[i].w && out[i].y == in[i].z && out[i].z == in[i].y && out[i].w == in[i].x);
    EXPECT(copies[i].x == i && copies[i].y == ~i);
  }
}

struct Ticket {
  unsigned *ticket, *total, *largest;
  int* last;
};

// The last block to finish is told by a counter that begins again at 0, so that the next launch finds it so.
__global__ void last_block(FK_PARAM(Ticket) a) {
  FK_SHARED(bool, is_last);
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  atomicAdd(a.total, threadIdx.x);
  atomicMax(a.largest, blockIdx.x);
  if (is_last && threadIdx.x == 0) ++*a.last;
}

CASE(atomics_return_the_old_value_and_the_ticket_resets) {
  unsigned ticket = 0, total = 0, largest = 0;
  int last = 0;
  for (const std::string& schedule : cases::schedules()) {
    emulation::set_schedule(schedule);
    launch(last_block, 9, 64, nullptr, Ticket{&ticket, &total, &largest, &last});
  }
  const auto times = static_cast<unsigned>(cases::schedules().size());
  EXPECT(ticket == 0 && last == static_cast<int>(times) && largest == 8 && total == times * 9 * 63 * 64 / 2);
  unsigned word = 5;
  EXPECT(atomicAdd(&word, 3u) == 5 && word == 8);
  EXPECT(atomicMax(&word, 2) == 8 && word == 8);
  EXPECT(atomicInc(&word, 8) == 8 && word == 0);
  EXPECT(atomicInc(&word, 8) == 0 && word == 1);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

CASE(arithmetic_rounds_each_operation_once) {
  const float a = 1.0f + 0x1p-23f;
  EXPECT(__fmaf_rn(a, a, -1.0f - 0x1p-22f) == 0x1p-46f);  // exact inside
  EXPECT(__fadd_rn(__fmul_rn(a, a), -1.0f - 0x1p-22f) == 0.0f);
  EXPECT(__fsub_rn(1.0f, 0x1p-25f) == 1.0f && __fdiv_rn(1.0f, 3.0f) == 0x1.555556p-2f);
  EXPECT(__fsqrt_rn(2.0f) == 0x1.6a09e6p+0f && __double2float_rn(1.0 + 0x1p-24) == 1.0f);
  EXPECT(__float_as_uint(-0.0f) == 0x80000000u && __uint_as_float(0x3F800000u) == 1.0f);
  static_assert(std::is_same_v<decltype(sqrt(1.0f)), float> && std::is_same_v<decltype(fabs(1.0f)), float>);
}

CASE(min_and_max_are_those_of_cuda) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT(min(1.0f, nan) == 1.0f && max(nan, 1.0f) == 1.0f && min(-1.0f, 2.0f) == -1.0f);
  EXPECT(min(-1, 2) == -1 && max(2u, 1u) == 2u && max(int64_t{1} << 40, 3) == int64_t{1} << 40);
  EXPECT(min(-1, 2u) == 2u);  // unsigned wins, as in C
}

}  // namespace
