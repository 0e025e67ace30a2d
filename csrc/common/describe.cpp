// Describes whole lists of tensors for backends that keep tables on a device: what differs from the last call.
#include <cstring>
#include <vector>

#include "from_python.h"

namespace flatkern {
namespace {

// Collects the words of a description.
struct Writer {
  std::vector<int64_t> words;

  bool take(int64_t word) {
    words.push_back(word);
    return true;
  }
  bool take(const int64_t* some, int64_t count) {
    words.insert(words.end(), some, some + count);
    return true;
  }
};

// Compares them with those of an earlier description; false at the first that differs.
struct Comparer {
  const int64_t *at, *end;

  bool take(int64_t word) { return at != end && *at++ == word; }
  bool take(const int64_t* some, int64_t count) {
    if (end - at < count) return false;
    for (int64_t i = 0; i < count; ++i)
      if (at[i] != some[i]) return false;
    at += count;
    return true;
  }
};

constexpr int64_t kAbsent = -1;  // no tensor's description begins with it

// One pass over the arguments of a call. False where `sink` said false, or with a Python error set.
template <class Sink>
struct Pass {
  DlpackReader read;
  Sink& sink;

  bool tensor(PyObject* object, int64_t* pointer) {
    dlpack::Tensor t;
    if (read(object, &t) != 0) return false;
    *pointer = t.data == nullptr ? 0 : reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
    if (*pointer == 0) {
      int64_t numel = 1;
      for (int32_t d = 0; d < t.ndim; ++d) numel *= t.shape[d];
      if (numel != 0) {
        PyErr_SetString(PyExc_ValueError, "a tensor has elements but no memory");
        return false;
      }
    }
    const int64_t kind = static_cast<int64_t>(t.code) << 32 | static_cast<int64_t>(t.bits) << 16 | t.lanes;
    const int64_t place = static_cast<int64_t>(t.device_type) << 32 | static_cast<uint32_t>(t.device_id);
    const int64_t form = static_cast<int64_t>(t.ndim) << 1 | (*pointer % 16 == 0);
    return sink.take(kind) && sink.take(place) && sink.take(form) && sink.take(t.shape, t.ndim) &&
           sink.take(t.strides, t.ndim);
  }

  bool all(PyObject* lists, PyObject* singles, int64_t count, int64_t* pointers) {
    const Py_ssize_t width = PyTuple_GET_SIZE(lists);
    if (!sink.take(count)) return false;
    for (Py_ssize_t i = 0; i < width; ++i) {
      PyObject* list = PyTuple_GET_ITEM(lists, i);
      if (list == Py_None) {
        if (!sink.take(kAbsent)) return false;
        for (int64_t k = 0; k < count; ++k) pointers[k * width + i] = 0;
        continue;
      }
      for (int64_t k = 0; k < count; ++k) {
        // Reading a tensor may run Python code, which could shorten the list.
        const Reference item(
            Py_NewRef(k < PySequence_Fast_GET_SIZE(list) ? PySequence_Fast_GET_ITEM(list, k) : Py_None));
        if (!tensor(item.get(), &pointers[k * width + i])) return false;
      }
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(singles); ++i) {
      PyObject* single = PyTuple_GET_ITEM(singles, i);
      int64_t pointer;
      if (single == Py_None ? !sink.take(kAbsent) : !tensor(single, &pointer)) return false;
    }
    return true;
  }
};

// The number of entries that all lists have; -1 with a Python error set where they differ.
int64_t common_length(PyObject* lists) {
  Py_ssize_t count = -1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(lists); ++i) {
    PyObject* list = PyTuple_GET_ITEM(lists, i);
    if (list == Py_None) continue;
    if (!PyList_Check(list) && !PyTuple_Check(list)) {
      PyErr_Format(PyExc_TypeError, "expected a list of tensors, got a %s", Py_TYPE(list)->tp_name);
      return -1;
    }
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
    if (count >= 0 && size != count) {
      PyErr_SetString(PyExc_ValueError, "lists differ in length");
      return -1;
    }
    count = size;
  }
  if (count < 0) PyErr_SetString(PyExc_TypeError, "every list is absent");
  return count;
}

bool is_bytes(PyObject* object, const void* data, Py_ssize_t size) {
  return PyBytes_GET_SIZE(object) == size && (size == 0 || std::memcmp(PyBytes_AS_STRING(object), data, size) == 0);
}

}  // namespace

PyObject* describe(PyObject* lists, PyObject* singles, PyObject* pointers, PyObject* layouts) {
  const DlpackReader read = dlpack_reader();
  if (PyErr_Occurred()) return nullptr;
  if (read == nullptr) Py_RETURN_NONE;
  if (!PyTuple_Check(lists) || !PyTuple_Check(singles) || !PyBytes_Check(pointers) || !PyBytes_Check(layouts)) {
    PyErr_SetString(PyExc_TypeError, "describe: expected two tuples, then two bytes");
    return nullptr;
  }
  const int64_t count = common_length(lists);
  if (count < 0) return nullptr;
  PyObject* found = PyBytes_FromStringAndSize(nullptr, sizeof(int64_t) * count * PyTuple_GET_SIZE(lists));
  if (found == nullptr) return nullptr;
  auto* table = reinterpret_cast<int64_t*>(PyBytes_AS_STRING(found));

  const auto* before = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(layouts));
  Comparer comparer{before, before + PyBytes_GET_SIZE(layouts) / sizeof(int64_t)};
  bool same = Pass<Comparer>{read, comparer}.all(lists, singles, count, table) && comparer.at == comparer.end;
  Writer writer;
  if (!same && (PyErr_Occurred() || !Pass<Writer>{read, writer}.all(lists, singles, count, table))) {
    Py_DECREF(found);
    return nullptr;
  }
  PyObject* layouts_now = same ? Py_NewRef(layouts)
                               : PyBytes_FromStringAndSize(reinterpret_cast<const char*>(writer.words.data()),
                                                           sizeof(int64_t) * writer.words.size());
  const bool moved = !is_bytes(pointers, table, PyBytes_GET_SIZE(found));
  PyObject* result = layouts_now == nullptr ? nullptr : PyTuple_Pack(2, moved ? found : pointers, layouts_now);
  Py_XDECREF(layouts_now);
  Py_DECREF(found);
  return result;
}

bool same_items(PyObject* lists, PyObject* copies) {
  if (!PyTuple_Check(lists) || !PyTuple_Check(copies)) return false;
  const Py_ssize_t width = PyTuple_GET_SIZE(lists);
  if (PyTuple_GET_SIZE(copies) != width) return false;
  for (Py_ssize_t i = 0; i < width; ++i) {
    PyObject *a = PyTuple_GET_ITEM(lists, i), *b = PyTuple_GET_ITEM(copies, i);
    if (!(PyList_Check(a) || PyTuple_Check(a)) || !(PyList_Check(b) || PyTuple_Check(b))) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(a);
    if (PySequence_Fast_GET_SIZE(b) != count) return false;
    if (count > 0 && std::memcmp(PySequence_Fast_ITEMS(a), PySequence_Fast_ITEMS(b), sizeof(PyObject*) * count) != 0)
      return false;
  }
  return true;
}

}  // namespace flatkern
