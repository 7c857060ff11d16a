// The Python module syncbn._native.
#include <nanobind/nanobind.h>

void bind_kernels(nanobind::module_ &module);
void bind_shared_memory(nanobind::module_ &module);
void bind_statistics(nanobind::module_ &module);

NB_MODULE(_native, module) {
    module.attr("INTERFACE") = 2;  // see syncbn/_compiled.py
    module.doc() = "CPU kernels, statistics and the shared-memory all-reduce of syncbn, over raw pointers.";
    bind_kernels(module);
    bind_shared_memory(module);
    bind_statistics(module);
}
