// SPDX-License-Identifier: BSD-3-Clause
// Elements in memory to vectors of the accumulation type and back. Included inside the namespace of an instruction
// set. A unit is what one load brings: NV vectors, kUnit elements.

// float16 and bfloat16 to float32 and back, in vectors; back rounds to nearest even and keeps nan.
SOFTCE_INLINE F32V widen_bf16(HalfV h) { return bits<F32V>(__builtin_convertvector(h, U32V) << 16); }

// Upper half of each lane, rounded; the lower half is left dirty. Rounding could carry a nan with a full mantissa into
// the sign: where one can come, kNan keeps it.
template <bool kNan>
SOFTCE_INLINE U32V round_bf16(F32V v) {
  const U32V b = bits<U32V>(v);
  const U32V rounded = b + 0x7fffu + ((b >> 16) & 1u);
  if constexpr (kNan) return (b & 0x7fffffffu) > 0x7f800000u ? (b | 0x400000u) : rounded;
  return rounded;
}

// v with the digits of a bfloat16, rounded as round_bf16 does, for |v| < 2^111: at 65536 v a float has its last digit
// where v has that of a bfloat16, so 65535 v is rounded there, and what is between them is v as it was rounded (after
// T. J. Dekker, "A floating-point technique for extending the available precision", 1971, who takes 65537 v, which
// has a digit less for v next to a power of two). Half the work of round_bf16; but larger numbers become an infinity of
// either sign, an infinity nan and -0 becomes 0, and a subnormal number keeps digits that are cut, not rounded.
SOFTCE_INLINE F32V moderate_to_bf16(F32V v) { return fma(v, splat(65536.0f), -(v * 65535.0f)); }

SOFTCE_INLINE HalfV narrow_bf16(F32V v) {
#if defined(__AVX512BF16__)
  return (HalfV)_mm512_cvtneps_pbh((__m512)v);  // where others leave a subnormal number, this leaves 0
#else
  const U32V high = round_bf16<true>(v) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i u = (__m256i)high;
  return (HalfV)_mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
#else
  return __builtin_convertvector(high, HalfV);
#endif
#endif
}

