// The module flatkern._C: one function per operation, under the names and with the arguments of flatkern/ops.py.
// The only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>
#include <tuple>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/check.h"
#include "cpu/isa.h"
#include "from_python.h"

namespace py = pybind11;
using namespace flatkern;
using namespace py::literals;
using cpu::Bools;
using cpu::Floats;
using cpu::Ints;
using cpu::Kernels;

// A wrong type raises from here: pybind11's own message would print every tensor of every list.
#define FK_CASTER(Type, label)                                   \
  template <>                                                    \
  struct pybind11::detail::type_caster<Type> {                   \
    PYBIND11_TYPE_CASTER(Type, const_name(label));               \
    bool load(handle source, bool) {                             \
      if (!read(source.ptr(), value)) throw error_already_set(); \
      return true;                                               \
    }                                                            \
  };
FK_CASTER(Tensors, "list[torch.Tensor]")
FK_CASTER(MaybeTensors, "list[torch.Tensor] | None")
FK_CASTER(Tensor, "torch.Tensor")
FK_CASTER(MaybeTensor, "torch.Tensor | None")
FK_CASTER(Floats, "list[float]")
FK_CASTER(Ints, "list[int]")
FK_CASTER(Bools, "list[bool]")
#undef FK_CASTER

namespace {

template <class Args>
using Kernel = void (*Kernels::*)(const Args&);

// Checks, then runs, without the GIL; then bumps the versions of the list `written`, unless it is null. No Python code
// runs from the writes to there, so no signal handler can raise while written tensors look untouched.
template <class Args>
void call(Kernel<Args> kernel, const Args& args, PyObject* written) {
  {
    py::gil_scoped_release released;
    cpu::check(args);
    (cpu::kernels().*kernel)(args);
  }
  if (written != nullptr && !increment_version(written)) throw py::error_already_set();
}

// The name of an argument of type T.
template <class T>
struct Argument {
  const char* name;
};
template <class... T>
using Arguments = std::tuple<Argument<T>...>;

// tensors("a", "b"): arguments of one type.
template <class T>
struct Named {
  template <class... Names>
  auto operator()(Names... names) const {
    return std::tuple(Argument<T>{names}...);
  }
};
constexpr Named<Tensors> tensors{};
constexpr Named<MaybeTensors> maybe_tensors{};
constexpr Named<Tensor> tensor{};
constexpr Named<MaybeTensor> maybe_tensor{};
constexpr Named<Floats> floats{};
constexpr Named<Ints> ints{};
constexpr Named<Bools> bools{};

template <class... Some>
auto join(Some... arguments) {
  return std::tuple_cat(arguments...);
}

// Numbers are keyword-only, in every operation.
template <class Function, class... T, class... N>
void define(py::module_& m, const char* name, Function function, Arguments<T...> tensors, Arguments<N...> numbers) {
  const auto names = [](auto... a) { return std::tuple(py::arg(a.name)...); };
  std::apply([&](auto... extra) { m.def(name, function, extra...); },
             join(std::apply(names, tensors), std::tuple(py::kw_only()), std::apply(names, numbers)));
}

// Whether autograd may have saved, for a backward pass, what an operation writes: its first argument, of this name. Raw
// writes are invisible to autograd; without a new version it would give wrong gradients in silence.
bool is_seen_by_autograd(std::string_view name) { return name == "params" || name == "grads" || name == "outs"; }

// An operation whose arguments are the fields of Args, in order.
template <class Args, class First, class... T, class... N>
void define_op(py::module_& m, const char* name, Kernel<Args> kernel, Arguments<First, T...> tensors,
               Arguments<N...> numbers) {
  const bool seen = is_seen_by_autograd(std::get<0>(tensors).name);
  const auto op = [kernel, seen](First first, T... t, N... n) {
    PyObject* written = seen ? first.list : nullptr;
    call(kernel, Args{std::move(first), std::move(t)..., std::move(n)...}, written);
  };
  define(m, name, op, tensors, numbers);
}

// An update: its rule's state and numbers (S, N) stand before those that updates share (T, U), which are Args' base.
template <class Args, class... S, class... T, class... N, class... U, class... Constants>
void define_update(py::module_& m, const char* name, Kernel<Args> kernel, Arguments<S...> state,
                   Arguments<N...> numbers, Arguments<T...> shared_tensors, Arguments<U...> shared_numbers,
                   Constants... constants) {
  const auto op = [=](Tensors params, S... s, T... t, N... n, U... u) {
    PyObject* written = params.list;
    cpu::Update shared = {std::move(params), std::move(t)..., std::move(u)...};
    call(kernel, Args{std::move(shared), std::move(s)..., std::move(n)..., constants...}, written);
  };
  define(m, name, op, join(tensors("params"), state, shared_tensors), join(numbers, shared_numbers));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "flatkern's CPU kernels: the operations of flatkern/ops.py on raw memory, without checks meant for people.";
  py::register_exception<cpu::Mismatch>(m, "Mismatch", PyExc_ValueError);
  cpu::choose_isa();

  define_op(m, "fill_normal_", &Kernels::fill_normal_, join(tensors("outs"), tensor("noise")), ints("index", "offset"));
  define_op(m, "filter_norms_", &Kernels::filter_norms_, tensors("norms", "params"), {});
  define_op(m, "ascent_norm_", &Kernels::ascent_norm_, join(tensor("norm"), maybe_tensors("params"), tensors("grads")),
            floats("eta"));
  define_op(m, "gradient_norm_", &Kernels::gradient_norm_,
            join(tensor("norm"), tensors("grads"), maybe_tensors("clean_grads"), maybe_tensor("grad_scale")),
            floats("grad_weight", "clean_weight"));
  define_op(m, "perturb_gaussian_", &Kernels::perturb_gaussian_,
            join(tensors("params"), maybe_tensors("backups", "masters", "norms", "history"), maybe_tensor("sigmas"),
                 tensor("noise")),
            join(floats("sigma", "eta"), ints("index", "offset")));
  define_op(m, "perturb_ascent_", &Kernels::perturb_ascent_,
            join(tensors("params"), maybe_tensors("backups", "masters"), tensors("grads"), tensor("norm")),
            floats("rho", "eta"));
  define_op(m, "restore_", &Kernels::restore_, tensors("params", "backups"), {});
  define_op(m, "mix_gradients_", &Kernels::mix_gradients_,
            join(tensors("grads"), maybe_tensors("history", "clean_grads"), maybe_tensor("grad_scale", "clip")),
            floats("grad_weight", "clean_weight", "beta"));

  const auto shared_tensors =
      join(maybe_tensors("backups", "masters", "history"), tensors("grads"), maybe_tensors("clean_grads", "masks"),
           maybe_tensor("lrs", "sigmas", "noise", "grad_scale", "clip", "found_inf"));
  const auto shared_numbers =
      join(floats("grad_weight", "clean_weight", "kappa", "beta", "sigma", "eta"), ints("index", "offset"));
  define_update(m, "sgd_update_", &Kernels::sgd_update_, maybe_tensors("momentum_buffers"),
                join(floats("lr", "momentum", "dampening", "weight_decay"), bools("nesterov")), shared_tensors,
                shared_numbers);
  for (const bool decoupled : {false, true})
    define_update(m, decoupled ? "adamw_update_" : "adam_update_", &Kernels::adam_update_,
                  tensors("exp_avgs", "exp_avg_sqs", "steps"), floats("lr", "beta1", "beta2", "eps", "weight_decay"),
                  shared_tensors, shared_numbers, decoupled);

  define_op(m, "count_magnitudes_", &Kernels::count_magnitudes_,
            join(tensor("counts"), tensors("grads"), tensor("prefix")), {});
  define_op(m, "pack_mask_", &Kernels::pack_mask_, join(tensors("masks", "grads"), tensor("threshold")), {});
  define_op(m, "amplify_", &Kernels::amplify_, tensors("params", "previous", "masks"), floats("kappa"));

  m.def(
      "gather_state",
      [](py::handle state, py::handle params, py::handle keys) {
        PyObject* result = gather_state(state.ptr(), params.ptr(), keys.ptr());
        if (result == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
      },
      "state"_a, "params"_a, "keys"_a,
      "state[param][key] as a tuple of one list per key, or None where any entry is missing; creates none.");

  m.def(
      "describe",
      [](py::handle lists, py::handle singles, py::handle pointers, py::handle layouts) {
        PyObject* result = describe(lists.ptr(), singles.ptr(), pointers.ptr(), layouts.ptr());
        if (result == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
      },
      "lists"_a, "singles"_a, "pointers"_a, "layouts"_a,
      "(pointers, layouts) of tensors as bytes; the objects given, where nothing changed. None without DLPack.");
  m.def(
      "same_items", [](py::handle lists, py::handle copies) { return same_items(lists.ptr(), copies.ptr()); },
      "lists"_a, "copies"_a, "Whether each of some lists holds the very objects of its copy.");

  m.def("isa", cpu::isa, "The instruction set that runs.");
  m.def("isas", cpu::isas, "The instruction sets that were compiled and that this CPU has.");
  m.def("set_isa", cpu::set_isa, "name"_a, "For tests: run another instruction set; returns the previous one.");
  m.def("_use_dlpack", use_dlpack, "enabled"_a, "For tests: how tensors are read; returns the previous setting.");
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
