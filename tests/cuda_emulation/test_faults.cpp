// What CUDA forbids is found under every schedule, and the text says where.
#include <thread>

#include "cases.h"

namespace {

using flatkern::cuda::launch;
namespace emulation = flatkern::cuda::emulation;

constexpr unsigned kAll = ~0u;

struct Arguments {
  int* line;  // of the fault
  float* out;
};

// Notes the line for the operation beside it, or below it.
#define HERE *a.line = __LINE__
#define BELOW *a.line = __LINE__ + 1

bool contains(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

__global__ void correct(FK_PARAM(Arguments) a) {
  FK_SHARED(float[256], values);
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  a.out[threadIdx.x] = __shfl_xor_sync(kAll, values[255 - threadIdx.x], 1);
}

// `kernel` ends with a fault whose text has one of `texts` and the line, under every schedule; the next launch is well.
void expect_fault(void (*kernel)(FK_PARAM(Arguments)), unsigned block, const std::vector<std::string>& texts) {
  alignas(16) float out[256];
  for (const std::string& schedule : cases::schedules()) {
    emulation::set_schedule(schedule);
    int line = 0;
    const std::string fault = cases::fault_of([&] { launch(kernel, 3, block, nullptr, Arguments{&line, out}); });
    bool told = false;
    for (const std::string& text : texts) told = told || contains(fault, text);
    if (!told) throw std::runtime_error(schedule + ", expected \"" + texts[0] + "\", got \"" + fault + "\"");
    EXPECT(contains(fault, "test_faults.cpp:" + std::to_string(line) + ": ") || contains(fault, "deadlock"));
    EXPECT(contains(fault, "block ") && contains(fault, "[schedule " + schedule));
    EXPECT(cases::fault_of([&] { launch(correct, 2, 256, nullptr, Arguments{&line, out}); }).empty());
    EXPECT(out[0] == 1.0f && out[255] == 1.0f);
  }
}

// --- barriers --------------------------------------------------------------------------------------------------------

__global__ void two_barriers(FK_PARAM(Arguments) a) {
  if (threadIdx.x < 40)
    HERE, __syncthreads();
  else
    HERE, __syncthreads();
}

CASE(threads_at_different_barriers) { expect_fault(two_barriers, 64, {"is at this __syncthreads, but thread"}); }

__global__ void early_return(FK_PARAM(Arguments) a) {
  if (threadIdx.x == 37) return;
  HERE, __syncthreads();
}

__global__ void early_return_of_last(FK_PARAM(Arguments)) {
  if (threadIdx.x < 1023) __syncthreads();
}

CASE(a_thread_returns_before_a_barrier) {
  expect_fault(early_return, 64,
               {"thread 37 returns from the kernel while thread", "but thread 37 has returned from the kernel"});
}

// The fault under one schedule.
std::string fault_under(const std::string& schedule, void (*kernel)(FK_PARAM(Arguments)), unsigned block) {
  alignas(16) static float out[1024];
  static int line;
  emulation::set_schedule(schedule);
  return cases::fault_of([&] { launch(kernel, 1, block, nullptr, Arguments{&line, out}); });
}

CASE(the_last_thread_returns_while_all_others_wait) {
  EXPECT(contains(fault_under("forward", early_return, 38), "thread 37 returns from the kernel while thread 0 waits"));
  EXPECT(contains(fault_under("reverse", early_return, 38), "but thread 37 has returned from the kernel"));
}

__global__ void barrier_in_one_warp(FK_PARAM(Arguments) a) {
  if (threadIdx.x < 16)
    HERE, __syncthreads();
  else
    __syncwarp();
  __syncthreads();
}

CASE(a_barrier_and_a_warp_operation_wait_for_each_other) {
  expect_fault(barrier_in_one_warp, 32, {"deadlock in block"});
  const std::string text = fault_under("forward", barrier_in_one_warp, 32);
  EXPECT(contains(text, "16 of its threads, thread 0 the first, wait at __syncthreads ("));
  EXPECT(contains(text, "16 of its threads, thread 16 the first, wait at __syncwarp ("));
}

// A fault leaves fibers behind in the middle of their work; their stacks have to come back.
CASE(stacks_survive_faults) {
  for (int i = 0; i < 200; ++i)
    EXPECT(contains(fault_under("forward", early_return_of_last, 1024), "thread 1023 returns"));
}

// --- warp operations
// ---------------------------------------------------------------------------------------------------

__global__ void mask_names_returned(FK_PARAM(Arguments) a) {
  if (threadIdx.x == 3) return;
  HERE, a.out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 16);
}

CASE(a_mask_names_a_lane_that_has_returned) {
  expect_fault(mask_names_returned, 32, {"names thread 3, but that has returned", "thread 3 returns from the kernel"});
  const std::string text = fault_under("forward", mask_names_returned, 32);
  EXPECT(contains(text, "thread 3 returns from the kernel while lane 0 of its warp waits for it at __shfl_xor_sync"));
}

__global__ void mask_names_nobody(FK_PARAM(Arguments) a) { HERE, a.out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1); }

