// What a list of tensors is to a kernel: raw views, and lists of scalars beside them. No Python and no torch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#define FK_INLINE inline __attribute__((always_inline))

namespace flatkern {

// A fixed number of plain values. Not std::vector: its functions, compiled for several instruction sets, would be
// merged by the linker into whichever copy comes first. What is here is inlined everywhere.
template <class T>
class Array {
  static_assert(std::is_trivially_destructible_v<T> && std::is_trivially_copyable_v<T>);

 public:
  Array() = default;
  explicit FK_INLINE Array(int64_t size) : data_(static_cast<T*>(std::malloc(size > 0 ? size * sizeof(T) : 1))) {
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = size;
  }
  FK_INLINE Array(Array&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  FK_INLINE Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  FK_INLINE ~Array() { std::free(data_); }

  FK_INLINE T& operator[](int64_t i) { return data_[i]; }
  FK_INLINE const T& operator[](int64_t i) const { return data_[i]; }
  FK_INLINE int64_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

enum class DeviceType : uint8_t { kCpu, kCuda, kOther };

struct Device {
  DeviceType type;
  int32_t index;  // 0 on the CPU, pinned memory included

  FK_INLINE bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  FK_INLINE bool operator!=(const Device& other) const { return !(*this == other); }
};

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt64, kUInt8, kOther };

// One tensor, read as a table of filters: `rows` dim-0 slices of `cols` elements in memory order (rank <= 1: one row).
struct View {
  void* data;
  const int64_t* shape;
  const int64_t* strides;
  int64_t rows, cols, numel;
  int32_t ndim;
  DType dtype;
  Device device;
  bool dense;  // the elements fill one gapless block of memory
  bool outer;  // dim 0 is outermost in memory, so that every row is one contiguous stretch

  template <class T>
  FK_INLINE T* as() const {
    return static_cast<T*>(data);
  }
};

// A list of tensors that may be absent as a whole. A single tensor is a list of one.
struct Table {
  bool present = false;
  Array<View> views;
  Array<int64_t> dims;  // shapes and strides, where the views have to own them

  FK_INLINE const View& operator[](int64_t k) const { return views[k]; }
  FK_INLINE int64_t size() const { return views.size(); }
  FK_INLINE explicit operator bool() const { return present; }
};

using Floats = Array<double>;
using Ints = Array<int64_t>;
using Bools = Array<bool>;

}  // namespace flatkern
