// SPDX-License-Identifier: BSD-3-Clause
// Vectors as wide as the instruction set: GCC/Clang vector types, whose arithmetic the compiler knows, and intrinsics
// for the few things that they lack. Included inside the namespace of an instruction set.

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

#if defined(__FMA__)
constexpr bool kFusedMultiplyAdd = true;  // a product of fma is exact before it is added
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

#define SOFTCE_INLINE inline __attribute__((always_inline))

typedef float F32V __attribute__((vector_size(kVecBytes)));
typedef int32_t I32V __attribute__((vector_size(kVecBytes)));
typedef uint32_t U32V __attribute__((vector_size(kVecBytes)));
typedef double F64V __attribute__((vector_size(kVecBytes)));
typedef int64_t I64V __attribute__((vector_size(kVecBytes)));
typedef uint64_t U64V __attribute__((vector_size(kVecBytes)));
typedef uint16_t HalfV __attribute__((vector_size(kVecBytes / 2)));  // as many as F32V has floats
typedef float HalfF32V __attribute__((vector_size(kVecBytes / 2)));
typedef double HalfF64V __attribute__((vector_size(kVecBytes / 2)));

// The vector of an accumulation type, float or double, its bits, and a vector half as wide.
template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  using V = F32V;
  using U = U32V;
  using Half = HalfF32V;
};
template <>
struct VecOf<double> {
  using V = F64V;
  using U = U64V;
  using Half = HalfF64V;
};
template <class A>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));

template <class To, class From>
SOFTCE_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class A>
SOFTCE_INLINE V load(const A* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class A>
SOFTCE_INLINE void store(A* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

SOFTCE_INLINE F32V splat(float x) { return x - F32V{}; }
SOFTCE_INLINE F64V splat(double x) { return x - F64V{}; }

// Loops over an array that is to stay in registers: compilers leave some of them rolled.
#define SOFTCE_UNROLL _Pragma("GCC unroll 16")

// Vectors whose exp is computed together: as many as the registers hold without spilling.
#if defined(__AVX2__) || defined(__aarch64__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 1;
#endif

// Keeps the compiler from computing one vector's chain to its end before it starts the next one's. Only where the
// registers suffice for it.
template <int kCount, class V>
SOFTCE_INLINE void keep_order(V* v) {
#if defined(__AVX2__)
  SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) asm("" : "+v"(v[i]));
#endif
  (void)v;
}

// A constant in every lane. Sixteen registers do not hold the constants of exp beside four vectors on their way through
// it: there they are loaded again for each step, which no compiler does of its own accord.
template <class A>
SOFTCE_INLINE typename VecOf<A>::V constant(const A& c) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  typename VecOf<A>::V v;
  if constexpr (sizeof(A) == 4) {
    asm volatile("vbroadcastss %1, %0" : "=x"(v) : "m"(c));
  } else {
    asm volatile("vbroadcastsd %1, %0" : "=x"(v) : "m"(c));
  }
  return v;
#else
  return splat(c);
#endif
}

// a > b ? a : b, so b where either is nan.
#if defined(__AVX512F__)
SOFTCE_INLINE F32V vmax(F32V a, F32V b) { return (F32V)_mm512_max_ps((__m512)a, (__m512)b); }
SOFTCE_INLINE F64V vmax(F64V a, F64V b) { return (F64V)_mm512_max_pd((__m512d)a, (__m512d)b); }
SOFTCE_INLINE F32V fma(F32V a, F32V b, F32V c) { return (F32V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SOFTCE_INLINE F64V fma(F64V a, F64V b, F64V c) { return (F64V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__AVX2__)
SOFTCE_INLINE F32V vmax(F32V a, F32V b) { return (F32V)_mm256_max_ps((__m256)a, (__m256)b); }
SOFTCE_INLINE F64V vmax(F64V a, F64V b) { return (F64V)_mm256_max_pd((__m256d)a, (__m256d)b); }
SOFTCE_INLINE F32V fma(F32V a, F32V b, F32V c) { return (F32V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SOFTCE_INLINE F64V fma(F64V a, F64V b, F64V c) { return (F64V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
SOFTCE_INLINE F32V vmax(F32V a, F32V b) { return a > b ? a : b; }
SOFTCE_INLINE F64V vmax(F64V a, F64V b) { return a > b ? a : b; }
SOFTCE_INLINE F32V fma(F32V a, F32V b, F32V c) { return a * b + c; }
SOFTCE_INLINE F64V fma(F64V a, F64V b, F64V c) { return a * b + c; }
#endif

#if defined(__AVX512F__)
SOFTCE_INLINE bool any_nan(F32V v) { return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0; }
SOFTCE_INLINE bool any_nan(F64V v) { return _mm512_cmp_pd_mask((__m512d)v, (__m512d)v, _CMP_UNORD_Q) != 0; }
#elif defined(__AVX2__)
SOFTCE_INLINE bool any_nan(F32V v) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q)) != 0;
}
SOFTCE_INLINE bool any_nan(F64V v) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, (__m256d)v, _CMP_UNORD_Q)) != 0;
}
#else
template <class V>
SOFTCE_INLINE bool any_nan(V v) {
  bool any = false;
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); ++i) any |= v[i] != v[i];
  return any;
}
#endif

