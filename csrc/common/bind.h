// One function per operation, under the names and with the arguments of flatkern/ops.py: what the modules of compiled
// backends have in common. Only a module's bindings.cpp includes this.
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "check.h"
#include "from_python.h"

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
FK_CASTER(flatkern::Tensors, "list[torch.Tensor]")
FK_CASTER(flatkern::MaybeTensors, "list[torch.Tensor] | None")
FK_CASTER(flatkern::Tensor, "torch.Tensor")
FK_CASTER(flatkern::MaybeTensor, "torch.Tensor | None")
FK_CASTER(flatkern::Floats, "list[float]")
FK_CASTER(flatkern::Ints, "list[int]")
FK_CASTER(flatkern::Bools, "list[bool]")
#undef FK_CASTER

namespace flatkern::bind {

namespace py = pybind11;

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
  constexpr auto operator()(Names... names) const {
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

template <class Backend, class Args, class = void>
constexpr bool kHas = false;
template <class Backend, class Args>
constexpr bool
    kHas<Backend, Args, std::void_t<decltype(Backend::call(std::declval<const Args&>(), std::declval<PyObject*>()))>> =
        true;

// What an operation writes that autograd may have saved for a backward pass: its first argument, if it has one of these
// names, or in its place the outs, where some are given. Null where nothing is. Raw writes are invisible to autograd;
// without a new version it would give wrong gradients in silence.
template <class... T>
PyObject* seen_by_autograd(const Arguments<T...>& arguments, const T&... given) {
  PyObject* seen = nullptr;
  const std::string_view first = std::get<0>(arguments).name;
  const auto look = [&](std::string_view name, const TensorArgument& argument) {
    const bool is_written = name == "outs" || (name == first && (name == "params" || name == "grads"));
    if (is_written && argument.passed.get() != nullptr) seen = argument.passed.get();
  };
  std::apply([&](const Argument<T>&... a) { (look(a.name, given), ...); }, arguments);
  return seen;
}

template <class Backend>
class Operations {
 public:
  explicit Operations(py::module_& m) : m_(m) {}

  // An operation whose arguments are the fields of Args, in order.
  template <class Args, class First, class... T, class... N>
  void op(const char* name, Arguments<First, T...> tensors, Arguments<N...> numbers) {
    if constexpr (kHas<Backend, Args>) {
      const auto function = [tensors](First first, T... t, N... n) {
        read_tables(first, t...);
        PyObject* written = seen_by_autograd(tensors, first, t...);
        call(Args{std::move(first), std::move(t)..., std::move(n)...}, written);
      };
      define(name, function, tensors, numbers);
    }
  }

  // An update: its rule's state and numbers (S, N) stand before those that updates share, which are Args' base.
  template <class Args, class... S, class... N, class... Constants>
  void update(const char* name, Arguments<S...> state, Arguments<N...> numbers, Constants... constants) {
    const auto shared_tensors =
        join(maybe_tensors("backups", "masters", "history"), tensors("grads"), maybe_tensors("clean_grads", "masks"),
             maybe_tensor("lrs", "sigmas", "noise", "component", "grad_scale", "clip", "found_inf"));
    const auto shared_numbers =
        join(floats("grad_weight", "clean_weight", "kappa", "beta", "sigma", "eta"), ints("index", "offset"));
    define_update<Args>(name, state, numbers, shared_tensors, shared_numbers, constants...);
  }

 private:
  // Once every argument is converted: from here on no Python code runs before the operation.
  template <class... T>
  static void read_tables(T&... arguments) {
    if (!(read_table(arguments) && ...)) throw py::error_already_set();
  }

  template <class Args>
  static void call(const Args& args, PyObject* written) {
    check(args, Backend::kDevice);
    Backend::call(args, written);
  }

  template <class Args, class... S, class... N, class... T, class... U, class... Constants>
  void define_update(const char* name, Arguments<S...> state, Arguments<N...> numbers, Arguments<T...> shared_tensors,
                     Arguments<U...> shared_numbers, Constants... constants) {
    if constexpr (kHas<Backend, Args>) {
      const auto function = [=](Tensors params, S... s, T... t, N... n, U... u) {
        read_tables(params, s..., t...);
        PyObject* written = params.passed.get();
        Update shared = {std::move(params), std::move(t)..., std::move(u)...};
        call(Args{std::move(shared), std::move(s)..., std::move(n)..., constants...}, written);
      };
      define(name, function, join(tensors("params"), state, shared_tensors), join(numbers, shared_numbers));
    }
  }

  // Numbers are keyword-only, in every operation.
  template <class Function, class... T, class... N>
  void define(const char* name, Function function, Arguments<T...> tensors, Arguments<N...> numbers) {
    const auto names = [](auto... a) { return std::tuple(py::arg(a.name)...); };
    std::apply([&](auto... extra) { m_.def(name, function, extra...); },
               join(std::apply(names, tensors), std::tuple(py::kw_only()), std::apply(names, numbers)));
  }

  py::module_& m_;
};

}  // namespace flatkern::bind

namespace flatkern {

// Defines the operations that a backend has. Backend is a struct with
//   static constexpr DeviceType kDevice                      where its tensors are
//   static void call(const Args& args, PyObject* written)    one per operation, or a template for all
// `call` is given arguments that passed check(args, kDevice), with the GIL held, and bumps the versions of the list
// `written` after it wrote, unless that is null.
template <class Backend>
void define_operations(pybind11::module_& m) {
  using namespace bind;
  // Local to the module: with two modules loaded, each translates its own.
  py::register_local_exception<Mismatch>(m, "Mismatch", PyExc_ValueError);
  m.def(
      "_readers",
      [] {
        const std::string found = readers();
        if (found.empty()) throw py::error_already_set();
        return found;
      },
      "For tests: the ways in which tensors can be read here, the fastest first.");
  m.def("_read_through", read_through, py::arg("name"),
        "For tests: read tensors in no faster way than this one; returns the previous one.");

  Operations<Backend> define(m);
  define.template op<FillNormal>("fill_normal_", join(tensors("outs"), tensor("noise")), ints("index", "offset"));
  define.template op<FilterNorms>("filter_norms_", tensors("norms", "params"), {});
  define.template op<AscentNorm>(
      "ascent_norm_", join(tensor("norm"), maybe_tensors("params"), tensors("grads"), maybe_tensors("means")),
      floats("eta", "sigma"));
  define.template op<GradientNorm>(
      "gradient_norm_",
      join(tensor("norm"), tensors("grads"), maybe_tensors("clean_grads"), maybe_tensor("component", "grad_scale")),
      floats("grad_weight", "clean_weight"));
  define.template op<GradientProducts>("gradient_products_", join(tensor("products"), tensors("grads", "clean_grads")),
                                       {});
  define.template op<PerturbGaussian>("perturb_gaussian_",
                                      join(tensors("params"), maybe_tensors("backups", "masters", "norms", "history"),
                                           maybe_tensor("sigmas"), tensor("noise")),
                                      join(floats("sigma", "eta"), ints("index", "offset")));
  define.template op<PerturbAscent>("perturb_ascent_",
                                    join(tensors("params"), maybe_tensors("backups", "new_means", "masters"),
                                         tensors("grads"), maybe_tensors("means"), tensor("norm")),
                                    floats("rho", "eta", "sigma", "momentum"));
  define.template op<Restore>("restore_", tensors("params", "backups"), {});
  define.template op<MixGradients>("mix_gradients_",
                                   join(tensors("grads"), maybe_tensors("history", "outs", "clean_grads"),
                                        maybe_tensor("component", "grad_scale", "clip", "found_inf")),
                                   floats("grad_weight", "clean_weight", "beta"));
  define.template update<SgdUpdate>("sgd_update_", maybe_tensors("momentum_buffers"),
                                    join(floats("lr", "momentum", "dampening", "weight_decay"), bools("nesterov")));
  for (const bool decoupled : {false, true})
    define.template update<AdamUpdate>(decoupled ? "adamw_update_" : "adam_update_",
                                       tensors("exp_avgs", "exp_avg_sqs", "steps"),
                                       floats("lr", "beta1", "beta2", "eps", "weight_decay"), decoupled);
  define.template op<CountMagnitudes>("count_magnitudes_", join(tensor("counts"), tensors("grads"), tensor("prefix")),
                                      {});
  define.template op<PackMask>("pack_mask_", join(tensors("masks", "grads"), tensor("threshold")), {});
  define.template op<Amplify>("amplify_", tensors("params", "previous", "masks"), floats("kappa"));
}

}  // namespace flatkern