CASE(a_mask_names_a_lane_that_never_was) {
  expect_fault(mask_names_nobody, 20, {"names thread 20, but that is not in the block"});
}

__global__ void mask_without_caller(FK_PARAM(Arguments) a) {
  if (threadIdx.x < 8) HERE, a.out[threadIdx.x] = static_cast<float>(__ballot_sync(0x7Fu, 1));
}

CASE(a_mask_lacks_the_calling_lane) {
  expect_fault(mask_without_caller, 32, {"lacks its own lane 7", "with 0x0000007f"});
}

__global__ void reads_outside(FK_PARAM(Arguments) a) {
  if (threadIdx.x < 8) HERE, a.out[threadIdx.x] = __shfl_sync(0xFFu, 1.0f, 9);
}

CASE(a_shuffle_reads_a_lane_outside_of_its_mask) {
  expect_fault(reads_outside, 32, {"reads lane 9 by __shfl_sync, which its mask 0x000000ff does not name"});
}

__global__ void different_operations(FK_PARAM(Arguments) a) {
  if (threadIdx.x % 2 == 0)
    HERE, a.out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 2);
  else
    HERE, a.out[threadIdx.x] = __shfl_xor_sync(kAll, 2.0f, 2);
}

CASE(lanes_at_different_warp_operations) {
  expect_fault(different_operations, 32, {"calls __shfl_xor_sync with the mask 0xffffffff, but lane"});
}

__global__ void one_line(FK_PARAM(Arguments) a) {
  // clang-format off
  HERE, a.out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(kAll, 1.0f, 2) : __shfl_xor_sync(kAll, 2.0f, 2);
  // clang-format on
}

CASE(two_shuffles_on_one_line_are_told_apart) {
  expect_fault(one_line, 32, {"calls __shfl_xor_sync with the mask 0xffffffff, but lane"});
}

__global__ void different_masks(FK_PARAM(Arguments) a) { HERE, __syncwarp(threadIdx.x < 16 ? kAll : 0xFFFF0000u); }

CASE(lanes_come_with_different_masks) {
  expect_fault(different_masks, 32, {"but lane", "names thread 16, but that has returned"});
}

__global__ void odd_width(FK_PARAM(Arguments) a) { HERE, a.out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1, 12); }

CASE(a_width_that_shuffles_do_not_know) { expect_fault(odd_width, 32, {"with the width 12"}); }

// --- memory
// ------------------------------------------------------------------------------------------------------------

#if !defined(__SANITIZE_ADDRESS__)  // which ends the process at the write

template <int kIndex>
__global__ void past_shared(FK_PARAM(Arguments) a) {
  BELOW;
  FK_SHARED(float[8], values);
  if (threadIdx.x == 0) *(&values[0] + kIndex) = __uint_as_float(0xFFFFFFFFu);
}

CASE(writes_beside_shared_memory) {
  expect_fault(past_shared<8>, 32, {"wrote 32 bytes behind the beginning of FK_SHARED values, which has 32"});
  expect_fault(past_shared<-1>, 32, {"wrote -4 bytes behind the beginning of FK_SHARED values"});
}

#endif

template <int kBytes>
__global__ void much_shared(FK_PARAM(Arguments) a) {
  FK_SHARED(char[1024], first);
  first[threadIdx.x] = 0;
  BELOW;
  FK_SHARED(char[kBytes - 1024], second);
  second[threadIdx.x] = 0;
}

CASE(more_shared_memory_than_a_block_has) {
  expect_fault(much_shared<(48 << 10) + 1>, 32, {"has 49153 bytes of shared memory, but should have at most 49152"});
  int line = 0;
  EXPECT(cases::fault_of([&] { launch(much_shared<48 << 10>, 2, 32, nullptr, Arguments{&line, nullptr}); }).empty());
}

__global__ void misaligned_load(FK_PARAM(Arguments) a) {
  HERE, a.out[0] += __ldg(reinterpret_cast<const float4*>(a.out + 1)).x;
}

__global__ void misaligned_store(FK_PARAM(Arguments) a) {
  HERE, __stcs(reinterpret_cast<float4*>(a.out + 2), make_float4(0, 0, 0, 0));
}

CASE(vectors_at_addresses_that_16_does_not_divide) {
  expect_fault(misaligned_load, 32, {"by __ldg, but its type needs an address that 16 divides"});
  expect_fault(misaligned_store, 32, {"by __stcs, but its type needs an address that 16 divides"});
}

