// SPDX-License-Identifier: BSD-3-Clause
// exp and tanh in vectors. Included inside the namespace of an instruction set.

// e^y = 2^n * e^r with n = round(y / ln 2) and |r| <= ln 2 / 2, or n in parts of a power of two and r as much smaller.
// Rows are not shifted by their maximum as long as it is moderate: a Ref takes the power of two 2^-power out of e^y
// instead, which rounds nothing, so that many rows and many blocks can share one. Only large logits are shifted (by
// `shift`, as everyone does).
struct Ref {
  double shift = 0;
  double power = 0;  // an integer

  double log_value() const { return shift + power * 0.693147180559945309417; }
};

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLargeRef = 64;  // a maximum beyond this is taken off before exp

inline Ref ref_for(double top) {
  Ref ref;
  if (top <= kLargeRef && top >= -kLargeRef) {
    ref.power = __builtin_rint(top / kLn2);
  } else {
    ref.shift = top;
  }
  return ref;
}

// Polynomials for e^r on |r| <= ln 2 / 2, least maximum relative error: degree 4: 2.6e-6 (the coarse exp, for long rows
// of bfloat16), degree 5: 7.5e-8; float64 has the Taylor series, 4e-18.
template <class A, int kDegree>
struct ExpPoly {
  static constexpr int kTerms = 14;
  static constexpr A c[kTerms] = {A(1.0 / 6227020800),
                                  A(1.0 / 479001600),
                                  A(1.0 / 39916800),
                                  A(1.0 / 3628800),
                                  A(1.0 / 362880),
                                  A(1.0 / 40320),
                                  A(1.0 / 5040),
                                  A(1.0 / 720),
                                  A(1.0 / 120),
                                  A(1.0 / 24),
                                  A(1.0 / 6),
                                  A(0.5),
                                  A(1.0),
                                  A(1.0)};
};
template <class A>
struct ExpPoly<A, 4> : ExpPoly<A, 5> {};
template <>
struct ExpPoly<float, 5> {
  static constexpr int kTerms = 6;
  static constexpr float c[kTerms] = {0x1.0fe579d9655dep-7f, 0x1.575f721962b45p-5f, 0x1.555a1a8cb3070p-3f,
                                      0x1.fffd18e0a7acfp-2f, 0x1.fffff5a24e633p-1f, 0x1.00000134a9e98p+0f};
};
template <>
struct ExpPoly<float, 4> {
  static constexpr int kTerms = 5;
  static constexpr float c[kTerms] = {0x1.53a090d344b50p-5f, 0x1.57e15bc95ae0dp-3f, 0x1.0005b9725ad65p-1f,
                                      0x1.fffb31a54d8f1p-1f, 0x1.ffffe724e9cd8p-1f};
};

// 2^n from a table, n in steps of 1 / kPowerSteps of a power of two: what is left of the exponent is then so small that
// a polynomial of a low degree suffices. An entry is 2^(i / kPowerSteps) without the bits that i itself adds where it
// stands under an exponent. 1: no table, the instruction set has no permutation of a vector by another.
#if defined(__AVX512F__)
constexpr int kPowerSteps = 32, kPowerBits = 5;
alignas(64) constexpr uint32_t kPowers[kPowerSteps] = {
    0x3f800000u, 0x3f7ecd87u, 0x3f7daac3u, 0x3f7c980fu, 0x3f7b95c2u, 0x3f7aa43au, 0x3f79c3d3u, 0x3f78f4f0u,
    0x3f7837f0u, 0x3f778d3au, 0x3f76f532u, 0x3f767043u, 0x3f75fed7u, 0x3f75a15bu, 0x3f75583fu, 0x3f7523f6u,
    0x3f7504f3u, 0x3f74fbafu, 0x3f7508a4u, 0x3f752c4du, 0x3f75672au, 0x3f75b9beu, 0x3f76248cu, 0x3f76a81eu,
    0x3f7744fdu, 0x3f77fbb8u, 0x3f78ccdfu, 0x3f79b907u, 0x3f7ac0c7u, 0x3f7be4bau, 0x3f7d257du, 0x3f7e83b3u};
#elif defined(__AVX2__)
constexpr int kPowerSteps = 8, kPowerBits = 3;
alignas(32) constexpr uint32_t kPowers[kPowerSteps] = {0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u,
                                                       0x3f7504f3u, 0x3f75672au, 0x3f7744fdu, 0x3f7ac0c7u};
#else
constexpr int kPowerSteps = 1;
#endif

#if defined(__AVX2__)
SOFTCE_INLINE F32V power_of_two(F32V n) {  // n in the low bits
#if defined(__AVX512F__)
  const __m512 low = _mm512_load_ps(kPowers), high = _mm512_load_ps(kPowers + 16);
  const F32V power = (F32V)_mm512_permutex2var_ps(low, (__m512i)n, high);
#else
  const F32V power = pick(load<F32V>(kPowers), bits<U32V>(n));
#endif
  return bits<F32V>(bits<U32V>(power) + (bits<U32V>(n) << (23 - kPowerBits)));
}
#endif

