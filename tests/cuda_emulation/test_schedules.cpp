// The schedules permute what they say, and a kernel without one of its barriers goes wrong under some of them.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>

#include "cases.h"

namespace {

using flatkern::cuda::launch;
namespace emulation = flatkern::cuda::emulation;
using Order = std::vector<unsigned>;

struct Log {
  Order *threads, *after, *blocks;
};

// Who comes when: before the barrier, behind it, and block by block.
__global__ void record(FK_PARAM(Log) a) {
  if (blockIdx.x == 0) a.threads->push_back(threadIdx.x);
  __syncthreads();
  if (blockIdx.x == 0) a.after->push_back(threadIdx.x);
  if (threadIdx.x == 0) a.blocks->push_back(blockIdx.x);
}

struct Orders {
  Order threads, after, blocks;
};

Orders orders_of_next_launch(unsigned grid, unsigned block) {
  Orders seen;
  launch(record, grid, block, nullptr, Log{&seen.threads, &seen.after, &seen.blocks});
  return seen;
}

Orders orders(const std::string& schedule, unsigned grid = 12, unsigned block = 256) {
  emulation::set_schedule(schedule);
  return orders_of_next_launch(grid, block);
}

Order count_up(unsigned n) {
  Order order(n);
  for (unsigned i = 0; i < n; ++i) order[i] = i;
  return order;
}

Order count_down(unsigned n) {
  Order order = count_up(n);
  std::reverse(order.begin(), order.end());
  return order;
}

bool is_permutation(Order order, unsigned n) {
  std::sort(order.begin(), order.end());
  return order == count_up(n);
}

// How often the next is of another warp.
int changes_of_warp(const Order& order) {
  int changes = 0;
  for (size_t i = 1; i < order.size(); ++i) changes += order[i] / 32 != order[i - 1] / 32;
  return changes;
}

CASE(forward_and_reverse_are_exact) {
  const Orders forward = orders("forward"), reverse = orders("reverse");
  EXPECT(forward.threads == count_up(256) && forward.after == count_up(256) && forward.blocks == count_up(12));
  EXPECT(reverse.threads == count_down(256) && reverse.after == count_down(256) && reverse.blocks == count_down(12));
}

CASE(random_and_warps_permute_everything_and_repeat_with_their_seed) {
  for (const std::string name : {"random", "warps"}) {
    std::set<Order> threads, after, blocks;
    for (int seed = 0; seed < 8; ++seed) {
      const std::string schedule = name + ":" + std::to_string(seed);
      const Orders seen = orders(schedule), again = orders(schedule);
      EXPECT(is_permutation(seen.threads, 256) && is_permutation(seen.after, 256) && is_permutation(seen.blocks, 12));
      EXPECT(seen.threads == again.threads && seen.after == again.after && seen.blocks == again.blocks);
      threads.insert(seen.threads);
      after.insert(seen.after);
      blocks.insert(seen.blocks);
    }
    EXPECT(threads.size() == 8 && after.size() == 8 && blocks.size() >= 6);
  }
}

CASE(warps_runs_one_warp_as_far_as_it_can) {
  EXPECT(changes_of_warp(orders("warps:1").threads) == 7);
  EXPECT(changes_of_warp(orders("random:1").threads) > 100);
}

CASE(any_lane_and_any_warp_can_be_first) {
  for (const std::string name : {"random:", "warps:"}) {
    std::set<unsigned> lanes, warps;
    for (int seed = 0; seed < 400; ++seed) {
      const unsigned first = orders(name + std::to_string(seed), 1, 1024).threads.front();
      lanes.insert(first % 32);
      warps.insert(first / 32);
    }
    EXPECT(lanes.size() == 32 && warps.size() == 32);
  }
}

CASE(launches_take_the_schedules_in_turn) {
  emulation::set_schedule("");
  std::set<Order> seen;
  for (int i = 0; i < 8; ++i) seen.insert(orders_of_next_launch(1, 256).threads);
  EXPECT(seen.count(count_up(256)) == 1 && seen.count(count_down(256)) == 1);
  EXPECT(seen.size() == 6);  // two of random and two of warps, by other seeds
}

CASE(without_a_seed_every_launch_has_another) {
  emulation::set_schedule("random");
  EXPECT(orders_of_next_launch(1, 256).threads != orders_of_next_launch(1, 256).threads);
}

CASE(the_environment_sets_the_schedule_unless_the_program_does) {
  setenv("FLATKERN_EMULATION_SCHEDULE", "reverse", 1);
  const Order by_environment = orders("").threads, by_program = orders("forward").threads;
  setenv("FLATKERN_EMULATION_SCHEDULE", "sideways", 1);
  emulation::set_schedule("");
  bool refused = false;
  try {
    orders_of_next_launch(1, 32);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  unsetenv("FLATKERN_EMULATION_SCHEDULE");
  EXPECT(by_environment == count_down(256) && by_program == count_up(256) && refused);
}

CASE(unknown_schedules_are_refused) {
  for (const char* text : {"sideways", "random:", "random:x", "random:-1", ":3", "warps:1:2"}) {
    bool refused = false;
    try {
      emulation::set_schedule(text);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    EXPECT(refused);
  }
}

// --- missing barriers
// --------------------------------------------------------------------------------------------------

struct Sums {
  const float* in;
  float* out;
  int* lines;  // of the two barriers
};

// The sum over the block, which everyone needs, of two values one after the other.
__device__ float block_sum(float x, float* red, int* lines) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) red[threadIdx.x / 32] = x;
  lines[0] = __LINE__, __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += red[warp];
  lines[1] = __LINE__, __syncthreads();  // before the next call writes
  return sum;
}

__global__ void two_sums(FK_PARAM(Sums) a) {
  FK_SHARED(float[32], red);
  const float x = a.in[threadIdx.x];
  const float first = block_sum(x, red, a.lines);
  a.out[threadIdx.x] = first + 1000.0f * block_sum(2.0f * x, red, a.lines);
}

// Under which schedules two_sums gives a wrong result.
std::set<std::string> wrong_under(int* lines) {
  std::vector<float> in(256), out(256);
  float sum = 0.0f;
  for (int i = 0; i < 256; ++i) sum += in[i] = static_cast<float>(i % 7);
  std::set<std::string> wrong;
  for (const std::string& schedule : cases::schedules()) {
    emulation::set_schedule(schedule);
    launch(two_sums, 1, 256, nullptr, Sums{in.data(), out.data(), lines});
    // Not `out != expected` alone: a NaN is wrong too, and equals nothing.
    if (!std::all_of(out.begin(), out.end(), [&](float x) { return x == sum + 2000.0f * sum; })) wrong.insert(schedule);
  }
  return wrong;
}

void without(const std::string& places) { setenv("FLATKERN_EMULATION_WITHOUT", places.c_str(), 1); }

CASE(a_missing_barrier_makes_results_wrong) {
  int lines[2];
  EXPECT(wrong_under(lines).empty());
  const std::string file = "test_schedules.cpp:";
  without(file + std::to_string(lines[0]));
  const std::set<std::string> no_barrier_behind_writes = wrong_under(lines);
  without("other.cu:7,cuda_emulation/" + file + std::to_string(lines[1]));
  const std::set<std::string> no_barrier_before_reuse = wrong_under(lines);
  without("schedules.cpp:" + std::to_string(lines[0]) + "," + file + std::to_string(lines[0]) + "0");
  const std::set<std::string> other_places = wrong_under(lines);
  unsetenv("FLATKERN_EMULATION_WITHOUT");
  EXPECT(no_barrier_behind_writes.size() >= 6);
  EXPECT(no_barrier_before_reuse.count("reverse") == 1 && no_barrier_before_reuse.count("warps:1") == 1);
  EXPECT(other_places.empty());
  EXPECT(wrong_under(lines).empty());
}

CASE(barriers_are_named_by_file_and_line) {
  for (const char* text : {"update.cu", "update.cu:", ":12", "update.cu:12a", "update.cu:12,,other.cu:3"}) {
    without(text);
    bool refused = false;
    try {
      orders_of_next_launch(1, 32);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    unsetenv("FLATKERN_EMULATION_WITHOUT");
    EXPECT(refused);
  }
}

struct Exchange {
  int* out;
  int* line;
};

__global__ void neighbours(FK_PARAM(Exchange) a) {
  FK_SHARED(int[32], values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  *a.line = __LINE__, __syncwarp();
  a.out[threadIdx.x] = values[threadIdx.x ^ 1];
}

CASE(a_missing_barrier_of_a_warp_makes_results_wrong) {
  int line = 0, out[32];
  for (const bool missing : {false, true}) {
    if (missing) without("test_schedules.cpp:" + std::to_string(line));
    launch(neighbours, 1, 32, nullptr, Exchange{out, &line});
    bool right = true;
    for (int i = 0; i < 32; ++i) right = right && out[i] == (i ^ 1);
    unsetenv("FLATKERN_EMULATION_WITHOUT");
    EXPECT(right != missing);
  }
}

}  // namespace
