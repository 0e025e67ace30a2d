// Lists of tensors for one call, filled with random numbers. Each tensor has memory of its own, exactly as large as it
// is, so that a sanitizer sees what is beside it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/table.h"

namespace driver {

using namespace flatkern;
using Shape = std::vector<int64_t>;

// A way to call operations: dtypes, and which optional lists there are.
struct Way {
  const char* name;
  enum { kFloat32, kBFloat16, kMixed } dtypes;
  const char* words;

  bool has(const std::string& word) const {
    return (" " + std::string(words) + " ").find(" " + word + " ") != std::string::npos;
  }
};

class Tensors {
 public:
  Tensors(const Way& way, const std::vector<Shape>& shapes) : way_(way), shapes_(shapes) {}

  bool has(const std::string& word) const { return way_.has(word); }
  int64_t count() const { return static_cast<int64_t>(shapes_.size()); }

  // Lists like the parameters, of the call's dtypes or of one.
  Table weights(float low = -1.0f, float high = 1.0f) {
    return list([&](int64_t k) { return tensor(shapes_[k], dtype(k), low, high); });
  }
  Table float32s() {
    return list([&](int64_t k) { return tensor(shapes_[k], DType::kFloat32, -1.0f, 1.0f); });
  }
  // A number for each filter; of vectors one for each element, or for all of it.
  Table of_filters(bool elements_of_vectors) {
    return list([&](int64_t k) {
      const bool flat = shapes_[k].size() < 2;
      const int64_t length = !flat ? shapes_[k][0] : elements_of_vectors ? shapes_[k][0] : 1;
      return tensor({length}, DType::kFloat32, 0.1f, 1.0f);
    });
  }
  Table masks() {
    return list([&](int64_t k) {
      const Shape& s = shapes_[k];
      return tensor(s.size() < 2 ? s : Shape{s[0], (s[1] + 7) / 8}, DType::kUInt8, 0.0f, 255.0f);
    });
  }
  Table scalars() {  // one for each tensor
    return list([&](int64_t) { return tensor({}, DType::kFloat32, 1.0f, 1.0f); });
  }

  // One tensor.
  Table scalar(float x) { return one({}, DType::kFloat32, x); }
  Table float32s_of(int64_t length, float x) { return one({length}, DType::kFloat32, x); }
  Table float64s_of(int64_t length, double x) { return one({length}, DType::kFloat64, static_cast<float>(x)); }
  Table float64s(double x) { return float64s_of(count(), x); }
  Table integers(int64_t length, float x) { return one({length}, DType::kInt64, x); }

  Floats numbers(double x) const {
    return array<double>([&](int64_t) { return x; });
  }
  Ints index() const {
    return array<int64_t>([](int64_t k) { return k; });
  }
  // Vectors are parts that begin inside of an eight.
  Ints offset() const {
    return array<int64_t>([&](int64_t k) { return shapes_[k].size() < 2 ? 3 : 1; });
  }
  Bools flags(bool x) const {
    return array<bool>([&](int64_t) { return x; });
  }

 private:
  struct Made {
    View view;
    Shape shape, strides;
  };

  DType dtype(int64_t k) const {
    constexpr DType kAll[] = {DType::kFloat16, DType::kFloat32, DType::kBFloat16};
    return way_.dtypes == Way::kFloat32    ? DType::kFloat32
           : way_.dtypes == Way::kBFloat16 ? DType::kBFloat16
                                           : kAll[k % 3];
  }

  template <class T, class Value>
  Array<T> array(const Value& value) const {
    Array<T> values(count());
    for (int64_t k = 0; k < count(); ++k) values[k] = value(k);
    return values;
  }

  template <class Make>
  Table list(const Make& make) {
    std::vector<Made> made;
    for (int64_t k = 0; k < count(); ++k) made.push_back(make(k));
    return table(std::move(made));
  }
  Table one(const Shape& shape, DType dtype, float x) {
    std::vector<Made> made;
    made.push_back(tensor(shape, dtype, x, x));
    return table(std::move(made));
  }

  Made tensor(const Shape& shape, DType dtype, float low, float high) {
    Made made = {{}, shape, Shape(shape.size(), 1)};
    for (size_t d = shape.size(); d-- > 1;) made.strides[d - 1] = made.strides[d] * shape[d];
    View& v = made.view;
    v.ndim = static_cast<int32_t>(shape.size());
    v.numel = shape.empty() ? 1 : shape[0] * made.strides[0];
    v.rows = v.ndim < 2 ? 1 : shape[0];
    v.cols = v.ndim < 2 ? v.numel : made.strides[0];
    v.dtype = dtype;
    v.device = {DeviceType::kCpu, 0};
    v.dense = v.outer = true;
    v.data = std::malloc(static_cast<size_t>(v.numel) * size_of(dtype));
    memory_.emplace_back(v.data, std::free);
    std::uniform_real_distribution<float> random(low, high);
    for (int64_t i = 0; i < v.numel; ++i) put(v, i, low == high ? low : random(generator_));
    return made;
  }

  static size_t size_of(DType dtype) {
    switch (dtype) {
      case DType::kFloat64:
      case DType::kInt64:
        return 8;
      case DType::kFloat32:
        return 4;
      case DType::kUInt8:
        return 1;
      default:
        return 2;
    }
  }

  static void put(const View& v, int64_t i, float x) {
    uint32_t bits;
    switch (v.dtype) {
      case DType::kFloat64:
        v.as<double>()[i] = x;
        break;
      case DType::kInt64:
        v.as<int64_t>()[i] = static_cast<int64_t>(x);
        break;
      case DType::kFloat32:
        v.as<float>()[i] = x;
        break;
      case DType::kUInt8:
        v.as<uint8_t>()[i] = static_cast<uint8_t>(x);
        break;
      case DType::kFloat16:
        v.as<_Float16>()[i] = static_cast<_Float16>(x);
        break;
      default:
        std::memcpy(&bits, &x, sizeof bits);
        v.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    }
  }

  static Table table(std::vector<Made> made) {
    Table table;
    table.present = true;
    table.views = Array<View>(static_cast<int64_t>(made.size()));
    int64_t size = 0, at = 0;
    for (const Made& m : made) size += 2 * m.view.ndim;
    table.dims = Array<int64_t>(size);
    for (size_t k = 0; k < made.size(); ++k) {
      View& view = table.views[static_cast<int64_t>(k)] = made[k].view;
      view.shape = &table.dims[at];
      for (const int64_t n : made[k].shape) table.dims[at++] = n;
      view.strides = &table.dims[at];
      for (const int64_t n : made[k].strides) table.dims[at++] = n;
    }
    return table;
  }

  const Way& way_;
  const std::vector<Shape>& shapes_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
  std::mt19937 generator_{7};
};

}  // namespace driver
