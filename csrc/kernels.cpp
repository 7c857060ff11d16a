// The four kernels: coefficients per channel, partition over threads, choice of instruction set. The work on values is
// in loops.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "epilogue.h"
#include "loops.h"
#include "running.h"
#include "tensors.h"

namespace {

// Those of this processor, best first.
std::vector<std::pair<std::string, const Loops *>> supported() {
    return {
#ifdef SYNCBN_X86
        {"avx512", __builtin_cpu_supports("x86-64-v4") ? avx512::loops : nullptr},
        {"avx2", __builtin_cpu_supports("x86-64-v3") ? avx2::loops : nullptr},
#endif
        {"portable", portable::loops},
    };
}

const Loops *loops = nullptr;

void use_instruction_set(const std::string &wanted) {
    for (const auto &[name, of] : supported())
        if (of && (wanted.empty() || name == wanted)) {
            loops = of;
            return;
        }
    throw std::invalid_argument("name: expected one of instruction_sets(), got " + wanted);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto &[name, of] : supported())
        if (of) names.push_back(name);
    return names;
}

// Part of a dense tensor: planes (N, C, S), or rows (M, columns, 1).
struct View {
    int64_t rows, columns, inner, offset;

    int64_t values() const { return rows * columns * inner; }
    int64_t run() const { return inner > 1 ? inner : columns; }  // values in a plane or row
    int64_t units() const { return inner > 1 ? rows * columns * blocks_per_plane(inner) : rows; }
};

// How a dense (N, C, S) is read. Small planes are read as rows of C·S columns, and of narrow rows several as one wide
// row: whole vectors, whatever C and S are. Column j holds values of channel j / spread % C.
struct Plan {
    int64_t channels, spread = 1;
    int64_t stride = 0;  // of arrays with a value per column: whole vectors of any type
    std::vector<View> views;

    Plan(int64_t N, int64_t C, int64_t S) : channels(C) {
        const int64_t columns = C * S;
        if (S > SMALL || (S > 1 && N < 8)) {
            views = {{N, C, S, 0}};
        } else if (columns > 0) {
            spread = S;
            int64_t fold = 1;
            while (columns * fold < 64 || (columns * fold % 16 && columns < 512)) fold *= 2;
            const int64_t left = N % fold;
            views = {{N / fold, columns * fold, 1, 0}, {left, columns, 1, (N - left) * columns}};
        }
        for (const View &view : views) stride = std::max(stride, (view.columns + 15) / 16 * 16);
    }
    static constexpr int64_t SMALL = 64;
};

// Below this many values a thread is not worth waking; from that many bytes on the caches do not hold the result.
constexpr int64_t GRAIN = 1 << 15, UNCACHED = 1 << 24;

// Values of several tensors that the second level of cache holds.
constexpr int64_t CACHED = 1 << 14;

struct Tensors {
    int threads;
    const Values &x;
    const void *dy = nullptr;
    void *out = nullptr;
    const void *residual = nullptr;
    double slope = 0;  // of leaky_relu
    Plan plan{x.N, x.C, x.S};

    int64_t size() const { return x.dtype == FLOAT64 ? 8 : x.dtype == FLOAT32 ? 4 : 2; }

    // The work on units [begin, end) of a view.
    Job job(const View &view, const void *coefficients, double *sums, int64_t begin, int64_t end) const {
        const int64_t offset = view.offset * size();
        const auto part = [offset](auto *whole) {
            return whole ? (decltype(whole))((const char *)whole + offset) : nullptr;
        };
        const bool aligned = ((uintptr_t)out + offset) % LARGEST_VECTOR == 0 && view.run() * size() % LARGEST_VECTOR == 0;
        const bool streaming = out && aligned && view.values() * size() >= UNCACHED;
        return {part(x.at), part(dy), part(residual), part(out), slope, coefficients, sums,
                plan.stride, view.columns, view.inner, begin, end, streaming};
    }

    // Each thread goes through its part from the end to the beginning: the sums went the other way, and what they read
    // last is still in the cache.
    void elementwise(Loop loop, const void *coefficients) const {
        for (const View &view : plan.views) {
            const int64_t units = view.units(), team = std::min<int64_t>(threads, 1 + view.values() / GRAIN);
            const int64_t piece = std::max<int64_t>(1, GRAIN / std::min(view.run(), BLOCK));
#pragma omp parallel for schedule(static) num_threads(int(team)) if (team > 1)
            for (int64_t k = 0; k < team; k++) {
                const int64_t begin = units * k / team;
                for (int64_t end = units * (k + 1) / team; end > begin; end -= piece)
                    loop(job(view, coefficients, nullptr, std::max(begin, end - piece), end));
            }
        }
    }

