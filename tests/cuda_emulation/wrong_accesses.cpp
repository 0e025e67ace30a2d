// Kernels that do what C++ does not define: what AddressSanitizer and UndefinedBehaviorSanitizer report, each in the
// line that ends in "wrong".
#include "cases.h"

namespace {

using flatkern::cuda::launch;

struct Arguments {
  float* out;
  int n;
  float* several[4];
};

// The fourth of several is not set.
void run(void (*kernel)(FK_PARAM(Arguments)), int n) {
  std::vector<float> out(37);
  Arguments a;
  a.out = out.data();
  a.n = n;
  for (int i = 0; i < 3; ++i) a.several[i] = out.data();
  launch(kernel, 1, 32, nullptr, a);
}

__global__ void global_write(FK_PARAM(Arguments) a) {
  if (threadIdx.x == 3) a.out[a.n] = 1.0f;  // wrong
}
CASE(write_behind_a_tensor) { run(global_write, 37); }
CASE(write_in_front_of_a_tensor) { run(global_write, -1); }

__global__ void global_read(FK_PARAM(Arguments) a) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(a.out) + threadIdx.x / 2);  // wrong
  if (threadIdx.x < 19) a.out[threadIdx.x] = v.x;
}
CASE(read_behind_a_tensor) { run(global_read, 0); }

__global__ void shared_write(FK_PARAM(Arguments) a) {
  FK_SHARED(float[8], values);
  float* at = values;
  if (threadIdx.x == 3) at[a.n] = 1.0f;  // wrong
}
CASE(write_behind_shared_memory) { run(shared_write, 8); }

__global__ void shared_index(FK_PARAM(Arguments) a) {
  FK_SHARED(float[8], values);
  if (threadIdx.x == 3) values[a.n] = 1.0f;  // wrong
}
CASE(index_behind_shared_memory) { run(shared_index, 9); }

__global__ void parameter_index(FK_PARAM(Arguments) a) {
  if (threadIdx.x == 3) a.several[a.n][0] = 1.0f;  // wrong
}
CASE(index_behind_the_parameters) { run(parameter_index, 4); }

__global__ void parameter_unset(FK_PARAM(Arguments) a) {
  if (threadIdx.x == 3) a.several[a.n][0] = 1.0f;  // wrong
}
CASE(parameter_that_is_not_set) { run(parameter_unset, 3); }

__global__ void parameter_address(FK_PARAM(Arguments) a) {
  const char* bytes = reinterpret_cast<const char*>(&a);
  if (threadIdx.x == 3) a.out[0] = bytes[a.n];  // wrong
}
CASE(address_behind_the_parameters) { run(parameter_address, sizeof(Arguments)); }

__global__ void misaligned(FK_PARAM(Arguments) a) {
  const float4* vectors = reinterpret_cast<const float4*>(a.out + a.n);
  if (threadIdx.x == 3) a.out[0] = vectors[1].y;  // wrong
}
CASE(misaligned_vector) { run(misaligned, 1); }

__global__ void shift(FK_PARAM(Arguments) a) {
  a.out[threadIdx.x] = static_cast<float>(1u << (threadIdx.x + a.n));  // wrong
}
CASE(shift_by_the_width) { run(shift, 1); }

__global__ void overflow(FK_PARAM(Arguments) a) {
  const int n = a.n + static_cast<int>(threadIdx.x);  // wrong
  a.out[threadIdx.x] = static_cast<float>(n);
}
CASE(signed_overflow) { run(overflow, 2147483647); }

__global__ void conversion(FK_PARAM(Arguments) a) {
  const float x = 1e10f * static_cast<float>(a.n);
  a.out[threadIdx.x] = static_cast<float>(static_cast<int>(x));  // wrong
}
CASE(conversion_out_of_range) { run(conversion, 3); }

__global__ void division(FK_PARAM(Arguments) a) {
  a.out[threadIdx.x] = static_cast<float>(threadIdx.x == 3 ? 7 / a.n : 0);  // wrong
}
CASE(division_by_zero) { run(division, 0); }

}  // namespace
