// The module flatkern._CUDA: operations on the tensors of a GPU. With FK_EMULATION the same on those of the CPU.
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../common/bind.h"
#include "functions.h"
#include "operations.h"
#include "runtime.h"
#ifdef FK_EMULATION
#include <dlfcn.h>

#include "scheduler.h"
#endif

namespace py = pybind11;
using namespace flatkern;
using namespace py::literals;

namespace flatkern::cuda {
#ifdef FK_EMULATION
bool noise_is_on_device = false, steps_are_on_host = false;
#endif
}  // namespace flatkern::cuda

namespace {

#define FK_RUN(Args, op) \
  void run(const Args& a) { cuda::op(a); }
FK_FOR_EACH_OPERATION(FK_RUN)
#undef FK_RUN

struct Cuda {
#ifdef FK_EMULATION
  static constexpr DeviceType kDevice = DeviceType::kCpu;
#else
  static constexpr DeviceType kDevice = DeviceType::kCuda;
#endif

  template <class Args>
  static auto call(const Args& args, PyObject* written) -> decltype(run(args)) {
    // Of several launches the first ones may have written when a later one fails.
    const int64_t before = cuda::launch_count();
    try {
      run(args);
    } catch (...) {
      if (written != nullptr && cuda::launch_count() != before && !PyErr_Occurred()) increment_version(written);
      throw;
    }
    if (written != nullptr && !increment_version(written)) throw py::error_already_set();
  }
};

#ifdef FK_EMULATION
// The last launch of each kernel that was watched.
std::map<uintptr_t, cuda::emulation::Launch>& watched() {
  static auto& launches = *new std::map<uintptr_t, cuda::emulation::Launch>;
  return launches;
}

// Which kernel it is: how far its machine code is from the beginning of this library.
void watch(py::object see) {
  if (see.is_none()) return cuda::emulation::watch(nullptr);
  Dl_info library;
  dladdr(reinterpret_cast<void*>(watch), &library);
  // It lives as long as the process, as the function is dropped only for another one.
  auto* kept = new py::object(std::move(see));
  cuda::emulation::watch([kept, base = reinterpret_cast<uintptr_t>(library.dli_fbase)](const auto& launch) {
    const py::gil_scoped_acquire held;
    const uintptr_t place = reinterpret_cast<uintptr_t>(launch.kernel) - base;
    watched()[place] = launch;
    (*kept)(place, py::bytes(static_cast<const char*>(launch.arguments), launch.size), launch.grid, launch.block);
  });
}

// As a graph replays it, which neither counts nor loads.
void run_again(uintptr_t place, const std::string& arguments, unsigned grid, unsigned block) {
  std::vector<std::max_align_t> aligned(arguments.size() / sizeof(std::max_align_t) + 1);
  std::memcpy(aligned.data(), arguments.data(), arguments.size());
  cuda::emulation::Launch launch = watched().at(place);
  launch.arguments = aligned.data();
  launch.grid = grid;
  launch.block = block;
  cuda::emulation::run(launch);
}
#endif

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "flatkern's CUDA kernels: operations of flatkern/ops.py on raw memory, without checks meant for people.";
  py::register_local_exception<cuda::WrongDevice>(m, "WrongDevice", PyExc_RuntimeError);
  py::register_local_exception<cuda::LaunchError>(m, "LaunchError", PyExc_RuntimeError);
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const cuda::PythonError&) {
      // Set already.
    }
  });
  define_operations<Cuda>(m);

  m.def(
      "use_torch",
      [](py::handle allocate, py::handle upload, py::handle stream) {
        cuda::use_functions(allocate.ptr(), upload.ptr(), stream.ptr());
      },
      "allocate"_a, "upload"_a, "stream"_a, "Where memory and streams come from.");
  m.def("launch_count", cuda::launch_count, "Kernels that this thread has started.");
  m.def("load_kernels", cuda::load_kernels, "Loads every kernel on the current device; how many there are.");
  m.def("loaded_kernels", cuda::loaded_kernels, "How many kernels are loaded on the current device.");
  m.def(
      "driver",
      [] {
        const cuda::Driver found = cuda::driver();
        return py::make_tuple(found.version, found.needed, found.devices, found.error);
      },
      "(version, needed, devices, error): of the driver and of the runtime inside, as CUDA counts versions.");
#ifdef FK_EMULATION
  m.attr("emulated") = true;
  m.attr("toolkit") = "emulated";
  m.attr("architectures") = "";
  m.def("current_device", cuda::emulation::current_device);
  m.def("set_current_device", cuda::emulation::set_current_device, "index"_a);
  m.def("launch_nothing", cuda::emulation::launch_nothing, "on"_a, "For measurements: launches run nothing.");
  m.def("watch", watch, "see"_a, "see(kernel, arguments, grid, block) is called before each launch; None: no more.");
  m.def("run_again", run_again, "kernel"_a, "arguments"_a, "grid"_a, "block"_a, "Runs what `watch` was told of.");
  m.def("forget_kernels", cuda::forget_kernels, "No kernel counts as loaded any more.");
  m.def("capturing", [](bool on) { cuda::capture_is_under_way = on; }, "on"_a, "Whether a CUDA graph is captured.");
  m.def("set_schedule", cuda::emulation::set_schedule, "text"_a, "In which order threads run.");
  m.def("noise_is_on_device", [](bool on) { cuda::noise_is_on_device = on; }, "on"_a);
  m.def("steps_are_on_host", [](bool on) { cuda::steps_are_on_host = on; }, "on"_a);
#else
  m.attr("emulated") = false;
  m.attr("toolkit") = FK_CUDA_TOOLKIT;
  m.attr("architectures") = FK_CUDA_ARCHS;
#endif
}
