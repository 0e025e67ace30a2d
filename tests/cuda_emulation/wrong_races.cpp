// Kernels whose threads race, each beside the same without the race: what ThreadSanitizer is told (happens_before.h).
// Those of a racy_ case are reported in a line that ends in "racy"; of an ordered_ case nothing is reported.
#include "cases.h"

namespace {

using flatkern::cuda::launch;

constexpr unsigned kAll = ~0u;

struct Arguments {
  unsigned *out, *ticket;
};

void run(void (*kernel)(FK_PARAM(Arguments)), unsigned grid, unsigned block) {
  std::vector<unsigned> out(1024), ticket(1);
  launch(kernel, grid, block, nullptr, Arguments{out.data(), ticket.data()});
}

// Shared memory is written by one warp and read by another.
template <bool kRacy>
__global__ void exchange(FK_PARAM(Arguments) a) {
  FK_SHARED(unsigned[64], values);
  values[threadIdx.x] = threadIdx.x;  // racy
  if (!kRacy) __syncthreads();
  a.out[threadIdx.x] = values[63 - threadIdx.x];  // racy
}

CASE(racy_no_barrier) { run(exchange<true>, 1, 64); }
CASE(ordered_by_a_barrier) { run(exchange<false>, 1, 64); }

// It is read by all, and then written anew.
template <bool kRacy>
__global__ void use_again(FK_PARAM(Arguments) a) {
  FK_SHARED(unsigned[1], value);
  for (unsigned i = 0; i < 2; ++i) {
    if (threadIdx.x == 40) value[0] = i;  // racy
    __syncthreads();
    a.out[2 * threadIdx.x + i] = value[0];  // racy
    if (!kRacy) __syncthreads();
  }
}

CASE(racy_no_barrier_before_another_use) { run(use_again<true>, 1, 64); }
CASE(ordered_by_a_barrier_before_another_use) { run(use_again<false>, 1, 64); }

// A shuffle brings the lanes together, and orders no memory.
template <bool kRacy>
__global__ void shuffled(FK_PARAM(Arguments) a) {
  FK_SHARED(unsigned[32], values);
  values[threadIdx.x] = threadIdx.x;  // racy
  const unsigned other = __shfl_xor_sync(kAll, threadIdx.x, 1);
  if (!kRacy) __syncwarp();
  a.out[threadIdx.x] = values[other];  // racy
}

CASE(racy_only_a_shuffle_between) { run(shuffled<true>, 1, 32); }
CASE(ordered_by_syncwarp) { run(shuffled<false>, 1, 32); }

template <bool kRacy>
__global__ void voted(FK_PARAM(Arguments) a) {
  FK_SHARED(unsigned[1], value);
  if (threadIdx.x == 7) value[0] = 1;  // racy
  const unsigned votes = __ballot_sync(kAll, threadIdx.x == 7);
  if (!kRacy) __syncwarp();
  a.out[threadIdx.x] = votes + value[0];  // racy
}

CASE(racy_only_a_ballot_between) { run(voted<true>, 1, 32); }
CASE(ordered_by_syncwarp_behind_a_ballot) { run(voted<false>, 1, 32); }

// A barrier of some lanes does not order them with the others.
template <bool kRacy>
__global__ void halves(FK_PARAM(Arguments) a) {
  FK_SHARED(unsigned[32], values);
  values[threadIdx.x] = threadIdx.x;  // racy
  __syncwarp(threadIdx.x < 16 ? 0xFFFFu : 0xFFFF0000u);
  a.out[threadIdx.x] = values[threadIdx.x ^ (kRacy ? 16 : 8)];  // racy
}

CASE(racy_syncwarp_of_other_lanes) { run(halves<true>, 1, 32); }
CASE(ordered_by_syncwarp_of_some_lanes) { run(halves<false>, 1, 32); }

// Of two warps.
__global__ void warps(FK_PARAM(Arguments) a) {
  FK_SHARED(unsigned[64], values);
  values[threadIdx.x] = threadIdx.x;  // racy
  __syncwarp();
  a.out[threadIdx.x] = values[threadIdx.x ^ 32];  // racy
}

CASE(racy_syncwarp_of_another_warp) { run(warps, 1, 64); }

// A barrier does not order blocks.
__global__ void blocks(FK_PARAM(Arguments) a) {
  __syncthreads();
  if (threadIdx.x == 0) a.out[0] = blockIdx.x;  // racy
  __syncthreads();
}

CASE(racy_blocks) { run(blocks, 2, 32); }
CASE(ordered_launches) {
  unsigned out = 0;
  for (int i = 0; i < 3; ++i) launch(blocks, 1, 32, nullptr, Arguments{&out, nullptr});
}

// The block that comes last reads what the others have left, in another of its threads.
template <bool kPublishes, bool kLooks, bool kShares>
__global__ void ticket(FK_PARAM(Arguments) a) {
  FK_SHARED(bool[1], is_last);
  if (threadIdx.x == 0) {
    a.out[blockIdx.x] = blockIdx.x;  // racy
    if (kPublishes) __threadfence();
    is_last[0] = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;  // racy
    if (kLooks) __threadfence();
  }
  if (kShares) __syncthreads();
  if (!is_last[0]) return;                                   // racy
  a.out[32 + threadIdx.x] = a.out[threadIdx.x % gridDim.x];  // racy
}

CASE(racy_ticket_without_a_fence_before) { run(ticket<false, true, true>, 4, 32); }
CASE(racy_ticket_without_a_fence_behind) { run(ticket<true, false, true>, 4, 32); }
CASE(racy_ticket_that_is_not_shared) { run(ticket<true, true, false>, 4, 32); }
CASE(racy_ticket_without_anything) { run(ticket<false, false, true>, 4, 32); }

// The same, where one block alone writes behind it.
__global__ void ordered_ticket(FK_PARAM(Arguments) a) {
  FK_SHARED(bool[1], is_last);
  if (threadIdx.x == 0) {
    a.out[blockIdx.x] = blockIdx.x;
    __threadfence();
    is_last[0] = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0]) a.out[32 + threadIdx.x] = a.out[threadIdx.x % gridDim.x];
}

