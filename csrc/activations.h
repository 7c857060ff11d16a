// The activation functions, on vectors: value(z) and gradient(dy, z) = dy·f'(z), as torch defines them.
#pragma once

#include "vectors.h"

namespace {

// What IEEE numbers are made of, and how far e^t is computed: beyond, it could not be 2^n·p with a normal 2^n.
template <class A>
struct Format;
template <>
struct Format<float> {
    using Integer = uint32_t;
    static constexpr int MANTISSA = 23, DEGREE = 7;
    static constexpr float LIMIT = 87, LN2 = 0x1.62e4p-1f, LN2_REST = 0x1.7f7d1cp-20f;
};
template <>
struct Format<double> {
    using Integer = uint64_t;
    static constexpr int MANTISSA = 52, DEGREE = 13;
    static constexpr double LIMIT = 708, LN2 = 0x1.62e42fefap-1, LN2_REST = 0x1.cf79abc9e3b39p-40;
};

template <class A>
struct InverseFactorials {
    A of[Format<A>::DEGREE + 1] = {1};
    constexpr InverseFactorials() {
        double factorial = 1;
        for (int k = 1; k <= Format<A>::DEGREE; k++) of[k] = A(1 / (factorial *= k));
    }
};
template <class A>
constexpr InverseFactorials<A> INVERSE_FACTORIALS{};

// e^t = 2^n·e^r with |r| <= ln(2)/2, by Taylor's series; t is cut at ±LIMIT. NaN stays NaN.
template <class A>
inline INLINE Vector<A> exponential(Vector<A> t) {
    using F = Format<A>;
    using V = Vector<A>;
    using Integers = Vector<typename F::Integer>;
    constexpr A SHIFTER = A(3) * A(typename F::Integer(1) << (F::MANTISSA - 1));  // added, no place is left for fractions
    constexpr typename F::Integer BIAS = (typename F::Integer(1) << (sizeof(A) * 8 - F::MANTISSA - 2)) - 1;
    t = t > F::LIMIT ? V{} + F::LIMIT : t;
    t = t < -F::LIMIT ? V{} - F::LIMIT : t;
    const V shifted = t * A(1.44269504088896340736) + SHIFTER, n = shifted - SHIFTER;
    const V r = t - n * F::LN2 - n * F::LN2_REST;
    V power = V{} + INVERSE_FACTORIALS<A>.of[F::DEGREE];
    for (int k = F::DEGREE; k-- > 0;) power = INVERSE_FACTORIALS<A>.of[k] + power * r;
    return power * bit_cast<V>((bit_cast<Integers>(shifted) + BIAS) << F::MANTISSA);
}

struct Identity {
    template <class V, class A>
    static INLINE V value(V z, A) {
        return z;
    }
    template <class V, class A>
    static INLINE V gradient(V dy, V, A) {
        return dy;
    }
};

struct Relu {
    template <class V, class A>
    static INLINE V value(V z, A) {
        return z <= 0 ? V{} : z;
    }
    template <class V, class A>
    static INLINE V gradient(V dy, V z, A) {
        return z <= 0 ? V{} : dy;
    }
};

struct LeakyRelu {
    template <class V, class A>
    static INLINE V value(V z, A slope) {
        return z > 0 ? z : z * slope;
    }
    template <class V, class A>
    static INLINE V gradient(V dy, V z, A slope) {
        return z > 0 ? dy : dy * slope;
    }
};

struct Silu {
    template <class V, class A>
    static INLINE V value(V z, A) {
        return z * sigmoid<V, A>(z);
    }
    template <class V, class A>
    static INLINE V gradient(V dy, V z, A) {
        const V s = sigmoid<V, A>(z);
        return dy * s * (1 + z * (1 - s));
    }

  private:
    template <class V, class A>
    static INLINE V sigmoid(V z) {
        const V s = 1 / (1 + exponential<A>(-z));
        return z < -Format<A>::LIMIT ? V{} : s;  // times z it is 0, however large that is
    }
};

struct Hardswish {
    template <class V, class A>
    static INLINE V value(V z, A) {
        V six = z + 3;
        six = six < 0 ? V{} : six;
        six = six > 6 ? V{} + A(6) : six;
        return z * six * (A(1) / 6);
    }
    template <class V, class A>
    static INLINE V gradient(V dy, V z, A) {
        const V between = dy * (z * (A(1) / 3) + A(0.5));
        return z <= -3 ? V{} : z >= 3 ? dy : between;
    }
};

}  // namespace