#if !defined(FK_UBSAN)  // which ends the process there

__global__ void misaligned_read(FK_PARAM(Arguments) a) {
  const float4* vectors = reinterpret_cast<const float4*>(a.out + 1);
  HERE, a.out[0] = vectors->y;
}

__global__ void misaligned_write(FK_PARAM(Arguments) a) {
  float4* vectors = reinterpret_cast<float4*>(a.out + 3);
  HERE, *vectors = make_float4(0, 0, 0, 0);
}

__global__ void shared_floats_as_vectors(FK_PARAM(Arguments) a) {
  FK_SHARED(float[32], values);
  HERE, a.out[0] = reinterpret_cast<const float4*>(values)->x;
}

CASE(misaligned_accesses_by_plain_pointers) {
  const std::vector<std::string> text = {"but the type needs an address that 16 divides"};
  expect_fault(misaligned_read, 32, text);
  expect_fault(misaligned_write, 32, text);
  expect_fault(shared_floats_as_vectors, 32, text);
}

__global__ void index_behind_array(FK_PARAM(Arguments) a) {
  FK_SHARED(float[32], values);
  HERE, values[threadIdx.x + 20] = 0.0f;
}

CASE(an_index_outside_of_an_array) {
  expect_fault(index_behind_array, 32, {"uses index 3", "uses index 4", "uses index 5"});
}

#endif

// --- launches
// ----------------------------------------------------------------------------------------------------------

template <size_t kBytes>
struct Large {
  char bytes[kBytes];
};

template <size_t kBytes>
__global__ void nothing(FK_PARAM(Large<kBytes>)) {}

template <size_t kBytes>
std::string refusal(unsigned grid, unsigned block) {
  return cases::fault_of([&] { launch(nothing<kBytes>, grid, block, nullptr, Large<kBytes>{}); });
}

CASE(launches_that_cuda_refuses) {
  const int64_t before = emulation::launches();
  EXPECT(contains(refusal<1>(1, 1025), "a block has 1025 threads"));
  EXPECT(contains(refusal<1>(1, 0), "a block has 0 threads"));
  EXPECT(contains(refusal<1>(0, 32), "the grid has 0 blocks"));
  EXPECT(contains(refusal<1>(0x80000000u, 32), "the grid has 2147483648 blocks"));
  EXPECT(contains(refusal<32765>(1, 1), "the parameters have 32765 bytes"));
  EXPECT(emulation::launches() == before);
  EXPECT(refusal<32764>(1, 1024).empty() && emulation::launches() == before + 1);
}

struct Inside {
  std::string* text;
};

__global__ void launches_elsewhere(FK_PARAM(Inside) a) {
  if (threadIdx.x > 0) return;
  std::thread([&] { *a.text = refusal<1>(1, 1); }).join();
}

__global__ void launches_inside(FK_PARAM(Inside)) { launch(nothing<1>, 1, 1, nullptr, Large<1>{}); }

CASE(one_os_thread_at_a_time) {
  std::string text;
  EXPECT(cases::fault_of([&] { launch(launches_elsewhere, 1, 32, nullptr, Inside{&text}); }).empty());
  EXPECT(contains(text, "another OS thread's kernel is running"));
  EXPECT(
      contains(cases::fault_of([&] { launch(launches_inside, 1, 1, nullptr, Inside{&text}); }), "launches a kernel"));
  EXPECT(refusal<1>(1, 1).empty());
  std::thread([&] { text = refusal<1>(1, 1); }).join();  // afterwards it may be another one's turn
  EXPECT(text.empty());
}

__global__ void write(FK_PARAM(Arguments) a) { ++*a.line; }

CASE(launch_nothing_checks_and_counts) {
  int line = 0;
  const int64_t before = emulation::launches();
  emulation::launch_nothing(true);
  launch(write, 1, 32, nullptr, Arguments{&line, nullptr});
  const std::string text = refusal<1>(1, 2000);
  emulation::launch_nothing(false);
  EXPECT(line == 0 && contains(text, "2000 threads") && emulation::launches() == before + 1);
  launch(write, 1, 32, nullptr, Arguments{&line, nullptr});
  EXPECT(line == 32 && emulation::launches() == before + 2);
}

CASE(there_are_two_devices) {
  EXPECT(emulation::current_device() == 0);
  emulation::set_current_device(1);
  EXPECT(emulation::current_device() == 1);
  emulation::set_current_device(0);
  for (const int index : {-1, 2}) {
    bool refused = false;
    try {
      emulation::set_current_device(index);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    EXPECT(refused && emulation::current_device() == 0);
  }
}

}  // namespace
