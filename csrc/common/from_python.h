// Reads Python lists of tensors and numbers into the plain arrays of table.h, through CPython's C API alone.
//
// Python code that runs meanwhile cannot make a read go wrong: a number's __float__ may clear the very list it is in,
// and while the GIL is released another thread may drop the tensors of a call.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>
#include <utility>

#include "dlpack.h"
#include "table.h"

namespace flatkern {

// Owns a reference to a Python object. Made, assigned and destroyed with the GIL held.
class Reference {
 public:
  Reference() = default;
  explicit Reference(PyObject* owned) : object_(owned) {}
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Reference() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// A tensor or a list of tensors: what was passed, then the table read from it. In two steps, because converting the
// numbers of a call may run Python code, which may free memory that a table points to.
struct TensorArgument : Table {
  Reference passed;  // the tensor, or a tuple of the list's tensors, which keeps them alive; null for None
};

// The types of the schemas in flatkern/ops.py: Tensor[], Tensor[]?, Tensor and Tensor?.
struct Tensors : TensorArgument {};
struct MaybeTensors : TensorArgument {};
struct Tensor : TensorArgument {};
struct MaybeTensor : TensorArgument {};

// Lists may be tuples. False with a Python error set where the type is wrong.
bool read(PyObject* object, Tensors& out);
bool read(PyObject* object, MaybeTensors& out);
bool read(PyObject* object, Tensor& out);
bool read(PyObject* object, MaybeTensor& out);

// Fills in the table. False with a Python error set.
bool read_table(TensorArgument& argument);

// Numbers; 0-dim tensors count as such. False with a Python error set.
bool read(PyObject* object, Floats& out);
bool read(PyObject* object, Ints& out);
bool read(PyObject* object, Bools& out);

// Bumps the version counters of a list of tensors, by which autograd knows that they were written. False with a Python
// error set. Runs no Python code, so no signal handler either.
bool increment_version(PyObject* tensors);

// Fills in a tensor's pointer, shape and strides; 0, or -1 with a Python error set. Nothing is waited for, and nothing
// is asked of a stream. Null before torch 2.10, where attributes are read, or with a Python error set.
using DlpackReader = int (*)(void* object, dlpack::Tensor* out);
DlpackReader dlpack_reader();

// The ways in which tensors can be read here, the fastest first, of "libtorch dlpack attributes" (see direct.h for the
// first). Empty with a Python error set.
std::string readers();

// Read them in no faster way than `name`; returns the previous one. For tests.
std::string read_through(const std::string& name);

// What tables of tensors depend on, read in one pass, on any device and without waiting for it.
//
// `arguments` is a tuple of lists of tensors, of tensors, and of None where one is absent. The result is a triple of
// bytes: the pointers of the lists, int64, list by list without those that are absent; the pointers of the single
// tensors; and dtype, device, shape, strides and alignment of everything, such that equal bytes mean equal layouts.
// Where one is as in an earlier result, given as `pointers`, `singles` and `layouts`, that very object is returned, for
// a caller to recognise by identity.
//
// None where torch does not offer DLPack's exchange interface. Null with a Python error set where lists differ in
// length, or a tensor has elements but no memory.
PyObject* describe(PyObject* arguments, PyObject* pointers, PyObject* singles, PyObject* layouts);

// Whether each of `lists` holds the very objects of its counterpart in `copies`. False where one is no list.
bool same_items(PyObject* lists, PyObject* copies);

// state[param][key] for every param and key, as a tuple of one list per key; None where any is missing.
// Never calls a defaultdict's factory. Null with a Python error set.
PyObject* gather_state(PyObject* state, PyObject* params, PyObject* keys);

}  // namespace flatkern
