// The module flatkern._C: one function per operation, under the names and with the arguments of flatkern/ops.py.
// The only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
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

// Checks, then runs, without the GIL.
template <class Args>
void call(void (*cpu::Kernels::*kernel)(const Args&), const Args& args) {
  py::gil_scoped_release released;
  cpu::check(args);
  (cpu::kernels().*kernel)(args);
}

void fill_normal_(Tensors outs, Tensor noise, Ints index, Ints offset) {
  call(&cpu::Kernels::fill_normal_, {std::move(outs), std::move(noise), std::move(index), std::move(offset)});
}

void filter_norms_(Tensors norms, Tensors params) {
  call(&cpu::Kernels::filter_norms_, {std::move(norms), std::move(params)});
}

void ascent_norm_(Tensor norm, MaybeTensors params, Tensors grads, Floats eta) {
  call(&cpu::Kernels::ascent_norm_, {std::move(norm), std::move(params), std::move(grads), std::move(eta)});
}

void gradient_norm_(Tensor norm, Tensors grads, MaybeTensors clean_grads, MaybeTensor grad_scale, Floats grad_weight,
                    Floats clean_weight) {
  call(&cpu::Kernels::gradient_norm_, {std::move(norm), std::move(grads), std::move(clean_grads), std::move(grad_scale),
                                       std::move(grad_weight), std::move(clean_weight)});
}

void perturb_gaussian_(Tensors params, MaybeTensors backups, MaybeTensors masters, MaybeTensors norms,
                       MaybeTensors history, MaybeTensor sigmas, Tensor noise, Floats sigma, Floats eta, Ints index,
                       Ints offset) {
  call(&cpu::Kernels::perturb_gaussian_,
       {std::move(params), std::move(backups), std::move(masters), std::move(norms), std::move(history),
        std::move(sigmas), std::move(noise), std::move(sigma), std::move(eta), std::move(index), std::move(offset)});
}

void perturb_ascent_(Tensors params, MaybeTensors backups, MaybeTensors masters, Tensors grads, Tensor norm, Floats rho,
                     Floats eta) {
  call(&cpu::Kernels::perturb_ascent_, {std::move(params), std::move(backups), std::move(masters), std::move(grads),
                                        std::move(norm), std::move(rho), std::move(eta)});
}

void restore_(Tensors params, Tensors backups) {
  call(&cpu::Kernels::restore_, {std::move(params), std::move(backups)});
}

void mix_gradients_(Tensors grads, MaybeTensors history, MaybeTensors clean_grads, MaybeTensor grad_scale,
                    MaybeTensor clip, Floats grad_weight, Floats clean_weight, Floats beta) {
  call(&cpu::Kernels::mix_gradients_,
       {std::move(grads), std::move(history), std::move(clean_grads), std::move(grad_scale), std::move(clip),
        std::move(grad_weight), std::move(clean_weight), std::move(beta)});
}

void sgd_update_(Tensors params, MaybeTensors momentum_buffers, MaybeTensors backups, MaybeTensors masters,
                 MaybeTensors history, Tensors grads, MaybeTensors clean_grads, MaybeTensors masks, MaybeTensor lrs,
                 MaybeTensor sigmas, MaybeTensor noise, MaybeTensor grad_scale, MaybeTensor clip, MaybeTensor found_inf,
                 Floats lr, Floats momentum, Floats dampening, Floats weight_decay, Bools nesterov, Floats grad_weight,
                 Floats clean_weight, Floats kappa, Floats beta, Floats sigma, Floats eta, Ints index, Ints offset) {
  call(&cpu::Kernels::sgd_update_,
       {{std::move(params),    std::move(backups),     std::move(masters),      std::move(history),
         std::move(grads),     std::move(clean_grads), std::move(masks),        std::move(lrs),
         std::move(sigmas),    std::move(noise),       std::move(grad_scale),   std::move(clip),
         std::move(found_inf), std::move(grad_weight), std::move(clean_weight), std::move(kappa),
         std::move(beta),      std::move(sigma),       std::move(eta),          std::move(index),
         std::move(offset)},
        std::move(momentum_buffers),
        std::move(lr),
        std::move(momentum),
        std::move(dampening),
        std::move(weight_decay),
        std::move(nesterov)});
}

