// The module flatkern._C: every operation on the CPU, and functions that read Python objects for other backends.
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "../common/bind.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"

namespace py = pybind11;
using namespace flatkern;
using namespace py::literals;

namespace {

struct Cpu {
  static constexpr DeviceType kDevice = DeviceType::kCpu;

  // Runs without the GIL. No Python code runs from the writes to the new versions, so no signal handler can raise while
  // written tensors look untouched.
  template <class Args>
  static void call(const Args& args, PyObject* written) {
    {
      py::gil_scoped_release released;
      cpu::run(args);
    }
    if (written != nullptr && !increment_version(written)) throw py::error_already_set();
  }
};

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// The lists of one argument of stream(), behind those that are there.
void take_streams(py::handle given, const char* name, cpu::Access access, std::vector<Tensors>& lists,
                  std::vector<cpu::Access>& accesses) {
  if (!PyList_Check(given.ptr()) && !PyTuple_Check(given.ptr()))
    throw py::type_error(std::string("stream: ") + name + " is a " + Py_TYPE(given.ptr())->tp_name +
                         ", not a list of lists of tensors");
  for (const py::handle list : given) {
    Tensors tensors;
    if (!read(list.ptr(), tensors)) throw py::error_already_set();
    lists.push_back(std::move(tensors));
    accesses.push_back(access);
  }
}

// Refuses what cannot be walked side by side. `weights` is the first list of weights alone.
void check_stream(const Table& list, size_t s, const Table& weights) {
  const std::string name = "stream: list " + std::to_string(s);
  if (list.size() != weights.size())
    throw Mismatch(name + " has " + std::to_string(list.size()) + " tensors, but the first list of weights has " +
                   std::to_string(weights.size()));
  for (int64_t k = 0; k < list.size(); ++k) {
    const View& t = list[k];
    const auto fail = [&](const std::string& what) { throw Mismatch(name + "[" + std::to_string(k) + "] " + what); };
    const bool mask = t.dtype == DType::kUInt8;
    if (!mask && t.dtype != DType::kFloat32 && t.dtype != DType::kFloat16 && t.dtype != DType::kBFloat16)
      fail("is not float32, float16, bfloat16 or uint8");
    if (t.device.type != DeviceType::kCpu) fail("is not on the CPU");
    if (!t.dense) fail("is not dense in memory");
    const int64_t size = mask ? (weights[k].numel + 7) / 8 : weights[k].numel;
    if (t.numel != size) fail("has " + std::to_string(t.numel) + " elements, but should have " + std::to_string(size));
  }
}

// Weights have a byte or more per element, in every tensor.
bool is_of_weights(const Table& list) {
  for (int64_t k = 0; k < list.size(); ++k)
    if (list[k].dtype == DType::kUInt8) return false;
  return true;
}

void stream(py::handle reads, py::handle updates, py::handle writes, int64_t variant) {
  std::vector<Tensors> lists;
  std::vector<cpu::Access> accesses;
  take_streams(reads, "reads", cpu::Access::kRead, lists, accesses);
  take_streams(updates, "updates", cpu::Access::kUpdate, lists, accesses);
  take_streams(writes, "writes", cpu::Access::kWrite, lists, accesses);
  if (variant < 0 || variant >= cpu::kStreamVariantCount)
    throw py::value_error("stream: variant is " + std::to_string(variant) + ", but should be 0 to " +
                          std::to_string(cpu::kStreamVariantCount - 1));
  if (static_cast<int64_t>(lists.size()) > cpu::kMostStreams)
    throw py::value_error("stream: " + std::to_string(lists.size()) + " lists are given, but should be " +
                          std::to_string(cpu::kMostStreams) + " at most");
  for (Tensors& list : lists)
    if (!read_table(list)) throw py::error_already_set();
  const auto weights = std::find_if(lists.begin(), lists.end(), is_of_weights);
  if (weights == lists.end()) throw Mismatch("stream: no list is of weights alone");
  Array<cpu::Stream> streams(lists.size());
  for (size_t s = 0; s < lists.size(); ++s) {
    check_stream(lists[s], s, *weights);
    streams[s] = {&lists[s], accesses[s]};
  }
  const cpu::Streams a{std::move(streams), &*weights, variant};
  {
    py::gil_scoped_release released;
    cpu::run(a);
  }
  for (size_t s = 0; s < lists.size(); ++s)
    if (accesses[s] != cpu::Access::kRead && !increment_version(lists[s].passed.get())) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "flatkern's CPU kernels: the operations of flatkern/ops.py on raw memory, without checks meant for people.";
  cpu::choose_isa();
  define_operations<Cpu>(m);

  m.def(
      "gather_state",
      [](py::handle state, py::handle params, py::handle keys) {
        return checked(gather_state(state.ptr(), params.ptr(), keys.ptr()));
      },
      "state"_a, "params"_a, "keys"_a,
      "state[param][key] as a tuple of one list per key, or None where any entry is missing; creates none.");
  m.def(
      "describe",
      [](py::handle arguments, py::handle pointers, py::handle singles, py::handle layouts) {
        return checked(describe(arguments.ptr(), pointers.ptr(), singles.ptr(), layouts.ptr()));
      },
      "arguments"_a, "pointers"_a, "singles"_a, "layouts"_a,
      "(pointers of lists, of single tensors, layouts) as bytes; those given where nothing changed. None without "
      "DLPack.");
  m.def(
      "same_items", [](py::handle lists, py::handle copies) { return same_items(lists.ptr(), copies.ptr()); },
      "lists"_a, "copies"_a, "Whether each of some lists holds the very objects of its copy.");

  m.def(
      "increment_version",
      [](py::handle tensors) {
        if (!increment_version(tensors.ptr())) throw py::error_already_set();
      },
      "tensors"_a, "Tell autograd that a list of tensors was written.");

  py::tuple variants(cpu::kStreamVariantCount);
  for (int64_t i = 0; i < cpu::kStreamVariantCount; ++i) variants[i] = cpu::kStreamVariants[i].name;
  m.attr("stream_variants") = variants;
  m.def("stream", stream, "reads"_a, "updates"_a, "writes"_a, "variant"_a = 0,
        "For benchmarks: move memory as an operation would, and compute nothing. Each argument is a list of lists of "
        "tensors; those of a list have the elements of the other lists' tensors, of a uint8 mask a bit each. `reads` "
        "are read; `updates` are read, and the same bits written; `writes` become zeros. Which of stream_variants is "
        "the fastest depends on the machine and on the lists.");

  m.def("isa", cpu::isa, "The instruction set that runs.");
  m.def("isas", cpu::isas, "The instruction sets that were compiled and that this CPU has.");
  m.def("set_isa", cpu::set_isa, "name"_a, "For tests: run another instruction set; returns the previous one.");
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
  m.def("max_threads", omp_get_max_threads, "Threads that a kernel may use now.");
#else
  m.attr("openmp") = false;
  m.def("max_threads", [] { return 1; }, "Threads that a kernel may use now.");
#endif
}
