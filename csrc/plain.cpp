// The predicate of syncbn/_plain.py for the CPU: several times a step, for each tensor of a layer.
#include "tensors.h"

namespace {

// Types and dtypes are compared by identity: torch has one object for each.
struct Known {
    PyObject *types[3], *strided;

    Known() {
        const nb::module_ torch = nb::module_::import_("torch"), nn = nb::module_::import_("torch.nn");
        types[0] = nb::object(torch.attr("Tensor")).release().ptr();
        types[1] = nb::object(nn.attr("Parameter")).release().ptr();
        types[2] = nb::object(nn.attr("Buffer")).release().ptr();
        strided = nb::object(torch.attr("strided")).release().ptr();
    }
};

bool is_plain(PyObject *tensor) {
    static const Known &known = *new Known;
    static PyObject *const layout_name = Torch::name("layout"), *const is_neg = Torch::name("is_neg");
    PyObject *const type = (PyObject *)Py_TYPE(tensor);
    if (std::find(known.types, known.types + 3, type) == known.types + 3) return false;
    if (!is_true(get(tensor, torch().is_cpu)) || get(tensor, layout_name).ptr() != known.strided) return false;
    const nb::object dtype = get(tensor, torch().dtype);
    const auto end = torch().dtypes + KNOWN;
    return std::find(torch().dtypes, end, dtype.ptr()) != end && !is_true(call(tensor, is_neg));
}

bool are_plain(nb::tuple tensors) {
    for (nb::handle tensor : tensors)
        if (!tensor.is_none() && !is_plain(tensor.ptr())) return false;
    return true;
}

}  // namespace

void bind_plain(nb::module_ &module) { module.def("are_plain", are_plain); }