CASE(ordered_by_a_ticket) {
  std::vector<unsigned> out(1024), counter(1);
  for (int times = 0; times < 3; ++times) launch(ordered_ticket, 4, 32, nullptr, Arguments{out.data(), counter.data()});
}

// The same where all threads write and read: every one has a fence, and one has the ticket, between barriers.
template <bool kPublish, bool kLook>
__global__ void ticket_of_all(FK_PARAM(Arguments) a) {
  FK_SHARED(bool[1], is_last);
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;  // racy
  if (kPublish || threadIdx.x == 0) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (kLook) __threadfence();
  if (!is_last[0]) return;
  for (unsigned block = 0; block < gridDim.x; ++block)
    a.out[512 + threadIdx.x] += a.out[block * blockDim.x + (threadIdx.x + 1) % blockDim.x];  // racy
}

CASE(ordered_by_fences_of_all) { run(ticket_of_all<true, true>, 4, 64); }
CASE(racy_fence_of_the_first_alone) { run(ticket_of_all<false, true>, 4, 64); }
CASE(racy_no_fence_behind_a_ticket_of_all) { run(ticket_of_all<true, false>, 4, 64); }

// One fence behind the barrier publishes what all have written, and one in front of the other barrier is enough.
template <bool kRacy>
__global__ void ticket_of_one(FK_PARAM(Arguments) a) {
  FK_SHARED(bool[1], is_last);
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;  // racy
  __syncthreads();
  if (kRacy) a.out[blockIdx.x * blockDim.x + threadIdx.x] = 2;  // racy
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last[0]) return;
  for (unsigned block = 0; block < gridDim.x; ++block)
    a.out[512 + threadIdx.x] += a.out[block * blockDim.x + (threadIdx.x + 1) % blockDim.x];  // racy
}

CASE(ordered_by_a_fence_of_one) { run(ticket_of_one<false>, 4, 64); }
CASE(racy_write_beside_the_fence_of_one) { run(ticket_of_one<true>, 4, 64); }

// Behind a fence of their own, and in front of a barrier that brings them to the ticket.
__global__ void late_write_of_all(FK_PARAM(Arguments) a) {
  FK_SHARED(bool[1], is_last);
  __threadfence();
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;  // racy
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  if (is_last[0]) a.out[512 + threadIdx.x] += a.out[threadIdx.x] + a.out[blockDim.x + threadIdx.x];  // racy
}

CASE(racy_writes_behind_the_fences_of_all) { run(late_write_of_all, 2, 64); }

// A fence publishes what was written before it, not what is written behind it.
__global__ void late_write(FK_PARAM(Arguments) a) {
  __threadfence();
  a.out[blockIdx.x] = 1;  // racy
  const bool last = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
  __threadfence();
  if (last) a.out[8] = a.out[0] + a.out[1];  // racy
}

CASE(racy_write_behind_the_fence) { run(late_write, 2, 1); }

// Atomic operations are in nobody's way, unlike other accesses to their words.
template <bool kRacy>
__global__ void counted(FK_PARAM(Arguments) a) {
  FK_SHARED(unsigned[1], count);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(&count[0], 1);
  atomicMax(a.out + 1, threadIdx.x);
  if (!kRacy) __syncthreads();
  if (threadIdx.x == 0) a.out[2 + blockIdx.x] = count[0];  // racy
}

CASE(racy_read_of_what_is_counted) { run(counted<true>, 1, 64); }
CASE(ordered_counts) { run(counted<false>, 3, 64); }

}  // namespace
