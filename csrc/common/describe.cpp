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

// What stands before an argument's tensors; no tensor's description begins with one of these.
constexpr int64_t kAbsent = -1, kList = -2, kSingle = -3;

bool is_list(PyObject* object) { return PyList_Check(object) || PyTuple_Check(object); }

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

  // Pointers of lists go to `listed`, list by list, and those of single tensors to `single`, 0 for one that is absent.
  bool all(PyObject* arguments, int64_t count, int64_t* listed, int64_t* single) {
    if (!sink.take(count)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
      PyObject* argument = PyTuple_GET_ITEM(arguments, i);
      if (argument == Py_None) {
        if (!sink.take(kAbsent)) return false;
      } else if (!is_list(argument)) {
        if (!sink.take(kSingle) || !tensor(argument, single++)) return false;
      } else {
        if (!sink.take(kList)) return false;
        for (int64_t k = 0; k < count; ++k) {
          // Reading a tensor may run Python code, which could shorten the list.
          const Reference item(
              Py_NewRef(k < PySequence_Fast_GET_SIZE(argument) ? PySequence_Fast_GET_ITEM(argument, k) : Py_None));
          if (!tensor(item.get(), listed++)) return false;
        }
      }
    }
    return true;
  }
};

// How many tensors there are: lists, which all have `count`, and single ones.
struct Sizes {
  int64_t count = -1, lists = 0, singles = 0;

  // False with a Python error set where the lists differ in length, or there is none.
  bool read(PyObject* arguments) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
      PyObject* argument = PyTuple_GET_ITEM(arguments, i);
      if (argument == Py_None) continue;
      if (!is_list(argument)) {
        ++singles;
        continue;
      }
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(argument);
      if (lists++ > 0 && size != count) {
        PyErr_SetString(PyExc_ValueError, "lists differ in length");
        return false;
      }
      count = size;
    }
    if (lists == 0) PyErr_SetString(PyExc_TypeError, "every list is absent");
    return lists > 0;
  }
};

// New bytes of `count` words.
PyObject* new_words(int64_t count) { return PyBytes_FromStringAndSize(nullptr, sizeof(int64_t) * count); }

int64_t* words_of(PyObject* bytes) { return reinterpret_cast<int64_t*>(PyBytes_AS_STRING(bytes)); }

// `old` where it holds the same bytes.
PyObject* whichever_is_older(PyObject* old, const Reference& found) {
  const Py_ssize_t size = PyBytes_GET_SIZE(found.get());
  const bool same =
      PyBytes_GET_SIZE(old) == size && std::memcmp(PyBytes_AS_STRING(old), PyBytes_AS_STRING(found.get()), size) == 0;
  return same ? old : found.get();
}

}  // namespace

PyObject* describe(PyObject* arguments, PyObject* pointers, PyObject* singles, PyObject* layouts) {
  const DlpackReader read = dlpack_reader();
  if (PyErr_Occurred()) return nullptr;
  if (read == nullptr) Py_RETURN_NONE;
  if (!PyTuple_Check(arguments) || !PyBytes_Check(pointers) || !PyBytes_Check(singles) || !PyBytes_Check(layouts)) {
    PyErr_SetString(PyExc_TypeError, "describe: expected a tuple, then three times bytes");
    return nullptr;
  }
  Sizes sizes;
  if (!sizes.read(arguments)) return nullptr;
  const Reference listed(new_words(sizes.count * sizes.lists)), single(new_words(sizes.singles));
  if (listed.get() == nullptr || single.get() == nullptr) return nullptr;

  const int64_t* before = words_of(layouts);
  Comparer comparer{before, before + PyBytes_GET_SIZE(layouts) / sizeof(int64_t)};
  const bool same =
      Pass<Comparer>{read, comparer}.all(arguments, sizes.count, words_of(listed.get()), words_of(single.get())) &&
      comparer.at == comparer.end;
  Reference layouts_now(Py_NewRef(layouts));
  if (!same) {
    Writer writer;
    if (PyErr_Occurred() ||
        !Pass<Writer>{read, writer}.all(arguments, sizes.count, words_of(listed.get()), words_of(single.get())))
      return nullptr;
    layouts_now = Reference(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(writer.words.data()),
                                                      sizeof(int64_t) * writer.words.size()));
    if (layouts_now.get() == nullptr) return nullptr;
  }
  return PyTuple_Pack(3, whichever_is_older(pointers, listed), whichever_is_older(singles, single), layouts_now.get());
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