    // Into to (2C,). The slices depend on the shape alone and are added in order: any number of threads, the same bits.
    // With `first` that loop's result, in pieces that stay in the cache, is what the other takes for dy.
    void sum(Loop loop, const void *coefficients, double *to, Loop first = nullptr) const {
        std::fill_n(to, 2 * plan.channels, 0.0);
        for (const View &view : plan.views) {
            const int64_t stride = plan.stride;
            const int64_t slices = std::clamp<int64_t>(view.values() / std::max(GRAIN, 32 * stride), 1, 64);
            std::vector<double> sums(slices * 2 * stride);
            const int64_t units = view.units();
            [[maybe_unused]] const int team = int(std::min<int64_t>(threads, slices));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
            for (int64_t k = 0; k < slices; k++) {
                const int64_t end = units * (k + 1) / slices;
                const int64_t piece = first ? std::max<int64_t>(1, CACHED / std::min(view.run(), BLOCK)) : end;
                for (int64_t begin = units * k / slices; begin < end; begin += piece) {
                    double *const of_slice = sums.data() + k * 2 * stride;
                    Job of_piece = job(view, coefficients, of_slice, begin, std::min(end, begin + piece));
                    of_piece.streaming = false;
                    if (first) first(of_piece), of_piece.dy = of_piece.out;
                    loop(of_piece);
                }
            }
            for (int64_t k = 1; k < slices; k++)
                for (int64_t j = 0; j < 2 * stride; j++) sums[j] += sums[k * 2 * stride + j];
            const int64_t period = plan.channels * plan.spread;
            for (int which = 0; which < 2; which++)  // Σx, Σx²
                for (int64_t first = 0; first < view.columns; first += period)
                    for (int64_t c = 0; c < plan.channels; c++) {
                        const double *column = sums.data() + which * stride + first + c * plan.spread;
                        if (plan.spread == 1) {
                            to[which * plan.channels + c] += *column;
                            continue;
                        }
                        double sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t s = 0; s < plan.spread; s++) sum += column[s];
                        to[which * plan.channels + c] += sum;
                    }
        }
    }

    double rounded(double value) const { return x.dtype == FLOAT64 ? value : float(value); }

    // Arrays of coefficients in the compute type, one value per column: of(c, values, rounded) sets those of channel c.
    template <class Of>
    std::vector<char> coefficients(int kinds, Of of) const {
        return x.dtype == FLOAT64 ? coefficients_in<double>(kinds, of) : coefficients_in<float>(kinds, of);
    }

    template <class A, class Of>
    std::vector<char> coefficients_in(int kinds, Of of) const {
        std::vector<char> bytes(kinds * plan.stride * sizeof(A));
        A *arrays = (A *)bytes.data();
        const auto rounded = [](double value) { return double(A(value)); };
        const int64_t C = plan.stride ? plan.channels : 0, spread = plan.spread, stride = plan.stride;
        for (int64_t c = 0; c < C; c++) {
            double values[COEFFICIENTS];
            of(c, values, rounded);
            for (int k = 0; k < kinds; k++) arrays[k * stride + c] = A(values[k]);
        }
        for (int k = 0; k < kinds; k++, arrays += stride) {
            for (int64_t c = C; spread > 1 && c-- > 0;) std::fill_n(arrays + c * spread, spread, arrays[c]);
            for (int64_t j = C * spread; j < stride; j++) arrays[j] = arrays[j - C * spread];
        }
        return bytes;
    }
};

void moments(int threads, nb::handle x_, nb::handle payload_) {
    const Values x("x", x_);
    double *const payload = result("payload", payload_, 2 * x.C + 1);
    const nb::gil_scoped_release release;
    const Tensors t{threads, x};
    t.sum(loops[x.dtype].moments, nullptr, payload);
    payload[2 * x.C] = double(x.N * x.S);
}

// z = scale·(x - p) + shift with p next to the mean: nothing cancels.
template <class Rounded>
void affine(double *k, double mean, double invstd, double weight, double bias, Rounded rounded) {
    k[PIVOT] = rounded(mean);
    k[SCALE] = weight * invstd;
    k[SHIFT] = (k[PIVOT] - mean) * k[SCALE] + bias;
}

