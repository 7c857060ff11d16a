// Per-channel arithmetic between the collectives: a few hundred numbers, where each torch operation costs more than
// the work.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace nb = nanobind;

namespace {

// total is [Σx, Σx², N] (2C+1,) everywhere.
struct Moments {
    double mean, variance;  // biased

    Moments(const double *total, std::int64_t channels, std::int64_t c) {
        const double n = std::max(total[2 * channels], 1.0);
        mean = total[c] / n;
        const double v = total[channels + c] / n - mean * mean;
        variance = v < 0 ? 0 : v;  // a NaN stays
    }
};

// out: [mean, 1/√(variance + eps), N]. Returns N.
double statistics(std::uintptr_t total_address, std::int64_t channels, double eps, std::uintptr_t out_address) {
    const double *total = reinterpret_cast<const double *>(total_address);
    double *out = reinterpret_cast<double *>(out_address);
    for (std::int64_t c = 0; c < channels; ++c) {
        const Moments of(total, channels, c);
        out[c] = of.mean;
        out[channels + c] = 1 / std::sqrt(of.variance + eps);
    }
    return out[2 * channels] = total[2 * channels];
}

template <class T, class Value>
void move(T *running, std::int64_t channels, double momentum, Value value) {
    for (std::int64_t c = 0; c < channels; ++c) {
        const double old = running[c];
        running[c] = static_cast<T>(old + momentum * (value(c) - old));
    }
}

template <class Value>
void move(std::uintptr_t running, bool is_float64, std::int64_t channels, double momentum, Value value) {
    if (running == 0) return;
    if (is_float64)
        move(reinterpret_cast<double *>(running), channels, momentum, value);
    else
        move(reinterpret_cast<float *>(running), channels, momentum, value);
}

// running += momentum·(value - running), with the mean and the unbiased variance; nothing where N is 0.
void update_running(std::uintptr_t total_address, std::int64_t channels, double momentum, std::uintptr_t mean,
                    bool mean_is_float64, std::uintptr_t var, bool var_is_float64) {
    const double *total = reinterpret_cast<const double *>(total_address);
    const double n = total[2 * channels];
    if (n == 0) return;
    const double unbiased = n / std::max(n - 1, 1.0);
    move(mean, mean_is_float64, channels, momentum, [&](std::int64_t c) { return Moments(total, channels, c).mean; });
    move(var, var_is_float64, channels, momentum,
         [&](std::int64_t c) { return unbiased * Moments(total, channels, c).variance; });
}

}  // namespace

void bind_statistics(nb::module_ &module) {
    module.def("statistics", &statistics);
    module.def("update_running", &update_running);
}
