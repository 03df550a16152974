// SPDX-License-Identifier: BSD-3-Clause
// One warp's slice of a row: how a row is cut, how its elements are read and written 16 bytes at a time whatever the
// alignment, for host and device alike.
//
// A row is cut into size * warps slices (size blocks of a cluster). Cuts lie where the logits' address is a multiple of
// 16 bytes, so only the first slice can begin, and only the last can end, inside a 16-byte unit. The dense target, the
// class weights and the gradient may be aligned differently: they are then read and written around that.
#pragma once
#include "row_math.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace softce::cuda {

constexpr int kLanes = 32;
constexpr int kUnit = 16;  // bytes of a vector access

// Storage types: the bits of a bfloat16 and of a float16.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr int kPerUnit = kUnit / static_cast<int>(sizeof(T));

SOFTCE_HD float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SOFTCE_HD uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

SOFTCE_HD float to_float(float x) { return x; }
SOFTCE_HD float to_float(bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
SOFTCE_HD float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
#endif
}

SOFTCE_HD void from_float(float x, float& out) { out = x; }
SOFTCE_HD void from_float(float x, bf16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_of_float(x);
  out.bits = static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
SOFTCE_HD void from_float(float x, f16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&out.bits, &half, sizeof half);
#endif
}

// ---- 16-byte units ----

struct alignas(kUnit) Unit {
  uint32_t word[4];
};

SOFTCE_HD bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & (kUnit - 1)) == 0; }

template <class T>
SOFTCE_HD uint32_t bits_of(T x) {
  if constexpr (sizeof(T) == 4) {
    return bits_of_float(x);
  } else {
    return x.bits;
  }
}

template <class T>
SOFTCE_HD Unit load_unit(const T* p, bool aligned) {
  Unit unit;
  if (aligned) {
#ifdef __CUDA_ARCH__
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    unit.word[0] = v.x, unit.word[1] = v.y, unit.word[2] = v.z, unit.word[3] = v.w;
#else
    std::memcpy(&unit, __builtin_assume_aligned(p, kUnit), sizeof unit);
#endif
    return unit;
  }
  SOFTCE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      unit.word[i] = bits_of(p[i]);
    } else {
      unit.word[i] = bits_of(p[2 * i]) | (bits_of(p[2 * i + 1]) << 16);
    }
  }
  return unit;
}

// Element i of a unit; i is a constant after unrolling.
template <class T>
SOFTCE_HD float element(const Unit& unit, int i) {
  if constexpr (sizeof(T) == 4) {
    return float_of_bits(unit.word[i]);
  } else {
    const uint32_t word = unit.word[i / 2];
    T x;
    x.bits = static_cast<uint16_t>(i % 2 ? word >> 16 : word & 0xffffu);
    return to_float(x);
  }
}

#ifdef SOFTCE_ON_STORE  // the CPU program that checks this header counts the writes
#define SOFTCE_STORED(p, bytes) SOFTCE_ON_STORE(p, bytes)
#else
#define SOFTCE_STORED(p, bytes)
#endif

template <class T, int N>
SOFTCE_HD void store_unit(T* p, const float (&v)[N]) {
  static_assert(N == kPerUnit<T>, "a unit is 16 bytes");
  Unit unit;
  SOFTCE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      unit.word[i] = bits_of_float(v[i]);
    } else {
      T low, high;
      from_float(v[2 * i], low);
      from_float(v[2 * i + 1], high);
      unit.word[i] = bits_of(low) | (bits_of(high) << 16);
    }
  }
  SOFTCE_STORED(p, kUnit);
#ifdef __CUDA_ARCH__
  *reinterpret_cast<uint4*>(p) = make_uint4(unit.word[0], unit.word[1], unit.word[2], unit.word[3]);
#else
  std::memcpy(__builtin_assume_aligned(p, kUnit), &unit, sizeof unit);
#endif
}

template <class T>
SOFTCE_HD void store_one(T* p, float v) {
  T x;
  from_float(v, x);
  SOFTCE_STORED(p, sizeof(T));
  *p = x;
}

// ---- cutting ----

// [0, n) as head elements up to the first unit boundary, whole units, and the tail.
struct Cut {
  int head, units, tail;
};

template <class T>
SOFTCE_HD Cut cut_of(const T* p, int n) {
  const int gap = static_cast<int>((kUnit - (reinterpret_cast<uintptr_t>(p) & (kUnit - 1))) & (kUnit - 1));
  Cut cut;
  cut.head = gap / static_cast<int>(sizeof(T));
  if (cut.head > n) cut.head = n;
  cut.units = (n - cut.head) / kPerUnit<T>;
  cut.tail = n - cut.head - cut.units * kPerUnit<T>;
  return cut;
}

