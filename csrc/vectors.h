// Vectors of a compute type, and the four element types read into and written from them.
// GCC's vector extension (clang has it too) leaves the choice of instructions to the compiler, on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline))

namespace {  // compiled once per instruction set: nothing here may be shared between the copies

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class A, int SIZE>
struct VectorOf {
    typedef A type __attribute__((vector_size(SIZE)));
};
template <class A>
using Vector = typename VectorOf<A, BYTES>::type;
template <class A>
constexpr int LANES = BYTES / sizeof(A);

using Float = Vector<float>;
using Double = Vector<double>;
using Bits = Vector<uint32_t>;
using HalfBits = VectorOf<uint16_t, BYTES / 2>::type;

template <class V>
inline INLINE V load(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

template <class To, class From>
inline INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return load<To>(&from);
}

// The lanes of `v` as PARTS vectors of double: 2 for float, 1 for double.
template <class A>
constexpr int PARTS = LANES<A> / LANES<double>;

template <class A>
inline INLINE Double part(Vector<A> v, int k) {
    using Part = typename VectorOf<A, BYTES / PARTS<A>>::type;
    Part parts[PARTS<A>];
    std::memcpy(parts, &v, sizeof(v));
    return __builtin_convertvector(parts[k], Double);
}

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Compute: the type of the arithmetic. widen: a vector of it from memory; narrow: what is stored of it.
template <class T>
struct Element {
    using Compute = T;
    static INLINE Vector<T> widen(const void *from) { return load<Vector<T>>(from); }
    static INLINE Vector<T> narrow(Vector<T> v) { return v; }
};

template <>
struct Element<bfloat16> {
    using Compute = float;
    static INLINE Float widen(const void *from) {
        return bit_cast<Float>(__builtin_convertvector(load<HalfBits>(from), Bits) << 16);
    }
    static INLINE HalfBits narrow(Float v) {
        const Bits bits = bit_cast<Bits>(v);
        const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even; overflows to infinity
        return __builtin_convertvector(v != v ? (bits >> 16) | 0x40 : rounded, HalfBits);  // NaN stays NaN
    }
};

template <>
struct Element<float16> {
    using Compute = float;
#if defined(__AVX512F__)
    static INLINE Float widen(const void *from) { return _mm512_cvtph_ps(load<__m256i>(from)); }
    static INLINE __m256i narrow(Float v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__) && defined(__F16C__)
    static INLINE Float widen(const void *from) { return _mm256_cvtph_ps(load<__m128i>(from)); }
    static INLINE __m128i narrow(Float v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
    static INLINE Float widen(const void *from) {
        const Bits half = __builtin_convertvector(load<HalfBits>(from), Bits), magnitude = half & 0x7fff;
        // As float bits the exponent is 2^112 too small; this way subnormals come out right without a branch.
        const Bits scaled = bit_cast<Bits>(bit_cast<Float>(magnitude << 13) * 0x1p112f);
        return bit_cast<Float>(((half & 0x8000) << 16) | (magnitude >= 0x7c00 ? scaled | 0x7f800000 : scaled));
    }
    static INLINE HalfBits narrow(Float v) {
        const Bits bits = bit_cast<Bits>(v), magnitude = bits & 0x7fffffff;
        const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        // Plus 1/2 the last bit of a float is worth 2^-24, the smallest half: the processor has rounded.
        const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000;
        Bits half = magnitude < (113u << 23) ? subnormal : normal;
        half = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : half;  // 65520 and above round to infinity
        half = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : half;   // NaN
        return __builtin_convertvector(((bits >> 16) & 0x8000) | half, HalfBits);
    }
#endif
};

// A vector of the first `n` values at `from`, zeros behind them; all its values from n = LANES on.
template <class T>
inline INLINE auto read(const T *from, int64_t n) {
    constexpr int W = LANES<typename Element<T>::Compute>;
    if (n >= W) return Element<T>::widen(from);
    T padded[W] = {};
    std::memcpy(padded, from, n * sizeof(T));
    return Element<T>::widen(padded);
}

// Store past the caches; to an address aligned to the vector.
template <class V>
inline INLINE void stream(void *to, V v) {
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i *)to, bit_cast<__m512i>(v));
#endif
#ifdef __AVX__
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i *)to, bit_cast<__m256i>(v));
#endif
#ifdef __SSE2__
    if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i *)to, bit_cast<__m128i>(v));
#endif
    std::memcpy(to, &v, sizeof(v));
}

inline void end_of_streams() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// The first `n` values of `v`.
template <class T, class V>
inline INLINE void write(T *to, V v, int64_t n, bool streaming) {
    const auto stored = Element<T>::narrow(v);
    if (n < LANES<typename Element<T>::Compute>)
        std::memcpy(to, &stored, n * sizeof(T));
    else if (streaming && sizeof(stored) == BYTES)  // two halves of a vector do not gain
        stream(to, stored);
    else
        std::memcpy(to, &stored, sizeof(stored));
}

}  // namespace
