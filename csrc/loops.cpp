// The loops over a replica's values. INSTRUCTION_SET names the namespace that this compilation fills.
#include "loops.h"

#include <type_traits>

#include "activations.h"
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

// Sums lane by lane: Σx and Σx², or Σdz and Σdz·(x - p).
template <class A>
struct Sums {
    Double s1[PARTS<A>] = {}, s2[PARTS<A>] = {};
};

// Add the sums of R vectors: x(r) reads them, dz(r, x - p) computes their gradients. Lanes without a value are zero in
// x in the forward and in dz in the backward, and add zero.
//
// In the forward they are about a pivot of their own, the mean p of each lane: with d = x - p, Σx = Σd + R·p and
// Σx² = Σd² + 2p·Σd + R·p². What is small is added in float, what is large in double.
template <class A, bool Backward, int R, class X, class DZ>
inline INLINE void add(Sums<A> &sums, X x, DZ dz, Vector<A> p) {
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
        if constexpr (Backward) u = dz(r, d[r]);
        s1 += u;
        s2 += u * d[r];
    }
    for (int k = 0; k < PARTS<A>; k++) {
        const Double t1 = part<A>(s1, k), t2 = part<A>(s2, k), q = part<A>(p, k);
        sums.s1[k] += Backward ? t1 : t1 + R * q;
        sums.s2[k] += Backward ? t2 : t2 + q * (2 * t1 + R * q);
    }
}