// statistics: [mean, 1/√(σ²+ε), N], (2C+1,). Returns N; where that has no variance (0 < N <= 1, or NaN), nothing is
// written.
double normalize(int threads, nb::handle x_, nb::handle y_, nb::handle total_, nb::handle statistics_,
                 nb::handle epilogue_, double eps, nb::handle running_) {
    const Values x("x", x_), y("y", y_, x);
    const int64_t C = x.C;
    const Vector total("total", total_, 2 * C + 1);
    const Epilogue epilogue(epilogue_, x);
    double *const statistics = result("statistics", statistics_, 2 * C + 1);
    Running running(running_, C);
    const Moments of(total.begin(), C);
    if (!(of.count > 1 || of.count <= 0)) return of.count;
    {
        const nb::gil_scoped_release release;
        double *const mean = statistics, *const invstd = mean + C;
        for (int64_t c = 0; c < C; c++) mean[c] = of.mean(c), invstd[c] = 1 / std::sqrt(of.variance(c) + eps);
        invstd[C] = of.count;
        const Tensors t{threads, x, nullptr, y.at, epilogue.residual, epilogue.slope};
        const auto coefficients = t.coefficients(SHIFT + 1, [&](int64_t c, double *k, auto rounded) {
            affine(k, mean[c], invstd[c], epilogue.weight[c], epilogue.bias[c], rounded);
        });
        t.elementwise(loops[x.dtype].normalize[epilogue.activation], coefficients.data());
        running.move(of, C);
    }
    running.finish();
    return of.count;
}

// Writes dz, too, unless that is None.
void backward_sums(int threads, nb::handle dy_, nb::handle x_, nb::handle statistics_, nb::handle epilogue_,
                   nb::handle payload_, nb::handle dz_) {
    const Values x("x", x_), dy("dy", dy_, x);
    const int64_t C = x.C;
    const Vector statistics("statistics", statistics_, 2 * C + 1);
    const Epilogue epilogue(epilogue_, x);
    void *const dz = dz_.is_none() ? nullptr : Values("dz", dz_, x).at;
    if (epilogue.residual && epilogue.activation != IDENTITY && dz_.is_none())
        refuse("dz", "expected a tensor: there is a residual");
    double *const t1 = result("payload", payload_, 2 * C), *const t2 = t1 + C;
    const nb::gil_scoped_release release;
    const double *const mean = statistics.begin(), *const invstd = mean + C;
    const Tensors t{threads, x, dy.at, dz, epilogue.residual, epilogue.slope};
    const int kinds = epilogue.activation == IDENTITY ? 1 : SHIFT + 1;
    const auto coefficients = t.coefficients(kinds, [&](int64_t c, double *k, auto rounded) {
        affine(k, mean[c], invstd[c], epilogue.weight[c], epilogue.bias[c], rounded);
    });
    const Loops &of = loops[x.dtype];
    if (dz)
        t.sum(of.backward_sums[IDENTITY], coefficients.data(), t1, of.gradient[epilogue.activation]);
    else
        t.sum(of.backward_sums[epilogue.activation], coefficients.data(), t1);
    for (int64_t c = 0; c < C; c++) t2[c] = (t2[c] + (t.rounded(mean[c]) - mean[c]) * t1[c]) * invstd[c];
}

// dx = scale·(dz - q) + x_scale·(x - p) + x_shift with q next to the mean of dz: nothing cancels.
void backward_input(int threads, nb::handle dy_, nb::handle x_, nb::handle dx_, nb::handle statistics_,
                    nb::handle epilogue_, nb::handle sums_) {
    const Values x("x", x_), dy("dy", dy_, x), dx("dx", dx_, x);
    const int64_t C = x.C;
    const Vector statistics("statistics", statistics_, 2 * C + 1), sums("sums", sums_, 2 * C);
    const Epilogue epilogue(epilogue_, x);
    if (epilogue.residual) refuse("residual", "expected None: dz holds it");
    const nb::gil_scoped_release release;
    const double *const mean = statistics.begin(), *const invstd = mean + C;
    const double n = invstd[C];
    const double *const t1 = sums.begin(), *const t2 = t1 + C;
    const Tensors t{threads, x, dy.at, dx.at, nullptr, epilogue.slope};
    const auto coefficients = t.coefficients(COEFFICIENTS, [&](int64_t c, double *k, auto rounded) {
        affine(k, mean[c], invstd[c], epilogue.weight[c], epilogue.bias[c], rounded);
        k[DZ_PIVOT] = rounded(t1[c] / n);
        k[X_SCALE] = -k[SCALE] * invstd[c] * t2[c] / n;
        k[X_SHIFT] = (k[PIVOT] - mean[c]) * k[X_SCALE] + (k[DZ_PIVOT] - t1[c] / n) * k[SCALE];
    });
    t.elementwise(loops[x.dtype].backward_input[epilogue.activation], coefficients.data());
}

}  // namespace

void bind_kernels(nb::module_ &module) {
    use_instruction_set("");
    module.def("is_dense", [](nb::handle tensor) { return layout(Tensor(tensor)).has_value(); });
    module.def("moments", moments);
    module.def("normalize", normalize, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
               nb::arg().none());
    module.def("backward_sums", backward_sums, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
               nb::arg().none());
    module.def("backward_input", backward_input);
    module.def("instruction_sets", instruction_sets, "Those of this processor, best first; the first is in use.");
    module.def("use_instruction_set", use_instruction_set, nb::arg("name"), "Use another one, for tests.");
}