#if defined(__AVX512F__)
SOFTCE_INLINE F32V widen_f16(HalfV h) { return (F32V)_mm512_cvtph_ps((__m256i)h); }
SOFTCE_INLINE HalfV narrow_f16(F32V v) { return (HalfV)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
SOFTCE_INLINE F32V widen_f16(HalfV h) { return (F32V)_mm256_cvtph_ps((__m128i)h); }
SOFTCE_INLINE HalfV narrow_f16(F32V v) { return (HalfV)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
SOFTCE_INLINE F32V widen_f16(HalfV h) {
  const U32V u = __builtin_convertvector(h, U32V);
  const U32V magnitude = (u & 0x7fffu) << 13;
  // 2^112 moves the exponent from half's bias to float's, subnormals included.
  const U32V scaled = bits<U32V>(bits<F32V>(magnitude) * 0x1p112f);
  const U32V finite_or_not = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : scaled;
  return bits<F32V>(finite_or_not | ((u & 0x8000u) << 16));
}
SOFTCE_INLINE HalfV narrow_f16(F32V v) {
  const U32V b = bits<U32V>(v);
  const U32V magnitude = b & 0x7fffffffu;
  // Adding 0.5 leaves the ten subnormal bits, rounded by the addition itself, at the bottom of the mantissa.
  const U32V tiny = bits<U32V>(bits<F32V>(magnitude) + 0.5f) - 0x3f000000u;
  const U32V normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32V special = magnitude > 0x7f800000u ? (0x7e00u | U32V{}) : (0x7c00u | U32V{});
  const U32V small = magnitude < 0x38800000u ? tiny : normal;
  const U32V result = magnitude >= 0x47800000u ? special : small;
  return __builtin_convertvector(result | ((b >> 16) & 0x8000u), HalfV);
}
#endif

template <class A>
struct FloatIO {  // float32 and float64 as they are
  using Elem = A;
  using Acc = A;
  using V = typename VecOf<A>::V;
  static constexpr int NV = 1;
  static constexpr int kUnit = kLanes<A>;
  static constexpr int kDegree = 5;
  static SOFTCE_INLINE void read(const Elem* p, V* v) { v[0] = load<V>(p); }
  static SOFTCE_INLINE void write(Elem* p, const V* v) { store(p, v[0]); }
  static SOFTCE_INLINE void write_stream(Elem* p, const V* v) { stream(p, v[0]); }
  static Elem from(A x) { return x; }
  static A to(Elem x) { return x; }
  static constexpr int kPairs = 1;  // even elements of a unit that stand before the odd ones
  static constexpr bool kModerate = false, kPackedMost = false;
};
using F32 = FloatIO<float>;
using F64 = FloatIO<double>;

template <HalfV (*kNarrow)(F32V), F32V (*kWiden)(HalfV), int kExpDegree>
struct HalfIO {  // 16-bit elements in their order
  using Elem = uint16_t;
  using Acc = float;
  using V = F32V;
  static constexpr int NV = 1;
  static constexpr int kUnit = kLanes<float>;
  static constexpr int kDegree = kExpDegree;
  static SOFTCE_INLINE HalfV narrow(F32V v) { return kNarrow(v); }
  static SOFTCE_INLINE void read(const Elem* p, V* v) { v[0] = kWiden(load<HalfV>(p)); }
  static SOFTCE_INLINE void write(Elem* p, const V* v) { store(p, narrow(v[0])); }
  static SOFTCE_INLINE void write_stream(Elem* p, const V* v) { stream(p, narrow(v[0])); }
  static Elem from(float x) { return narrow(splat(x))[0]; }
  static float to(Elem x) { return kWiden(HalfV{} | x)[0]; }
  static constexpr int kPairs = 1;
  static constexpr bool kModerate = false, kPackedMost = false;
};
using F16 = HalfIO<narrow_f16, widen_f16, 5>;
using BF16 = HalfIO<narrow_bf16, widen_bf16, 4>;

// bfloat16, even and odd elements in a vector each: a shift and a mask instead of shuffles, and whole-vector stores.
struct BF16Pairs {
  using Elem = uint16_t;
  using Acc = float;
  using V = F32V;
  static constexpr int NV = 2;
  static constexpr int kUnit = 2 * kLanes<float>;
  static constexpr int kDegree = BF16::kDegree;
  static SOFTCE_INLINE void read(const Elem* p, V* v) {
    const U32V u = load<U32V>(p);
    v[0] = bits<F32V>(u << 16);
    v[1] = bits<F32V>(u & 0xffff0000u);
  }
  // The largest, and the smallest, elements so far as whole numbers of two bytes, before they are widened: half as many
  // maxima. Theirs is the order of the elements wherever one is not negative, but that positive nans come above
  // infinity.
#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr bool kPackedMost = true;
  static SOFTCE_INLINE U32V larger(U32V most, const Elem* p) {
    return (U32V)_mm256_max_epi16((__m256i)most, (__m256i)load<U32V>(p));
  }
  static SOFTCE_INLINE U32V smaller(U32V least, const Elem* p) {
    return (U32V)_mm256_min_epi16((__m256i)least, (__m256i)load<U32V>(p));
  }
#else
  static constexpr bool kPackedMost = false;
#endif
  template <bool kNan>
  static SOFTCE_INLINE U32V pack(const V* v) {
#if defined(__AVX512BF16__)
    // All even elements, then all odd ones, put in turns.
    alignas(64) static constexpr uint16_t kTurns[kUnit] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    return (U32V)_mm512_permutexvar_epi16(_mm512_load_si512(kTurns), apart);
#else
    return in_turns(round_bf16<kNan>(v[0]), round_bf16<kNan>(v[1]));
#endif
  }
  // The upper half of each lane, even before odd.
  static SOFTCE_INLINE U32V in_turns(U32V even, U32V odd) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (U32V)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
    return (even >> 16) | (odd & 0xffff0000u);
#endif
  }
  // Whether there is a shorter way for moderate numbers. Only where fma is no operator of the language: compilers fuse
  // those as they like, and a product that is not rounded leaves nothing of the rounding.
#if defined(__AVX2__) && !defined(__AVX512BF16__)
  static constexpr bool kModerate = true;
#else
  static constexpr bool kModerate = false;
#endif
  // What the kernels write here is nan only where its operands were bfloat16 nans or a quiet one of our own, and none
  // of those has bits that rounding could carry out of.
  template <bool kIsModerate>
  static SOFTCE_INLINE U32V packed(const V* v) {
    if constexpr (!kIsModerate) return pack<false>(v);
    return in_turns(bits<U32V>(moderate_to_bf16(v[0])), bits<U32V>(moderate_to_bf16(v[1])));
  }
  template <bool kIsModerate = false>
  static SOFTCE_INLINE void write(Elem* p, const V* v) {
    store(p, packed<kIsModerate>(v));
  }
  template <bool kIsModerate = false>
  static SOFTCE_INLINE void write_stream(Elem* p, const V* v) {
    stream(p, packed<kIsModerate>(v));
  }
  static Elem from(float x) { return BF16::from(x); }
  static float to(Elem x) { return BF16::to(x); }
  static constexpr int kPairs = kLanes<float>;
};

// The first n elements of a unit, `fill` behind them.
template <class X>
SOFTCE_INLINE void read_part(const typename X::Elem* p, int64_t n, typename X::V* v, typename X::Acc fill) {
  typename X::Elem buffer[X::kUnit];
  const typename X::Elem filler = X::from(fill);
  for (int i = 0; i < X::kUnit; ++i) buffer[i] = filler;
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(buffer[0]));
  X::read(buffer, v);
}

template <class X>
SOFTCE_INLINE void write_part(typename X::Elem* p, int64_t n, const typename X::V* v) {
#if defined(__AVX512F__)
  if constexpr (X::NV == 1 && sizeof(typename X::Elem) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v[0]);
    return;
  } else if constexpr (X::NV == 1 && sizeof(typename X::Elem) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)X::narrow(v[0]));
    return;
  }
#endif
  typename X::Elem buffer[X::kUnit];
  X::write(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * sizeof(buffer[0]));
}

// Calls visit with the IO type of a dtype: the one place that maps one to the other.
template <class Visit>
SOFTCE_INLINE void with_io(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::f32:
      return visit(F32{});
    case DType::f64:
      return visit(F64{});
    case DType::bf16:
      return visit(BF16{});
    case DType::f16:
      return visit(F16{});
  }
}

SOFTCE_INLINE size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// One element, for the few places that need just one.
inline double element(const void* data, DType dtype, int64_t i) {
  double value = 0;
  with_io(dtype, [&](auto io) {
    using X = decltype(io);
    value = X::to(static_cast<const typename X::Elem*>(data)[i]);
  });
  return value;
}