// The same for the consecutive values [from, size) of a run of `size` values, which fills a vector.
template <class T, bool Backward, int R, class DZ>
inline INLINE void add_run(Sums<Compute<T>> &sums, const T *x, int64_t from, int64_t size, VectorFor<T> p, DZ dz) {
    using A = Compute<T>;
    using V = VectorFor<T>;
    constexpr int W = WIDTH<T>;
    int64_t i = from;
    for (; i + R * W <= size; i += R * W)
        add<A, Backward, R>(
            sums, [&](int r) INLINE { return read(x + i + r * W, W); },
            [&](int r, V d) INLINE { return dz(i + r * W, W, d); }, p);
    if constexpr (R > 1)
        add_run<T, Backward, R / 2>(sums, x, i, size, p, dz);
    else if (i < size)
        add<A, Backward, 1>(
            sums,
            [&](int) INLINE {
                const V last = read(x + size - W, W);
                return Backward ? last : last_lanes(last, size - i);
            },
            [&](int, V d) INLINE { return last_lanes(dz(size - W, W, d), size - i); }, p);
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
template <class T, bool Backward, int R, class DZ>
inline INLINE void add_plane(const T *x, int64_t size, Compute<T> p, double &s1, double &s2, DZ dz) {
    using A = Compute<T>;
    using V = Vector<A>;
    constexpr int W = WIDTH<T>;
    const int64_t last = size - (R - 1) * W;  // values in the last vector
    V d[R], t1 = {}, t2 = {};
    const auto lanes = [&](int r, V v) INLINE { return r + 1 < R || R == 1 ? v : last_lanes(v, last); };
    const auto place = [&](int r) INLINE { return r + 1 < R || R == 1 ? r * W : size - W; };
    const int64_t n = R == 1 ? last : W;
    for (int r = 0; r < R; r++) {
        d[r] = read(x + place(r), n);
        if constexpr (!Backward) d[r] = lanes(r, d[r]);
    }
    if constexpr (!Backward) {
        for (int r = 0; r < R; r++) t1 += d[r];
        p = total<A, BYTES>(t1) / size;
        t1 = V{};
    }
    for (int r = 0; r < R; r++) {
        d[r] -= p;
        V u;
        if constexpr (Backward) {
            u = lanes(r, dz(place(r), n, d[r]));
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

// F is the activation, or NoGradient in the forward.
struct NoGradient {};

template <class T, class F>
void sums(const Job &job) {
    using A = Compute<T>;
    using V = Vector<A>;
    constexpr bool Backward = !std::is_same_v<F, NoGradient>, Activated = Backward && !std::is_same_v<F, Identity>;
    constexpr int W = WIDTH<T>, P = PARTS<A>, KINDS = Activated ? 3 : Backward ? 1 : 0;
    const T *const x = (const T *)job.x;
    const A *const coefficients = (const A *)job.coefficients;
    double *const s1 = job.sums, *const s2 = job.sums + job.stride;
    // dz of n values from `at` on, of which d holds x - pivot.
    const auto gradient = [&](int64_t at, int64_t n, V d, const V *k) INLINE {
        V dz = {};
        if constexpr (Backward) dz = read((const T *)job.dy + at, n);
        if constexpr (Activated) dz = F::gradient(dz, k[SCALE] * d + k[SHIFT], A(job.slope));
        return dz;
    };
    const auto planes = [&](auto add_up) INLINE {  // add_up(at, size, pivot, dz(i, n, d), c) for each block
        for_blocks(job, [&](int64_t c, int64_t at, int64_t size) INLINE {
            V k[3] = {};
            for (int kind = 0; kind < KINDS; kind++) k[kind] += coefficients[kind * job.stride + c];
            add_up(at, size, k[PIVOT], [&](int64_t i, int64_t n, V d) INLINE { return gradient(at + i, n, d, k); }, c);
        });
    };
    const auto small_planes = [&](auto R) {
        planes([&](int64_t at, int64_t size, V p, auto dz, int64_t c) INLINE {
            add_plane<T, Backward, R>(x + at, size, p[0], s1[c], s2[c], dz);
        });
    };
    if (job.inner > 1 && with_vectors<W>(job.inner, small_planes)) return;
    if (job.inner > 1)
        planes([&](int64_t at, int64_t size, V p, auto dz, int64_t c) INLINE {
            Sums<A> sums;
            add_run<T, Backward, 16>(sums, x + at, 0, size, p, dz);
            s1[c] += total<P>(sums.s1);
            s2[c] += total<P>(sums.s2);
        });
    else
        for_rows<8>(job.begin, job.end - job.begin, job.channels * sizeof(T), [&](auto R, int64_t row, int64_t stride) {
            const int64_t C = job.channels;
            // `size` columns from c on, a vector of them, of which the last `count` were not added before.
            const auto columns = [&](int64_t c, int64_t size, int64_t count) INLINE {
                const auto counted = [&](V v) INLINE { return count < size ? last_lanes(v, count) : v; };
                const auto place = [&](int r) INLINE { return (row + r * stride) * C + c; };
                V k[3] = {};
                for (int kind = 0; kind < KINDS; kind++) k[kind] = load<V>(coefficients + kind * job.stride + c);
                Sums<A> sums;  // vector by vector: gcc copies arrays in pieces that the processor cannot forward
                for (int k = 0; k < P; k++) sums.s1[k] = load<Double>(s1 + c + k * LANES<double>);
                for (int k = 0; k < P; k++) sums.s2[k] = load<Double>(s2 + c + k * LANES<double>);
                add<A, Backward, R>(
                    sums,
                    [&](int r) INLINE {
                        const V values = read(x + place(r), size);
                        return Backward ? values : counted(values);
                    },
                    [&](int r, V d) INLINE { return counted(gradient(place(r), size, d, k)); }, k[PIVOT]);
                for (int k = 0; k < P; k++) std::memcpy(s1 + c + k * LANES<double>, &sums.s1[k], BYTES);
                for (int k = 0; k < P; k++) std::memcpy(s2 + c + k * LANES<double>, &sums.s2[k], BYTES);
            };
            int64_t c = 0;
            for (; c + W <= C; c += W) columns(c, W, W);
            if (c < C) C < W ? columns(0, C, C) : columns(C - W, W, C - c);
        });
}

enum Result { Y, DZ, DX };

// The elementwise work on R vectors of n values that lie `stride` apart, with the coefficients k.
template <class T, class F, Result RESULT, int R>
inline INLINE void map(const Job &job, int64_t at, int64_t stride, int64_t n, const VectorFor<T> *k) {
    using V = VectorFor<T>;
    const auto slope = Compute<T>(job.slope);
    for (int r = 0; r < R; r++, at += stride) {
        const V d = read((const T *)job.x + at, n) - k[PIVOT];
        V z = k[SCALE] * d + k[SHIFT], result;
        if (RESULT != DX && job.residual) z += read((const T *)job.residual + at, n);
        if constexpr (RESULT == Y)
            result = F::value(z, slope);
        else
            result = F::gradient(read((const T *)job.dy + at, n), z, slope);
        if constexpr (RESULT == DX)
            result = k[SCALE] * (result - k[DZ_PIVOT]) + k[X_SCALE] * d + k[X_SHIFT];
        write((T *)job.out + at, result, n, job.streaming);
    }
}

template <class T, class F, Result RESULT>
void elementwise(const Job &job) {
    constexpr int W = WIDTH<T>, KINDS = RESULT == DX ? COEFFICIENTS : SHIFT + 1;
    using V = VectorFor<T>;
    const int64_t C = job.channels;
    const auto *coefficients = (const Compute<T> *)job.coefficients;
    const auto at = [&](int kind, int64_t c) INLINE { return coefficients + kind * job.stride + c; };
    if (job.inner > 1)
        for_blocks(job, [&](int64_t c, int64_t first, int64_t size) {
            V k[KINDS];
            for (int kind = 0; kind < KINDS; kind++) k[kind] = V{} + *at(kind, c);
            for_vectors<W>(size, [&](int64_t i, int64_t n) INLINE { map<T, F, RESULT, 1>(job, first + i, 0, n, k); });
        });
    else
        // dz comes in pieces of few rows, too short for streams of their own: one row after the other.
        for_rows<RESULT == DZ ? 1 : 4>(
            job.begin, job.end - job.begin, C * sizeof(T), [&](auto R, int64_t row, int64_t stride) {
                for_vectors<W>(C, [&](int64_t c, int64_t n) INLINE {
                    V k[KINDS];
                    for (int kind = 0; kind < KINDS; kind++) k[kind] = load<V>(at(kind, c));
                    map<T, F, RESULT, R>(job, row * C + c, stride * C, n, k);
                });
            });
    if (job.streaming) end_of_streams();
}

// In the order of Activation.
template <class T, class... F>
constexpr Loops loops_of = {sums<T, NoGradient>,
                            {elementwise<T, F, Y>...},
                            {elementwise<T, F, DZ>...},
                            {sums<T, F>...},
                            {elementwise<T, F, DX>...}};

template <class T>
constexpr Loops LOOPS = loops_of<T, Identity, Relu, LeakyRelu, Silu, Hardswish>;

}  // namespace

namespace INSTRUCTION_SET {
const Loops loops[DTYPES] = {LOOPS<float>, LOOPS<double>, LOOPS<bfloat16>, LOOPS<float16>};
}
