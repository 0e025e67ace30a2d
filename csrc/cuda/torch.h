// What the extension asks of torch, through functions that Python gives it (flatkern/cuda.py): memory and streams. Whoever
// calls these holds the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "stream.h"

namespace flatkern::cuda {

// A Python function has raised; the error is set.
struct PythonError : std::exception {};

// A tensor of torch's that holds memory of a device.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* tensor, void* data) : tensor_(tensor), data_(data) {}
  Buffer(Buffer&& other) noexcept
      : tensor_(std::exchange(other.tensor_, nullptr)), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(tensor_, other.tensor_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer();

  template <class T>
  T* at(size_t byte) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte);
  }

 private:
  void* tensor_ = nullptr;
  void* data_ = nullptr;
};

Buffer allocate(int device, size_t bytes);
Buffer upload(int device, const void* data, size_t bytes);
Stream current_stream(int device);

// The GIL is released while one of these lives: a launch waits where the device's queue is full.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;

 private:
  void* state_;
};

}  // namespace flatkern::cuda