// exp under a Ref: from elements x to y = x * scale - shift and e^y * 2^-power. Below the range the result is an exact
// 0, and in its lowest octave (e^-87 under a power of 0) a subnormal number without digits where the powers come from a
// table; nan stays nan. Above (more than e^80 over the reference) it is garbage: callers watch the maximum.
template <class A, int kDegree>
struct Exp {
  using V = typename VecOf<A>::V;
  using U = typename VecOf<A>::U;
  static constexpr bool kF32 = sizeof(A) == 4;
  static constexpr double kBias = kF32 ? 127 : 1023;
  static constexpr double kMagic = kF32 ? 0x1.8p23 : 0x1.8p52;  // adding it rounds to an integer in the low bits
  static constexpr A kHigh = kF32 ? A(0.693359375) : A(6.93147180369123816490e-01);
  static constexpr A kLow = kF32 ? A(-2.12194440e-4) : A(1.90821492927058770002e-10);
  static constexpr bool kTable = kF32 && kPowerSteps > 1;
  static constexpr double kSteps = kTable ? kPowerSteps : 1;  // of n, from one power of two to the next
  A scale, minus_shift, lowest, magic;

  Exp(double scale_, const Ref& ref)
      : scale(A(scale_)),
        minus_shift(A(-ref.shift)),
        lowest(A((ref.power - kBias) * kLn2)),
        magic(A(kMagic + (kTable ? 0 : kBias) - kSteps * ref.power)) {}

  SOFTCE_INLINE V affine(V x) const { return fma(x, splat(scale), splat(minus_shift)); }

  SOFTCE_INLINE V exp(V y) const {
    exp<1>(&y);
    return y;
  }

  // In place.
  template <int kCount>
  SOFTCE_INLINE void all(V* y) const {
    constexpr int kAtOnce = kCount < kTogether ? kCount : kTogether;
    static_assert(kCount % kAtOnce == 0, "whole groups");
    for (int i = 0; i < kCount; i += kAtOnce) exp<kAtOnce>(y + i);
  }

  // In place, step by step over all of them: each is one long chain of dependent operations, and a CPU looks only
  // so far ahead for the next.
  template <int kCount>
  SOFTCE_INLINE void exp(V* y) const {
    using Poly = ExpPoly<A, kDegree>;
    static constexpr A kLog2e = A(1.44269504088896340736 * kSteps), kMinusLn2 = A(-kLn2 / kSteps);
    V t[kCount], n[kCount], p[kCount];
    const V low = constant(lowest), one = constant(magic), log2e = constant(kLog2e);
    SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) y[i] = vmax(low, y[i]);
    SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) t[i] = fma(y[i], log2e, one);
    keep_order<kCount>(t);
    SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) n[i] = t[i] - one;
    keep_order<kCount>(n);
    if constexpr (kF32 && kFusedMultiplyAdd) {
      // The error of this one step, 2e-9 |n|, is below the polynomial's where e^y counts.
      const V ln2 = constant(kMinusLn2);
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) y[i] = fma(n[i], ln2, y[i]);
      keep_order<kCount>(y);
    } else {
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) y[i] = fma(n[i], splat(-kLow), fma(n[i], splat(-kHigh), y[i]));
    }
#if defined(__AVX2__)
    if constexpr (kTable) {
      // |r| <= kMost. Degree 2: 5.3e-8 with 32 steps, and with 8 3.4e-6, the coarse exp; degree 3 with 8: 2.5e-8.
      static constexpr double kMost = kLn2 / (2 * kSteps);
      if constexpr (kPowerSteps == 32 || kDegree == 4) {
        static constexpr A kHalf = A(0.5), kOne = A(1 + kMost * kMost / 8);
        const V half = constant(kHalf), first = constant(kOne);
        SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(y[i], half, first);
        keep_order<kCount>(p);
        SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) p[i] *= y[i];
      } else {
        static constexpr A kSixth = A(1.0 / 6), kHalf = A(0.5 + 0.8284 / 24 * kMost * kMost);
        const V third = constant(kSixth), second = constant(kHalf);
        SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(y[i], third, second);
        keep_order<kCount>(p);
        SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) p[i] *= y[i];
        keep_order<kCount>(p);
        SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], y[i], y[i]);
      }
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) t[i] = power_of_two(t[i]);
      keep_order<kCount>(p);
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) y[i] = fma(p[i], t[i], t[i]);
      return;
    }
#endif
    const V first = constant(Poly::c[0]), second = constant(Poly::c[1]);
    SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(y[i], first, second);
    SOFTCE_UNROLL for (int term = 2; term < Poly::kTerms; ++term) {
      keep_order<kCount>(p);
      const V c = constant(Poly::c[term]);
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], y[i], c);
    }
    keep_order<kCount>(p);
    SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) y[i] = p[i] * bits<V>(bits<U>(t[i]) << (kF32 ? 23 : 52));
  }
};

// tanh: an odd polynomial near 0, where 1 - 2 / (e^2|u| + 1) would cancel.
SOFTCE_INLINE F32V tanh(F32V u) {
  const F32V a = bits<F32V>(bits<U32V>(u) & 0x7fffffffu);
  const Exp<float, 5> e(2.0, Ref{});
  const F32V capped = a > 20.0f ? splat(20.0f) : a;
  const F32V far = 1.0f - 2.0f / (e.exp(capped * 2.0f) + 1.0f);
  const F32V s = u * u;
  F32V p = fma(splat(-5.70498872745e-3f), s, splat(2.06390887954e-2f));
  p = fma(p, s, splat(-5.37397155531e-2f));
  p = fma(p, s, splat(1.33314422036e-1f));
  p = fma(p, s, splat(-3.33332819422e-1f));
  const F32V near = fma(p * s, u, u);
  const F32V signed_far = bits<F32V>(bits<U32V>(far) | (bits<U32V>(u) & 0x80000000u));
  return a < 0.625f ? near : signed_far;
}
SOFTCE_INLINE F64V tanh(F64V u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = __builtin_tanh(u[i]);
  return u;
}
