// The predicates of syncbn/_plain.py and _checks.py for the CPU: several times a step, for each tensor of a layer.
#include "tensors.h"

namespace {

// Types and layouts are compared by identity: torch has one object for each.
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

bool is_plain(nb::handle tensor) {
    static const Known &known = *new Known;
    static PyObject *const layout_name = Torch::name("layout"), *const is_neg = Torch::name("is_neg");
    PyObject *const type = (PyObject *)Py_TYPE(tensor.ptr());
    if (std::find(known.types, known.types + 3, type) == known.types + 3) return false;
    return get(tensor, layout_name).ptr() == known.strided && !is_true(call(tensor, is_neg));
}

bool are_plain(nb::tuple tensors) {
    for (nb::handle tensor : tensors) {
        if (tensor.is_none()) continue;
        if (!is_plain(tensor)) return false;
        const Tensor of(tensor);
        if (!of.on_cpu || of.dtype == KNOWN) return false;
    }
    return true;
}

// input (N, C, *) with C > 0, a residual like it or None, and (C,) or None: all plain, on the CPU and floating.
bool fit(nb::handle input, nb::handle residual, nb::args per_channel) {
    if (!is_plain(input)) return false;
    const Tensor x(input);
    if (!x.on_cpu || x.dtype >= INT64 || x.dims < 2 || x.sizes[1] < 1) return false;
    if (!residual.is_none()) {
        if (!is_plain(residual)) return false;
        const Tensor of(residual);
        if (!of.on_cpu || of.dtype != x.dtype || of.dims != x.dims || !std::equal(x.sizes, x.sizes + x.dims, of.sizes))
            return false;
    }
    for (nb::handle tensor : per_channel) {
        if (tensor.is_none()) continue;
        if (!is_plain(tensor)) return false;
        const Tensor of(tensor);
        if (!of.on_cpu || of.dtype >= INT64 || of.dims != 1 || of.sizes[0] != x.sizes[1]) return false;
    }
    return true;
}

}  // namespace

void bind_plain(nb::module_ &module) {
    module.def("are_plain", are_plain);
    module.def("fit", fit, nb::arg(), nb::arg().none(), nb::arg());
}
