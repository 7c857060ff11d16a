// Per-channel arithmetic between the collectives: a few hundred numbers, where each torch operation costs more than
// the work.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace nb = nanobind;

namespace {

// total: [Σx, Σx², N] (2C+1,). out: mean, biased variance and 1/√(variance + eps), (3, C).
void statistics(std::uintptr_t total_address, std::int64_t channels, double eps, std::uintptr_t out_address) {
    const double *total = reinterpret_cast<const double *>(total_address);
    double *mean = reinterpret_cast<double *>(out_address), *variance = mean + channels, *invstd = variance + channels;
    const double n = std::max(total[2 * channels], 1.0);
    for (std::int64_t c = 0; c < channels; ++c) {
        mean[c] = total[c] / n;
        const double v = total[channels + c] / n - mean[c] * mean[c];
        variance[c] = v < 0 ? 0 : v;  // a NaN stays
        invstd[c] = 1 / std::sqrt(variance[c] + eps);
    }
}

template <class T>
void move(T *running, const double *value, std::int64_t channels, double momentum, double factor) {
    for (std::int64_t c = 0; c < channels; ++c) {
        const double old = running[c];
        running[c] = static_cast<T>(old + momentum * (factor * value[c] - old));
    }
}

// running += momentum·(factor·value - running)
void update_running(std::uintptr_t running, bool is_float64, std::uintptr_t value, std::int64_t channels,
                    double momentum, double factor) {
    const double *values = reinterpret_cast<const double *>(value);
    if (is_float64)
        move(reinterpret_cast<double *>(running), values, channels, momentum, factor);
    else
        move(reinterpret_cast<float *>(running), values, channels, momentum, factor);
}

}  // namespace

void bind_statistics(nb::module_ &module) {
    module.def("statistics", &statistics);
    module.def("update_running", &update_running);
}
