// What loops.cpp, compiled once per instruction set, offers kernels.cpp.
#pragma once

#include <cstdint>

// Tensors are dense: planes (N, C, S) of S values of one channel, or rows (M, C).
//
// Coefficients per channel are in the compute type of the tensors: double for float64, else float.
//   sums         Σu and Σu·(x - pivot), u = dy, in the backward; in the forward Σx and Σx², without coefficients
//   elementwise  scale·(x - pivot) + shift, plus dy_scale·(dy - dy_pivot) in the backward
enum Coefficient { PIVOT, SCALE, SHIFT, DY_PIVOT, DY_SCALE, COEFFICIENTS };

struct Job {
    const void *x, *dy;
    void *out;
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
    Loop moments, normalize, backward_sums, backward_input;
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
