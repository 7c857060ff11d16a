// The loops over a replica's values. INSTRUCTION_SET names the namespace that this compilation fills.
#include "loops.h"

#include <type_traits>

#include "vectors.h"

namespace {

template <class T>
using VectorFor = Vector<Compute<T>>;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// step(i, n) for each vector of `size` values: n of them, from i on. The last one takes values before it along, and so
// does them twice, where there are enough.
template <int W, class Step>
inline INLINE void for_vectors(int64_t size, Step step) {
    int64_t i = 0;
    for (; i + W <= size; i += W) step(i, W);
    if (i == size) return;
    if (size > W)
        step(size - W, W);
    else
        step(0, size);
}

// run(R, row, stride) for R rows at a time, `stride` apart, until all of [first, first + count) had their turn. To the
// processor rows far apart are streams of their own, and it fetches ahead; with neighbours it does not: twice the time.
// At a multiple of a page they would fall into one set of its cache: then they lie a row closer.
template <int R, class Run>
inline INLINE void for_rows(int64_t first, int64_t count, int64_t row_bytes, Run run) {
    while (count >= R) {
        int64_t stride = count / R;
        if (stride > 1 && stride * row_bytes % 4096 == 0) stride--;
        for (int64_t i = 0; i < stride; i++) run(std::integral_constant<int, R>(), first + i, stride);
        first += stride * R, count -= stride * R;
    }
    if constexpr (R > 1) for_rows<R / 2>(first, count, row_bytes, run);
}

// Sums lane by lane: Σx and Σx², or Σdy and Σdy·(x - p).
template <class A>
struct Sums {
    Double s1[PARTS<A>] = {}, s2[PARTS<A>] = {};
};

// Add the sums of R vectors, as x(r) and dy(r) read them. Lanes without a value are zero there, and add zero.
//
// In the forward they are about a pivot of their own, the mean p of each lane: with d = x - p, Σx = Σd + R·p and
// Σx² = Σd² + 2p·Σd + R·p². What is small is added in float, what is large in double.
template <class A, bool Backward, int R, class X, class DY>
inline INLINE void add(Sums<A> &sums, X x, DY dy, Vector<A> p) {
    Vector<A> d[R], s1 = {}, s2 = {};
    for (int r = 0; r < R; r++) d[r] = x(r);
    if constexpr (!Backward) {
        p = Vector<A>{};
        for (int r = 0; r < R; r++) p += d[r];
        p *= A(1) / R;
    }
    for (int r = 0; r < R; r++) {
        d[r] -= p;
        Vector<A> u = d[r];
        if constexpr (Backward) u = dy(r);
        s1 += u;
        s2 += u * d[r];
    }
    for (int k = 0; k < PARTS<A>; k++) {
        const Double t1 = part<A>(s1, k), t2 = part<A>(s2, k), q = part<A>(p, k);
        sums.s1[k] += Backward ? t1 : t1 + R * q;
        sums.s2[k] += Backward ? t2 : t2 + q * (2 * t1 + R * q);
    }
}

// The same for consecutive values, the end of a run that fills a vector.
template <class T, bool Backward, int R>
inline INLINE void add_run(Sums<Compute<T>> &sums, const T *x, const T *dy, int64_t size, VectorFor<T> p) {
    using A = Compute<T>;
    constexpr int W = WIDTH<T>;
    int64_t i = 0;
    for (; i + R * W <= size; i += R * W)
        add<A, Backward, R>(
            sums, [&](int r) INLINE { return read(x + i + r * W, W); },
            [&](int r) INLINE { return read(dy + i + r * W, W); }, p);
    if constexpr (R > 1)
        add_run<T, Backward, R / 2>(sums, x + i, dy + i, size - i, p);
    else if (i < size)
        add<A, Backward, 1>(
            sums, [&](int) INLINE { return last_lanes(read(x + size - W, W), size - i); },
            [&](int) INLINE { return last_lanes(read(dy + size - W, W), size - i); }, p);
}

// The sum of the lanes, in halves.
template <class A, int SIZE>
inline INLINE A total(typename VectorOf<A, SIZE>::type v) {
    if constexpr (SIZE == sizeof(A)) {
        return v[0];
    } else {
        using Half = typename VectorOf<A, SIZE / 2>::type;
        Half halves[2];
        std::memcpy(halves, &v, SIZE);
        return total<A, SIZE / 2>(halves[0] + halves[1]);
    }
}

template <int PARTS>
inline INLINE double total(const Double *parts) {
    Double sum = parts[0];
    for (int k = 1; k < PARTS; k++) sum += parts[k];
    return total<double, BYTES>(sum);
}

// Add to s1 and s2 the sums of a plane of `size` values, at most R vectors: they stay in registers, the pivot of the
// forward is their mean, and lanes are added but once.
template <class T, bool Backward, int R>
inline INLINE void add_plane(const T *x, const T *dy, int64_t size, Compute<T> p, double &s1, double &s2) {
    using A = Compute<T>;
    using V = Vector<A>;
    constexpr int W = WIDTH<T>;
    const int64_t last = size - (R - 1) * W;  // values in the last vector
    V d[R], t1 = {}, t2 = {};
    const auto vector = [&](const T *of, int r) INLINE {
        if (r + 1 < R) return read(of + r * W, W);
        return R > 1 ? last_lanes(read(of + size - W, W), last) : read(of, last);
    };
    for (int r = 0; r < R; r++) d[r] = vector(x, r);
    if constexpr (!Backward) {
        for (int r = 0; r < R; r++) t1 += d[r];
        p = total<A, BYTES>(t1) / size;
        t1 = V{};
    }
    for (int r = 0; r < R; r++) {
        d[r] -= p;
        V u;
        if constexpr (Backward) {
            u = vector(dy, r);
        } else {
            if (r + 1 == R && last < W) d[r] = R > 1 ? last_lanes(d[r], last) : first_lanes(d[r], last);
            u = d[r];
        }
        t1 += u;
        t2 += u * d[r];
    }
    Double sums[2] = {};
    for (int k = 0; k < PARTS<A>; k++) sums[0] += part<A>(t1, k), sums[1] += part<A>(t2, k);
    const double q = p, u1 = total<double, BYTES>(sums[0]), u2 = total<double, BYTES>(sums[1]);
    s1 += Backward ? u1 : u1 + size * q;
    s2 += Backward ? u2 : u2 + q * (2 * u1 + size * q);
}

// run(R) with as many vectors R as hold `size` values; false if that is more than eight.
template <int W, int R = 1, class Run>
inline INLINE bool with_vectors(int64_t size, Run run) {
    if constexpr (R > 8) {
        return false;
    } else if (size <= R * W) {
        run(std::integral_constant<int, R>());
        return true;
    } else {
        return with_vectors<W, R + 1>(size, run);
    }
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
    using A = Compute<T>;
    using V = Vector<A>;
    constexpr int W = WIDTH<T>, P = PARTS<A>;
    const T *x = (const T *)job.x, *dy = (const T *)job.dy;
    const A *pivot = (const A *)job.coefficients;
    double *const s1 = job.sums, *const s2 = job.sums + job.stride;
    const auto planes_of = [&](auto R) {
        for_blocks(job, [&](int64_t c, int64_t at, int64_t size) INLINE {
            add_plane<T, Backward, R>(x + at, dy + at, size, Backward ? pivot[c] : A(0), s1[c], s2[c]);
        });
    };
    if (job.inner > 1 && with_vectors<W>(job.inner, planes_of)) return;
    if (job.inner > 1)
        for_blocks(job, [&](int64_t c, int64_t at, int64_t size) {
            Sums<A> sums;
            add_run<T, Backward, 16>(sums, x + at, dy + at, size, Backward ? V{} + pivot[c] : V{});
            s1[c] += total<P>(sums.s1);
            s2[c] += total<P>(sums.s2);
        });
    else
        for_rows<8>(job.begin, job.end - job.begin, job.channels * sizeof(T), [&](auto R, int64_t row, int64_t stride) {
            const int64_t C = job.channels;
            const T *const from = x + row * C, *const dy_from = dy + row * C;
            const auto columns = [&](int64_t c, auto vector) INLINE {  // those of a vector, from c on
                Sums<A> sums;  // vector by vector: gcc copies arrays in pieces that the processor cannot forward
                for (int k = 0; k < P; k++) sums.s1[k] = load<Double>(s1 + c + k * LANES<double>);
                for (int k = 0; k < P; k++) sums.s2[k] = load<Double>(s2 + c + k * LANES<double>);
                add<A, Backward, R>(
                    sums, [&](int r) INLINE { return vector(from + r * stride * C); },
                    [&](int r) INLINE { return vector(dy_from + r * stride * C); },
                    Backward ? load<V>(pivot + c) : V{});
                for (int k = 0; k < P; k++) std::memcpy(s1 + c + k * LANES<double>, &sums.s1[k], BYTES);
                for (int k = 0; k < P; k++) std::memcpy(s2 + c + k * LANES<double>, &sums.s2[k], BYTES);
            };
            int64_t c = 0;
            for (; c + W <= C; c += W) columns(c, [&](const T *row) INLINE { return read(row + c, W); });
            if (c < C) columns(C < W ? 0 : C - W, [&](const T *row) INLINE { return read_last(row, C, C - c); });
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
    const auto *coefficients = (const Compute<T> *)job.coefficients;
    const auto at = [&](int kind, int64_t c) INLINE { return coefficients + kind * job.stride + c; };
    if (job.inner > 1)
        for_blocks(job, [&](int64_t c, int64_t first, int64_t size) {
            V k[KINDS];
            for (int kind = 0; kind < KINDS; kind++) k[kind] = V{} + *at(kind, c);
            for_vectors<W>(size, [&](int64_t i, int64_t n) INLINE {
                map<T, Backward, 1>(job, first + i, 0, n, [&](int kind) INLINE { return k[kind]; });
            });
        });
    else
        for_rows<4>(job.begin, job.end - job.begin, C * sizeof(T), [&](auto R, int64_t row, int64_t stride) {
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