// Writes a vector past the caches; p is aligned to kVecBytes (half of it for HalfV).
SOFTCE_INLINE void stream(void* p, F32V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#else
  __builtin_memcpy(p, &v, sizeof(v));
#endif
}
SOFTCE_INLINE void stream(void* p, HalfV v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  __builtin_memcpy(p, &v, sizeof(v));
#endif
}
SOFTCE_INLINE void stream(void* p, F64V v) { stream(p, bits<F32V>(v)); }
SOFTCE_INLINE void stream(void* p, U32V v) { stream(p, bits<F32V>(v)); }

// Streamed stores become visible to other threads before whatever this thread writes next.
SOFTCE_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Lane lanes[i] of v in lane i.
#if defined(__AVX512F__)
SOFTCE_INLINE F32V pick(F32V v, U32V lanes) { return (F32V)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v); }
SOFTCE_INLINE F64V pick(F64V v, U64V lanes) { return (F64V)_mm512_permutexvar_pd((__m512i)lanes, (__m512d)v); }
#elif defined(__AVX2__)
SOFTCE_INLINE F32V pick(F32V v, U32V lanes) { return (F32V)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes); }
SOFTCE_INLINE F64V pick(F64V v, U64V lanes) {
  const U64V first = lanes << 1, halves = (first | first << 32) + (uint64_t{1} << 32);
  return (F64V)_mm256_permutevar8x32_ps((__m256)v, (__m256i)halves);
}
#else
template <class V, class U>
SOFTCE_INLINE V pick(V v, U lanes) {
  V picked;
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); ++i) picked[i] = v[lanes[i]];
  return picked;
}
#endif

// 0, 1, .. up to a vector's lanes, as template arguments.
template <int... kLane>
struct Lanes {};
template <int kCount, int... kRest>
struct LanesOf : LanesOf<kCount - 1, kCount - 1, kRest...> {};
template <int... kLane>
struct LanesOf<0, kLane...> {
  using Type = Lanes<kLane...>;
};

// One step of add_each: lanes whose kHalf bit is clear take a's lane and the one kHalf behind it, the others b's.
template <int kHalf, class V, int... kLane>
SOFTCE_INLINE V add_halves(V a, V b, Lanes<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
#if defined(__clang__)
  const V own = __builtin_shufflevector(a, b, ((kLane & kHalf) ? kCount + kLane : kLane)...);
  const V other = __builtin_shufflevector(a, b, ((kLane & kHalf) ? kCount + kLane - kHalf : kLane + kHalf)...);
#else
  using U = decltype(a == b);
  const V own = __builtin_shuffle(a, b, U{((kLane & kHalf) ? kCount + kLane : kLane)...});
  const V other = __builtin_shuffle(a, b, U{((kLane & kHalf) ? kCount + kLane - kHalf : kLane + kHalf)...});
#endif
  return own + other;
}

// As many vectors as they have lanes: lane k of the result is the sum of v[k]'s lanes. Destroys v.
template <class V, int kLane, int kHalf = kLane / 2>
SOFTCE_INLINE V add_each(V* v) {
  for (int i = 0; i < kHalf; ++i) v[i] = add_halves<kHalf>(v[i], v[i + kHalf], typename LanesOf<kLane>::Type());
  if constexpr (kHalf > 1) return add_each<V, kLane, kHalf / 2>(v);
  return v[0];
}

// A vector in double, its two halves added.
SOFTCE_INLINE F64V to_double(F64V v) { return v; }
SOFTCE_INLINE F64V to_double(F32V v) {
  HalfF32V halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return __builtin_convertvector(halves[0], F64V) + __builtin_convertvector(halves[1], F64V);
}

// The sum and the maximum of a vector's lanes. Halves on halves: lane after lane each step would wait for the one
// before.
template <class A>
SOFTCE_INLINE double sum_of(typename VecOf<A>::V v) {
  double lanes[kLanes<double>];
  store(lanes, to_double(v));
  for (int half = kLanes<double> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class A>
SOFTCE_INLINE double max_of(typename VecOf<A>::V v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}
