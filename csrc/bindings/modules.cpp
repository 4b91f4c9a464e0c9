#include <optional>
#include <vector>

#include "bindings/bindings.h"

namespace fastgan {
namespace {

PyObject* interned(const char* name) {
  PyObject* const string = PyUnicode_InternFromString(name);
  if (string == nullptr) throw py::error_already_set();
  return string;
}

// Returns a collection that each torch.nn.Module has. Scripted and traced modules compute theirs.
py::dict collection(py::handle module, py::handle attributes, PyObject* name) {
  PyObject* const found = PyDict_GetItemWithError(attributes.ptr(), name);
  if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (found != nullptr && PyDict_Check(found)) return py::reinterpret_borrow<py::dict>(found);
  return py::dict(module.attr(name).attr("items")());
}

bool contains(py::handle set, py::handle value) {
  const int found = PySet_Contains(set.ptr(), value.ptr());
  if (found < 0) throw py::error_already_set();
  return found == 1;
}

class Hash {
 public:
  void add(py::handle object) { add(reinterpret_cast<std::uintptr_t>(object.ptr())); }
  void add(std::uint64_t part) {  // the finalizer of splitmix64 (Steele et al. 2014)
    part += value_ + 0x9e3779b97f4a7c15u;
    part = (part ^ (part >> 30)) * 0xbf58476d1ce4e5b9u;
    part = (part ^ (part >> 27)) * 0x94d049bb133111ebu;
    value_ = part ^ (part >> 31);
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0;
};

// As _structure of fastgan/ops/gradient_penalty/called_modules.py. A penalty of a small model makes this walk in each
// call, and takes one percent less time with it than with Python's.
std::optional<std::uint64_t> structure(const py::object& module, const py::frozenset& of_torch,
                                       const py::frozenset& functions, bool with_hooks, std::size_t most) {
  static PyObject* const children = interned("_modules");
  static PyObject* const forward = interned("forward");
  static PyObject* const hooks[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                    interned("_backward_hooks"), interned("_backward_pre_hooks")};
  Hash hash;
  std::vector<py::object> modules{module};
  for (std::size_t i = 0; i < modules.size(); ++i) {
    const py::object each = modules[i];
    const auto own = py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(each.ptr(), nullptr));
    if (!own) throw py::error_already_set();
    const py::handle cls = py::type::handle_of(each);
    hash.add(cls);
    if (!contains(of_torch, cls) || own.contains(forward)) {
      for (const auto& [name, value] : own) {
        if (name.ptr() != forward && !contains(functions, py::type::handle_of(value))) continue;
        hash.add(name);
        hash.add(value);
      }
    }
    for (const auto& [name, child] : collection(each, own, children))
      if (!child.is_none()) modules.push_back(py::reinterpret_borrow<py::object>(child));
    if (modules.size() > most) return std::nullopt;
    if (!with_hooks) continue;
    for (PyObject* const kind : hooks)
      for (const auto& [id, hook] : collection(each, own, kind)) hash.add(id.cast<std::uint64_t>());
  }
  hash.add(modules.size());
  return hash.value();
}

}  // namespace

void bind_modules(py::module_& m) { m.def("structure", &structure); }

}  // namespace fastgan
