// What loops.cpp, compiled once per instruction set, offers kernels.cpp.
#pragma once

#include <cstdint>

// Tensors are dense: planes (N, C, S) of S values of one channel, or rows (M, C).
//
// Coefficients per channel are in the compute type of the tensors: double for float64, else float. With an activation f
// and its argument z = scale·(x - pivot) + shift + residual:
//   moments         Σx and Σx², without coefficients
//   normalize       out = f(z)
//   gradient        out = dz = dy·f'(z)
//   backward_sums   Σdz and Σdz·(x - pivot); no residual
//   backward_input  out = scale·(dz - dz_pivot) + x_scale·(x - pivot) + x_shift; no residual
enum Coefficient { PIVOT, SCALE, SHIFT, DZ_PIVOT, X_SCALE, X_SHIFT, COEFFICIENTS };

enum Activation { IDENTITY, RELU, LEAKY_RELU, SILU, HARDSWISH, ACTIVATIONS };

struct Job {
    const void *x, *dy, *residual;
    void *out;
    double slope;              // of leaky_relu
    const void *coefficients;  // (kinds, stride)
    double *sums;              // (2, stride), added to
    int64_t stride;            // at least C, whole vectors
    int64_t channels, inner;   // C, S; S = 1 for rows
    int64_t begin, end;        // rows, or blocks of planes
    bool streaming;            // write past the caches: out and its planes or rows are aligned to a vector
};

constexpr int64_t LARGEST_VECTOR = 64;  // bytes

// Values of a plane that make a block.
constexpr int64_t BLOCK = 4096;
constexpr int64_t blocks_per_plane(int64_t inner) { return (inner + BLOCK - 1) / BLOCK; }

using Loop = void (*)(const Job &);
struct Loops {
    Loop moments, normalize[ACTIVATIONS], gradient[ACTIVATIONS], backward_sums[ACTIVATIONS],
        backward_input[ACTIVATIONS];
};

enum DType { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, DTYPES };

namespace portable {
extern const Loops loops[DTYPES];
}
namespace avx2 {
extern const Loops loops[DTYPES];
}
namespace avx512 {
extern const Loops loops[DTYPES];
}
