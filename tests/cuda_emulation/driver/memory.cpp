// In place of csrc/cuda/torch.cpp and of the module: memory by malloc, exactly as large as asked for; no Python.
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda/torch.h"

namespace flatkern::cuda {

bool noise_is_on_device = false, steps_are_on_host = false;

Buffer::~Buffer() { std::free(data_); }

Buffer allocate(int, size_t bytes) {
  void* data = std::malloc(bytes);
  if (data == nullptr && bytes > 0) throw std::bad_alloc();
  return Buffer(nullptr, data);
}

Buffer upload(int device, const void* data, size_t bytes) {
  Buffer buffer = allocate(device, bytes);
  std::memcpy(buffer.at<void*>(0), data, bytes);
  return buffer;
}

Stream current_stream(int) { return nullptr; }

WithoutGil::WithoutGil() : state_(nullptr) {}
WithoutGil::~WithoutGil() {}

}  // namespace flatkern::cuda