// The element that this lane takes outside the whole units, or -1. Head and tail are shorter than a unit each.
SOFTCE_HD int edge_element(const Cut& cut, int n, int lane) {
  if (lane < cut.head) return lane;
  const int from_end = lane - kLanes / 2;
  return from_end >= 0 && from_end < cut.tail ? n - cut.tail + from_end : -1;
}

struct Range {
  int begin, end;
};

// Elements of slice `slice` of `slices`, each of at most `units` whole units plus the row's own head or tail.
template <class T>
SOFTCE_HD Range slice_range(const T* row, int classes, int units, int slice, int slices) {
  const Cut cut = cut_of(row, classes);
  const int64_t first = static_cast<int64_t>(slice) * units;
  const int from = first < cut.units ? static_cast<int>(first) : cut.units;
  const int to = first + units < cut.units ? static_cast<int>(first + units) : cut.units;
  Range range = {cut.head + from * kPerUnit<T>, cut.head + to * kPerUnit<T>};
  if (slice == 0) range.begin = 0;
  if (slice == slices - 1) range.end = classes;
  return range;
}

// Where n elements at a global address lie in a 16-byte aligned buffer: at the same offset from a unit boundary, so
// that whole units can be copied as such.
template <class T>
SOFTCE_HD T* staged(unsigned char* buffer, const T* global) {
  return reinterpret_cast<T*>(buffer + (reinterpret_cast<uintptr_t>(global) & (kUnit - 1)));
}

// Bytes of the buffer for n elements at any address.
template <class T>
SOFTCE_HD int64_t staged_bytes(int64_t n) {
  return (n * static_cast<int64_t>(sizeof(T)) + 2 * kUnit - 1) / kUnit * kUnit;
}

// ---- a slice ----

// Pointers to a slice's first element; x and t may point into shared memory.
template <class T, class D>
struct Slice {
  const T* x;
  const D* t;         // dense target; unused if sparse
  const float* w;     // class weights or null
  T* out;             // gradient or null
  int begin, length;  // first class, number of classes
};

template <int N>
SOFTCE_HD void load_floats(const float* p, bool aligned, float (&v)[N]) {
  if constexpr (N % 4 == 0) {
    SOFTCE_UNROLL
    for (int u = 0; u < N / 4; ++u) {
      const Unit unit = load_unit(p + 4 * u, aligned);
      SOFTCE_UNROLL
      for (int i = 0; i < 4; ++i) v[4 * u + i] = element<float>(unit, i);
    }
  } else {
    SOFTCE_UNROLL
    for (int i = 0; i < N; ++i) v[i] = p[i];
  }
}

template <int N>
SOFTCE_HD void class_weights(const float* w, int at, bool aligned, float (&v)[N]) {
  if (w) {
    load_floats(w + at, aligned, v);
  } else {
    SOFTCE_UNROLL
    for (int i = 0; i < N; ++i) v[i] = 1.0f;
  }
}

// One unit of logits with what belongs to it, as loaded.
template <class T, class D, TargetKind K>
struct Loaded {
  static constexpr int kElements = kPerUnit<T>;
  static constexpr int kDenseUnits = K == TargetKind::sparse ? 1 : kElements / kPerUnit<D>;
  Unit x, t[kDenseUnits];

  SOFTCE_HD void load(const Slice<T, D>& slice, int at, bool x_aligned, bool t_aligned) {
    x = load_unit(slice.x + at, x_aligned);
    if constexpr (K != TargetKind::sparse) {
      SOFTCE_UNROLL
      for (int u = 0; u < kDenseUnits; ++u) t[u] = load_unit(slice.t + at + u * kPerUnit<D>, t_aligned);
    }
  }

  SOFTCE_HD void unpack(float (&xs)[kElements], float (&ts)[kElements]) const {
    SOFTCE_UNROLL
    for (int i = 0; i < kElements; ++i) {
      xs[i] = element<T>(x, i);
      if constexpr (K != TargetKind::sparse) {
        ts[i] = element<D>(t[i / kPerUnit<D>], i % kPerUnit<D>);
      } else {
        ts[i] = 0.0f;
      }
    }
  }
};

// One edge element.
template <class T, class D, TargetKind K>
SOFTCE_HD void unpack_one(const Slice<T, D>& slice, int at, float (&x)[1], float (&t)[1], float (&w)[1]) {
  x[0] = to_float(slice.x[at]);
  t[0] = 0.0f;
  if constexpr (K != TargetKind::sparse) t[0] = to_float(slice.t[at]);
  class_weights(slice.w, at, false, w);
}