template <bool kDecoupled>
void adam_update_(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, MaybeTensors backups,
                  MaybeTensors masters, MaybeTensors history, Tensors grads, MaybeTensors clean_grads,
                  MaybeTensors masks, MaybeTensor lrs, MaybeTensor sigmas, MaybeTensor noise, MaybeTensor grad_scale,
                  MaybeTensor clip, MaybeTensor found_inf, Floats lr, Floats beta1, Floats beta2, Floats eps,
                  Floats weight_decay, Floats grad_weight, Floats clean_weight, Floats kappa, Floats beta, Floats sigma,
                  Floats eta, Ints index, Ints offset) {
  call(&cpu::Kernels::adam_update_,
       {{std::move(params),    std::move(backups),     std::move(masters),      std::move(history),
         std::move(grads),     std::move(clean_grads), std::move(masks),        std::move(lrs),
         std::move(sigmas),    std::move(noise),       std::move(grad_scale),   std::move(clip),
         std::move(found_inf), std::move(grad_weight), std::move(clean_weight), std::move(kappa),
         std::move(beta),      std::move(sigma),       std::move(eta),          std::move(index),
         std::move(offset)},
        std::move(exp_avgs),
        std::move(exp_avg_sqs),
        std::move(steps),
        std::move(lr),
        std::move(beta1),
        std::move(beta2),
        std::move(eps),
        std::move(weight_decay),
        kDecoupled});
}

void count_magnitudes_(Tensor counts, Tensors grads, Tensor prefix) {
  call(&cpu::Kernels::count_magnitudes_, {std::move(counts), std::move(grads), std::move(prefix)});
}

void pack_mask_(Tensors masks, Tensors grads, Tensor threshold) {
  call(&cpu::Kernels::pack_mask_, {std::move(masks), std::move(grads), std::move(threshold)});
}

void amplify_(Tensors params, Tensors previous, Tensors masks, Floats kappa) {
  call(&cpu::Kernels::amplify_, {std::move(params), std::move(previous), std::move(masks), std::move(kappa)});
}

template <bool kDecoupled>
void define_adam(py::module_& m, const char* name) {
  m.def(name, adam_update_<kDecoupled>, "params"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "steps"_a, "backups"_a, "masters"_a,
        "history"_a, "grads"_a, "clean_grads"_a, "masks"_a, "lrs"_a, "sigmas"_a, "noise"_a, "grad_scale"_a, "clip"_a,
        "found_inf"_a, py::kw_only(), "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "grad_weight"_a,
        "clean_weight"_a, "kappa"_a, "beta"_a, "sigma"_a, "eta"_a, "index"_a, "offset"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "flatkern's CPU kernels: the operations of flatkern/ops.py on raw memory, without checks meant for people.";
  py::register_exception<cpu::Mismatch>(m, "Mismatch", PyExc_ValueError);
  cpu::choose_isa();

  m.def("fill_normal_", fill_normal_, "outs"_a, "noise"_a, py::kw_only(), "index"_a, "offset"_a);
  m.def("filter_norms_", filter_norms_, "norms"_a, "params"_a);
  m.def("ascent_norm_", ascent_norm_, "norm"_a, "params"_a, "grads"_a, py::kw_only(), "eta"_a);
  m.def("gradient_norm_", gradient_norm_, "norm"_a, "grads"_a, "clean_grads"_a, "grad_scale"_a, py::kw_only(),
        "grad_weight"_a, "clean_weight"_a);
  m.def("perturb_gaussian_", perturb_gaussian_, "params"_a, "backups"_a, "masters"_a, "norms"_a, "history"_a,
        "sigmas"_a, "noise"_a, py::kw_only(), "sigma"_a, "eta"_a, "index"_a, "offset"_a);
  m.def("perturb_ascent_", perturb_ascent_, "params"_a, "backups"_a, "masters"_a, "grads"_a, "norm"_a, py::kw_only(),
        "rho"_a, "eta"_a);
  m.def("restore_", restore_, "params"_a, "backups"_a);
  m.def("mix_gradients_", mix_gradients_, "grads"_a, "history"_a, "clean_grads"_a, "grad_scale"_a, "clip"_a,
        py::kw_only(), "grad_weight"_a, "clean_weight"_a, "beta"_a);
  m.def("sgd_update_", sgd_update_, "params"_a, "momentum_buffers"_a, "backups"_a, "masters"_a, "history"_a, "grads"_a,
        "clean_grads"_a, "masks"_a, "lrs"_a, "sigmas"_a, "noise"_a, "grad_scale"_a, "clip"_a, "found_inf"_a,
        py::kw_only(), "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a, "grad_weight"_a,
        "clean_weight"_a, "kappa"_a, "beta"_a, "sigma"_a, "eta"_a, "index"_a, "offset"_a);
  define_adam<false>(m, "adam_update_");
  define_adam<true>(m, "adamw_update_");
  m.def("count_magnitudes_", count_magnitudes_, "counts"_a, "grads"_a, "prefix"_a);
  m.def("pack_mask_", pack_mask_, "masks"_a, "grads"_a, "threshold"_a);
  m.def("amplify_", amplify_, "params"_a, "previous"_a, "masks"_a, py::kw_only(), "kappa"_a);

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
