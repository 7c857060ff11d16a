// The loops over a replica's values. INSTRUCTION_SET names the namespace that this compilation fills.
#include "loops.h"

#include <type_traits>

#include "vectors.h"

namespace {

template <class T>
using Compute = typename Element<T>::Compute;
template <class T>
using VectorFor = Vector<Compute<T>>;
template <class T>
constexpr int WIDTH = LANES<Compute<T>>;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// step(i, n) for each vector of `size` values: n of them, from i on.
template <int W, class Step>
inline INLINE void for_vectors(int64_t size, Step step) {
    int64_t i = 0;
    for (; i + W <= size; i += W) step(i, W);
    if (i < size) step(i, size - i);
}

// run(R, row, stride) for rows row, row + stride, ... R of them; all of [first, first + count) in the end. Rows far apart
// are streams of their own to the processor, which then fetches ahead; rows near each other confuse it.
template <int R, class Run>
inline INLINE void for_rows(int64_t first, int64_t count, Run run) {
    const int64_t stride = count / R;
    for (int64_t i = 0; i < stride; i++) run(std::integral_constant<int, R>(), first + i, stride);
    if constexpr (R > 1) for_rows<R / 2>(first + stride * R, count - stride * R, run);
}

// Add to sums[0] and sums[apart], lane by lane, the sums of R vectors of n values that lie `stride` apart.
//
// In the forward they are about a pivot p of their own: Σx = Σd + R·p, Σx² = Σd² + 2p·Σd + R·p² for d = x - p; what is
// large is added in double. Lanes from n on add zero.
template <class T, bool Backward, int R>
inline INLINE void sum(const T *x, const T *dy, int64_t stride, int64_t n, VectorFor<T> p, double *sums, int64_t apart) {
    using A = Compute<T>;
    Vector<A> d[R], s1 = {}, s2 = {};
    for (int r = 0; r < R; r++) d[r] = read(x + r * stride, n);
    if constexpr (!Backward) {
        p = Vector<A>{};
        for (int r = 0; r < R; r++) p += d[r];
        p *= A(1) / R;
    }
    for (int r = 0; r < R; r++) {
        d[r] -= p;
        Vector<A> u = d[r];
        if constexpr (Backward) u = read(dy + r * stride, n);
        s1 += u;
        s2 += u * d[r];
    }
    for (int k = 0; k < PARTS<A>; k++) {
        double *to1 = sums + k * LANES<double>, *to2 = to1 + apart;
        Double t1 = part<A>(s1, k), t2 = part<A>(s2, k);
        if constexpr (!Backward) {
            const Double q = part<A>(p, k), rq = R * q;
            t2 += q * (2 * t1 + rq);
            t1 += rq;
        }
        t1 += load<Double>(to1), t2 += load<Double>(to2);
        std::memcpy(to1, &t1, sizeof(t1));
        std::memcpy(to2, &t2, sizeof(t2));
    }
}

// The same for consecutive values of one channel.
template <class T, bool Backward, int R>
inline INLINE void sum_values(const T *x, const T *dy, int64_t size, VectorFor<T> p, double *lanes) {
    constexpr int W = WIDTH<T>;
    int64_t i = 0;
    for (; i + R * W <= size; i += R * W) sum<T, Backward, R>(x + i, dy + i, W, W, p, lanes, W);
    if constexpr (R > 1)
        sum_values<T, Backward, R / 2>(x + i, dy + i, size - i, p, lanes);
    else if (i < size)
        sum<T, Backward, 1>(x + i, dy + i, W, size - i, p, lanes, W);
}

template <int W>
inline INLINE double total(double *lanes) {
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[half + i];
    return lanes[0];
}

// plane(channel, offset, size) for each block of the job.
template <class Plane>
inline INLINE void for_blocks(const Job &job, Plane plane) {
    const int64_t S = job.inner, per_plane = blocks_per_plane(S);
    int64_t p = job.begin / per_plane, c = p % job.channels, start = job.begin % per_plane * BLOCK;
    for (int64_t b = job.begin; b < job.end; b++) {
        plane(c, p * S + start, min(BLOCK, S - start));
        start += BLOCK;
        if (start >= S) p++, start = 0, c = c + 1 < job.channels ? c + 1 : 0;
    }
}

template <class T, bool Backward>
void sums(const Job &job) {
    constexpr int W = WIDTH<T>;
    using V = VectorFor<T>;
    const T *x = (const T *)job.x, *dy = (const T *)job.dy;
    const Compute<T> *pivot = (const Compute<T> *)job.coefficients;
    const int64_t C = job.channels;
    if (job.inner > 1)
        for_blocks(job, [&](int64_t c, int64_t at, int64_t size) {
            double lanes[2 * W] = {};
            sum_values<T, Backward, 16>(x + at, dy + at, size, Backward ? V{} + pivot[c] : V{}, lanes);
            job.sums[c] += total<W>(lanes);
            job.sums[job.stride + c] += total<W>(lanes + W);
        });
    else
        for_rows<Backward ? 4 : 8>(job.begin, job.end - job.begin, [&](auto R, int64_t row, int64_t stride) {
            for_vectors<W>(C, [&](int64_t c, int64_t n) INLINE {
                const V p = Backward ? load<V>(pivot + c) : V{};
                sum<T, Backward, R>(x + row * C + c, dy + row * C + c, stride * C, n, p, job.sums + c, job.stride);
            });
        });
}

// The elementwise work on R vectors of n values that lie `stride` apart; coefficient(kind) yields a vector.
template <class T, bool Backward, int R, class Coefficients>
inline INLINE void map(const Job &job, int64_t at, int64_t stride, int64_t n, Coefficients coefficient) {
    for (int r = 0; r < R; r++, at += stride) {
        auto y = coefficient(SCALE) * (read((const T *)job.x + at, n) - coefficient(PIVOT)) + coefficient(SHIFT);
        if constexpr (Backward)
            y += coefficient(DY_SCALE) * (read((const T *)job.dy + at, n) - coefficient(DY_PIVOT));
        write((T *)job.out + at, y, n, job.streaming);
    }
}

template <class T, bool Backward>
void elementwise(const Job &job) {
    constexpr int W = WIDTH<T>, KINDS = Backward ? 5 : 3;
    using V = VectorFor<T>;
    const int64_t C = job.channels;
    const auto at = [&](int kind, int64_t c) INLINE { return (const Compute<T> *)job.coefficients + kind * job.stride + c; };
    if (job.inner > 1)
        for_blocks(job, [&](int64_t c, int64_t first, int64_t size) {
            V k[KINDS];
            for (int kind = 0; kind < KINDS; kind++) k[kind] = V{} + *at(kind, c);
            for_vectors<W>(size, [&](int64_t i, int64_t n) INLINE {
                map<T, Backward, 1>(job, first + i, 0, n, [&](int kind) INLINE { return k[kind]; });
            });
        });
    else
        for_rows<4>(job.begin, job.end - job.begin, [&](auto R, int64_t row, int64_t stride) {
            for_vectors<W>(C, [&](int64_t c, int64_t n) INLINE {
                V k[KINDS];
                for (int kind = 0; kind < KINDS; kind++) k[kind] = load<V>(at(kind, c));
                map<T, Backward, R>(job, row * C + c, stride * C, n, [&](int kind) INLINE { return k[kind]; });
            });
        });
    if (job.streaming) end_of_streams();
}

template <class T>
constexpr Loops LOOPS = {sums<T, false>, elementwise<T, false>, sums<T, true>, elementwise<T, true>};

}  // namespace

namespace INSTRUCTION_SET {
const Loops loops[DTYPES] = {LOOPS<float>, LOOPS<double>, LOOPS<bfloat16>, LOOPS<float16>};
}
