// The module flatkern._C: every operation on the CPU, and functions that read Python objects for other backends.
#include <pybind11/stl.h>

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
