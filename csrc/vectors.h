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
#if defined(__AVX512F__)  // gcc 12 takes these conversions apart
    if constexpr (PARTS<A> == 2) return (Double)_mm512_cvtps_pd((__m256)parts[k]);
#elif defined(__AVX2__)
    if constexpr (PARTS<A> == 2) return (Double)_mm256_cvtps_pd((__m128)parts[k]);
#endif
    return __builtin_convertvector(parts[k], Double);
}

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Compute: the type of the arithmetic. Stored: a vector as it lies in memory.
template <class T>
struct Element {
    using Compute = T;
    using Stored = Vector<T>;
    static INLINE Vector<T> widen(Stored v) { return v; }
    static INLINE Stored narrow(Vector<T> v) { return v; }
};

template <>
struct Element<bfloat16> {
    using Compute = float;
    using Stored = HalfBits;
#if defined(__AVX512F__)  // gcc 12 takes these conversions apart
    static INLINE Bits extend(Stored v) { return (Bits)_mm512_cvtepu16_epi32((__m256i)v); }
    static INLINE Stored cut(Bits v) { return (Stored)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
    static INLINE Bits extend(Stored v) { return (Bits)_mm256_cvtepu16_epi32((__m128i)v); }
    static INLINE Stored cut(Bits v) {  // of 16 bits each: none is saturated
        const __m256i bits = (__m256i)v;
        return (Stored)_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    }
#else
    static INLINE Bits extend(Stored v) { return __builtin_convertvector(v, Bits); }
    static INLINE Stored cut(Bits v) { return __builtin_convertvector(v, Stored); }
#endif
    static INLINE Float widen(Stored v) { return bit_cast<Float>(extend(v) << 16); }
    static INLINE Stored narrow(Float v) {
        const Bits bits = bit_cast<Bits>(v);
        const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even; overflows to infinity
        return cut(v != v ? (bits >> 16) | 0x40 : rounded);               // NaN stays NaN
    }
};

template <>
struct Element<float16> {
    using Compute = float;
    using Stored = HalfBits;
#if defined(__AVX512F__)
    static INLINE Float widen(Stored v) { return _mm512_cvtph_ps((__m256i)v); }
    static INLINE Stored narrow(Float v) { return (Stored)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__) && defined(__F16C__)
    static INLINE Float widen(Stored v) { return _mm256_cvtph_ps((__m128i)v); }
    static INLINE Stored narrow(Float v) { return (Stored)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
    static INLINE Float widen(Stored v) {
        const Bits half = __builtin_convertvector(v, Bits), magnitude = half & 0x7fff;
        // As float bits the exponent is 2^112 too small; this way subnormals come out right without a branch.
        const Bits scaled = bit_cast<Bits>(bit_cast<Float>(magnitude << 13) * 0x1p112f);
        return bit_cast<Float>(((half & 0x8000) << 16) | (magnitude >= 0x7c00 ? scaled | 0x7f800000 : scaled));
    }
    static INLINE Stored narrow(Float v) {
        const Bits bits = bit_cast<Bits>(v), magnitude = bits & 0x7fffffff;
        const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        // Plus 1/2 the last bit of a float is worth 2^-24, the smallest half: the processor has rounded.
        const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000;
        Bits half = magnitude < (113u << 23) ? subnormal : normal;
        half = magnitude >= (143u << 23) ? Bits{} + 0x7c00 : half;  // from 2^16 on; from 65520 on it is rounded to that
        half = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : half;     // NaN
        return __builtin_convertvector(((bits >> 16) & 0x8000) | half, Stored);
    }
#endif
};

template <int SIZE>
using Bytes = typename VectorOf<uint8_t, SIZE>::type;

// From n on: SIZE - n times 0, then ones.
template <int SIZE>
struct Masks {
    uint8_t bytes[2 * SIZE] = {};
    constexpr Masks() {
        for (int k = SIZE; k < 2 * SIZE; k++) bytes[k] = 0xff;
    }
};

// The first `bytes` of a vector, fewer than all, and zeros behind them.
template <class V>
inline INLINE V load_first(const void *from, int64_t bytes) {
#ifdef __AVX512BW__
    const uint64_t mask = (uint64_t(1) << bytes) - 1;
    if constexpr (sizeof(V) == 64) return bit_cast<V>(_mm512_maskz_loadu_epi8(mask, from));
    if constexpr (sizeof(V) == 32) return bit_cast<V>(_mm256_maskz_loadu_epi8(mask, from));
#endif
    V v = {};
    if (bytes < int64_t(sizeof(v))) std::memcpy(&v, from, bytes);
    return v;
}

// The first `n` lanes of a vector of the compute type, and zeros behind them.
template <class V>
inline INLINE V first_lanes(V v, int64_t n) {
    return load_first<V>(&v, n * sizeof(v[0]));
}

// The last `n` lanes, and zeros before them.
template <class V>
inline INLINE V last_lanes(V v, int64_t n) {
    static constexpr Masks<sizeof(V)> masks{};
    return bit_cast<V>(bit_cast<Bytes<sizeof(V)>>(v) & load<Bytes<sizeof(V)>>(masks.bytes + n * sizeof(v[0])));
}

template <class V>
inline INLINE void store_first(void *to, V v, int64_t bytes) {
#ifdef __AVX512BW__
    const uint64_t mask = (uint64_t(1) << bytes) - 1;
    if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_epi8(to, mask, bit_cast<__m512i>(v));
    if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_epi8(to, mask, bit_cast<__m256i>(v));
#endif
    std::memcpy(to, &v, bytes);
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

template <class T>
using Compute = typename Element<T>::Compute;
template <class T>
constexpr int WIDTH = LANES<Compute<T>>;

// Bytes: the processor's own prefetching begins anew at each page of 4096.
constexpr int AHEAD = 2048;

// A vector of the first `n` values at `from`, zeros behind them; n = WIDTH or fewer.
template <class T>
inline INLINE Vector<Compute<T>> read(const T *from, int64_t n) {
    using Stored = typename Element<T>::Stored;
    __builtin_prefetch((const char *)from + AHEAD);
    return Element<T>::widen(n == WIDTH<T> ? load<Stored>(from) : load_first<Stored>(from, n * sizeof(T)));
}

// The first `n` values of `v`.
template <class T>
inline INLINE void write(T *to, Vector<Compute<T>> v, int64_t n, bool streaming) {
    const auto stored = Element<T>::narrow(v);
    if (n < WIDTH<T>)
        store_first(to, stored, n * sizeof(T));
    else if (streaming && sizeof(stored) == BYTES)  // two halves of a vector do not gain
        stream(to, stored);
    else
        std::memcpy(to, &stored, sizeof(stored));
}

}  // namespace
