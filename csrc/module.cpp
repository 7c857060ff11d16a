// The Python module syncbn._native.
#include <nanobind/nanobind.h>

void bind_kernels(nanobind::module_ &module);
void bind_plain(nanobind::module_ &module);
void bind_shared_memory(nanobind::module_ &module);

NB_MODULE(_native, module) {
    module.attr("INTERFACE") = 6;  // see syncbn/_compiled.py
    module.doc() = "CPU kernels and the shared-memory all-reduce of syncbn.";
    nanobind::set_leak_warnings(false);  // what a loss that is alive at exit still holds is no leak
    bind_kernels(module);
    bind_plain(module);
    bind_shared_memory(module);
}
