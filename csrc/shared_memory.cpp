#include <nanobind/nanobind.h>

void bind_shared_memory(nanobind::module_ &) {}