// First sweep, one lane's part. kBatch units are loaded before the first is used.
template <class T, class D, TargetKind K, int kBatch>
SOFTCE_HD void sweep(const Slice<T, D>& slice, int lane, const RowScalars& s, bool uniform, Acc<K>& acc) {
  constexpr int N = kPerUnit<T>;
  constexpr bool kExact = sizeof(T) == 4;
  const Cut cut = cut_of(slice.x, slice.length);
  const bool t_aligned = K != TargetKind::sparse && is_aligned(slice.t + cut.head);
  const bool w_aligned = slice.w && is_aligned(slice.w + cut.head);
  for (int first = lane; first < cut.units; first += kLanes * kBatch) {
    Loaded<T, D, K> loaded[kBatch];
    SOFTCE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int unit = first + b * kLanes;
      if (unit < cut.units) loaded[b].load(slice, cut.head + unit * N, true, t_aligned);
    }
    SOFTCE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int unit = first + b * kLanes;
      if (unit < cut.units) {
        float x[N], t[N], w[N];
        loaded[b].unpack(x, t);
        class_weights(slice.w, cut.head + unit * N, w_aligned, w);
        accumulate<N, K, kExact>(acc, x, t, w, s, uniform);
      }
    }
  }
  const int edge = edge_element(cut, slice.length, lane);
  if (edge >= 0) {
    float x[1], t[1], w[1];
    unpack_one<T, D, K>(slice, edge, x, t, w);
    accumulate<1, K, kExact>(acc, x, t, w, s, uniform);
  }
}

// Second sweep, one lane's part: the gradient of every class as if it had no entries. A lane reads what it overwrites
// before it does, so `out` may be `x`.
template <class T, class D, TargetKind K, int kBatch>
SOFTCE_HD void emit(const Slice<T, D>& slice, int lane, const RowScalars& s, const RowResult& r) {
  constexpr int N = kPerUnit<T>;
  constexpr bool kExact = sizeof(T) == 4;
  const Cut cut = cut_of(slice.out, slice.length);
  const int edge = edge_element(cut, slice.length, lane);
  if (r.zero) {
    const float zeros[N] = {};
    for (int unit = lane; unit < cut.units; unit += kLanes) store_unit(slice.out + cut.head + unit * N, zeros);
    if (edge >= 0) store_one(slice.out + edge, 0.0f);
    return;
  }
  const bool x_aligned = is_aligned(slice.x + cut.head);
  const bool t_aligned = K != TargetKind::sparse && is_aligned(slice.t + cut.head);
  const bool w_aligned = slice.w && is_aligned(slice.w + cut.head);
  for (int first = lane; first < cut.units; first += kLanes * kBatch) {
    Loaded<T, D, K> loaded[kBatch];
    SOFTCE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int unit = first + b * kLanes;
      if (unit < cut.units) loaded[b].load(slice, cut.head + unit * N, x_aligned, t_aligned);
    }
    SOFTCE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int unit = first + b * kLanes;
      if (unit < cut.units) {
        float x[N], t[N], w[N];
        loaded[b].unpack(x, t);
        class_weights(slice.w, cut.head + unit * N, w_aligned, w);
        SOFTCE_UNROLL
        for (int i = 0; i < N; ++i)
          x[i] = gradient_of<kExact>(capped(x[i], s), pull_of<K, kExact>(t[i], w[i], r, s), r, s);
        store_unit(slice.out + cut.head + unit * N, x);
      }
    }
  }
  if (edge >= 0) {
    float x[1], t[1], w[1];
    unpack_one<T, D, K>(slice, edge, x, t, w);
    store_one(slice.out + edge, gradient_of<kExact>(capped(x[0], s), pull_of<K, kExact>(t[0], w[0], r, s), r, s));
  }
}

// After emit: the classes of this slice that have entries, once each, duplicates added up.
template <class T, class D>
SOFTCE_HD void emit_entries(const Slice<T, D>& slice, const Entry* entries, int count, int lane, const RowScalars& s,
                            const RowResult& r) {
  if (r.zero) return;
  for (int k = lane; k < count; k += kLanes) {
    const Entry entry = entries[k];
    const int at = entry.index - slice.begin;
    if (entry.index < 0 || at < 0 || at >= slice.length) continue;
    float q = entry.q;
    bool first = true;
    for (int other = 0; other < count; ++other) {
      if (other == k || entries[other].index != entry.index) continue;
      if (other < k) first = false;
      q += entries[other].q;
    }
    if (first) store_one(slice.out + at, gradient_of<sizeof(T) == 4>(entry.z, fmaf(r.d, q, r.pull_1 * entry.w), r, s));
  }
}

}  // namespace softce::cuda
