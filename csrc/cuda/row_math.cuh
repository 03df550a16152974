// SPDX-License-Identifier: BSD-3-Clause
// The arithmetic of one row, for host and device alike: a CPU program compiles this header with a plain C++ compiler
// and holds it against a double-precision reference, so what a GPU runs has been run before.
//
// z is a logit after the soft cap and before the temperature: y = z / temperature. Everything is taken relative to the
// row's largest z, m, because sums of q * y would cancel for huge logits:
//     s = sum exp(y_i - m_y),  c = sum q_i (z_i - m),  l = Q log s - c / temperature + z_loss lse^2
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "softce.h"

#ifdef __CUDACC__
#define SOFTCE_HD __host__ __device__ __forceinline__
#else
#define SOFTCE_HD inline
#endif
#ifdef __CUDA_ARCH__
#define SOFTCE_UNROLL _Pragma("unroll")
#define SOFTCE_ROLLED _Pragma("unroll 1")
#else
#define SOFTCE_UNROLL
#define SOFTCE_ROLLED
#endif

namespace softce::cuda {

enum class TargetKind : int { sparse = 0, probs = 1, teacher = 2 };

// Spec as the kernels want it. k_hi + k_lo = log2(e) / temperature, split so that float32 rows keep their last bits.
struct RowScalars {
  float mix_a, mix_b, z_loss;
  float inv_temperature, k_hi, k_lo;
  float softcap, inv_softcap;
  float teacher_k_hi, teacher_k_lo;
  int phi;
  float phi_p0;
};

inline RowScalars row_scalars(const Spec& spec) {
  constexpr double kLog2e = 1.4426950408889634;
  RowScalars s = {};
  s.mix_a = static_cast<float>(spec.mix_a);
  s.mix_b = static_cast<float>(spec.mix_b);
  s.z_loss = static_cast<float>(spec.z_loss);
  s.inv_temperature = static_cast<float>(1.0 / spec.temperature);
  s.k_hi = static_cast<float>(kLog2e / spec.temperature);
  s.k_lo = static_cast<float>(kLog2e / spec.temperature - s.k_hi);
  s.softcap = static_cast<float>(spec.softcap);
  s.inv_softcap = spec.softcap > 0 ? static_cast<float>(1.0 / spec.softcap) : 0.0f;
  s.teacher_k_hi = static_cast<float>(kLog2e / spec.dense_temperature);
  s.teacher_k_lo = static_cast<float>(kLog2e / spec.dense_temperature - s.teacher_k_hi);
  s.phi = static_cast<int>(spec.phi);
  s.phi_p0 = static_cast<float>(spec.phi_p0);
  return s;
}

constexpr float kMinusInf = -__builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;

SOFTCE_HD float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// The larger of the two, NaN if either is.
SOFTCE_HD float max_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a ? a : (b != b ? b : (a > b ? a : b));
#endif
}

// exp(d / temperature) for d <= 0, k = log2(e) / temperature. kExact restores what rounding the product d * k lost;
// 16-bit logits do without. Below the range of float32 the result is an exact 0, NaN stays NaN.
template <bool kExact>
SOFTCE_HD float exp_below(float d, float k_hi, float k_lo) {
  if constexpr (kExact) {
    const float product = d * k_hi;
    const float t = max_nan(product, -160.0f);
    const float lost = product > -160.0f ? fmaf(d, k_hi, -product) + d * k_lo : 0.0f;
    const float e = exp2_approx(t);
    return fmaf(e, lost * kLn2, e);
  } else {
    return exp2_approx(d * k_hi);
  }
}

SOFTCE_HD float capped(float x, const RowScalars& s) {
  return s.softcap > 0.0f ? s.softcap * tanhf(x * s.inv_softcap) : x;
}

// What a set of elements adds up to.
template <TargetKind K>
struct Acc {
  float m = kMinusInf, s = 0.0f;  // largest z, sum of exp(y - m_y)
  float c = 0.0f, q = 0.0f;       // sum q (z - m), sum q: probs the target, else the class weights of a uniform rest
};
template <>
struct Acc<TargetKind::teacher> {
  float m = kMinusInf, s = 0.0f, c = 0.0f, q = 0.0f;
  float tm = kMinusInf, ts = 0.0f;  // the teacher's own largest value and sum of e = exp(.)
  float tc = 0.0f, tq = 0.0f;       // sum w e (z - m), sum w e
};

// Moves the reference of c from m to a larger one. Before the first finite z there is nothing to move.
SOFTCE_HD float shifted(float c, float q, float m, float to) { return m == kMinusInf ? c : fmaf(q, m - to, c); }

// A weight that has vanished takes its term along, even an infinite one.
SOFTCE_HD float scaled(float value, float factor) { return factor == 0.0f ? 0.0f : value * factor; }

// Never half of a fused multiply-add.
SOFTCE_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SOFTCE_HD float finite_reference(float m) { return m == kMinusInf ? 0.0f : m; }

template <TargetKind K, bool kExact>
SOFTCE_HD void raise_reference(Acc<K>& acc, float to, const RowScalars& s) {
  acc.s *= exp_below<kExact>(acc.m - to, s.k_hi, s.k_lo);
  acc.c = shifted(acc.c, acc.q, acc.m, to);
  if constexpr (K == TargetKind::teacher) acc.tc = shifted(acc.tc, acc.tq, acc.m, to);
  acc.m = to;
}

template <bool kExact>
SOFTCE_HD void raise_teacher(Acc<TargetKind::teacher>& acc, float to, const RowScalars& s) {
  const float factor = exp_below<kExact>(acc.tm - to, s.teacher_k_hi, s.teacher_k_lo);
  acc.ts *= factor;
  acc.tq *= factor;
  acc.tc = scaled(acc.tc, factor);
  acc.tm = to;
}

// N elements more. x: logits, t: dense values, w: class weights (1 where the call has none).
// `uniform`: the sums over the class weights are wanted (sparse, teacher).
template <int N, TargetKind K, bool kExact>
SOFTCE_HD void accumulate(Acc<K>& acc, const float (&x)[N], const float (&t)[N], const float (&w)[N],
                          const RowScalars& s, bool uniform) {
  float z[N];
  float top = kMinusInf;
  SOFTCE_UNROLL
  for (int i = 0; i < N; ++i) {
    z[i] = capped(x[i], s);
    top = fmaxf(top, z[i]);
  }
  if (top > acc.m) raise_reference<K, kExact>(acc, top, s);
  const float reference = finite_reference(acc.m);
  float sum = 0.0f;
  SOFTCE_UNROLL
  for (int i = 0; i < N; ++i) {
    z[i] -= reference;
    sum += exp_below<kExact>(z[i], s.k_hi, s.k_lo);
  }
  acc.s += sum;
  if constexpr (K == TargetKind::probs) {
    SOFTCE_UNROLL
    for (int i = 0; i < N; ++i) {
      const float q = w[i] * fmaf(s.mix_a, t[i], s.mix_b);
      acc.q += q;
      acc.c = fmaf(q, q == 0.0f ? 0.0f : z[i], acc.c);
    }
  } else if (uniform) {
    float c = 0.0f, q = 0.0f;
    SOFTCE_UNROLL
    for (int i = 0; i < N; ++i) {
      q += w[i];
      c = fmaf(w[i], w[i] == 0.0f ? 0.0f : z[i], c);
    }
    acc.c += c;
    acc.q += q;
  }
  if constexpr (K == TargetKind::teacher) {
    float teacher_top = kMinusInf;
    SOFTCE_UNROLL
    for (int i = 0; i < N; ++i) teacher_top = fmaxf(teacher_top, t[i]);
    if (teacher_top > acc.tm) raise_teacher<kExact>(acc, teacher_top, s);
    const float teacher_reference = finite_reference(acc.tm);
    SOFTCE_UNROLL
    for (int i = 0; i < N; ++i) {
      const float e = exp_below<kExact>(t[i] - teacher_reference, s.teacher_k_hi, s.teacher_k_lo);
      const float q = w[i] * e;
      acc.ts += e;
      acc.tq += q;
      acc.tc = fmaf(q, q == 0.0f ? 0.0f : z[i], acc.tc);
    }
  }
}

// Joins two disjoint sets.
template <TargetKind K, bool kExact>
SOFTCE_HD Acc<K> merged(Acc<K> a, Acc<K> b, const RowScalars& s) {
  const float m = fmaxf(a.m, b.m);
  if (m != kMinusInf) {
    if (a.m < m) raise_reference<K, kExact>(a, m, s);
    if (b.m < m) raise_reference<K, kExact>(b, m, s);
  }
  a.s += b.s;
  a.c += b.c;
  a.q += b.q;
  if constexpr (K == TargetKind::teacher) {
    const float tm = fmaxf(a.tm, b.tm);
    if (tm != kMinusInf) {
      if (a.tm < tm) raise_teacher<kExact>(a, tm, s);
      if (b.tm < tm) raise_teacher<kExact>(b, tm, s);
    }
    a.ts += b.ts;
    a.tq += b.tq;
    a.tc += b.tc;
  }
  return a;
}

// One entry of a sparse target, read before any gradient is written (the logits' memory may be the gradient's).
struct alignas(16) Entry {
  int index;  // class, kPadding or kBadIndex
  float z, w;
  float q;  // mix_a * value * w: what the entry adds to the class's effective weight
};
constexpr int kPadding = -1, kBadIndex = -2;

// A class out of range cannot be reported without waiting for the device: it makes its row's loss and gradient NaN.
SOFTCE_HD Entry entry_without_class(bool padding) {
  const float nan = nanf("");
  return padding ? Entry{kPadding, 0.0f, 0.0f, 0.0f} : Entry{kBadIndex, nan, nan, nan};
}

// Sums over the entries of a row.
struct EntrySums {
  float q = 0.0f, c = 0.0f;  // sum q, sum q (z - m)
  float valid = 0.0f;        // entries that are no padding
};

SOFTCE_HD void add_entry(EntrySums& sums, const Entry& entry, float m) {
  if (entry.index == kPadding) return;
  sums.valid += 1.0f;
  sums.q += entry.q;
  if (entry.q != 0.0f) sums.c = fmaf(entry.q, entry.z - finite_reference(m), sums.c);
}

// phi(l) and phi'(l).
struct Transformed {
  float value, slope;
};

SOFTCE_HD Transformed transformed(const RowScalars& s, float l) {
  const float p = s.phi_p0;
  const Phi phi = p == 0.0f ? Phi::identity : static_cast<Phi>(s.phi);
  switch (phi) {
    case Phi::focal: {
      if (l == -kMinusInf) return {l, 1.0f};
      const float at = l < 0.0f ? 0.0f : l;  // rounding below 0 has no power
      const float miss = -expm1f(-at), power = powf(miss, p);
      return {power * at, power * fmaf(p * expf(-at), at == 0.0f ? 1.0f : at / miss, 1.0f)};
    }
    case Phi::label_relaxation: {
      const float edge = -log1pf(-p);
      if (l < edge) return {0.0f, 0.0f};
      const float miss = -expm1f(-l);
      return {(1.0f - p) * (l - edge) + p * (logf(p) - logf(miss)), (1.0f - p) - p * expf(-l) / miss};
    }
    case Phi::generalized:
      return {-expm1f(-p * l) / p, expf(-p * l)};
    case Phi::poly1:
      return {fmaf(-p, expm1f(-l), l), fmaf(p, expf(-l), 1.0f)};
    default:  // and every transform with a parameter of 0
      return {l, 1.0f};
  }
}

// What a row knows besides its elements.
struct RowInputs {
  float uniform;     // sparse: mix_a * rest + mix_b, what every class has besides the entries; teacher: mix_b
  float row_weight;  // of this row, 1 where the call has none
  double scale;      // scale / denominator of the reduction
  bool plain_index;  // one entry without a value: the row counts by its class weight
};

// The finished row: its statistics, and the scalars of dlogits_i = (a exp(y_i - m_y) - d q_i) dz_i/dx_i, where without
// entries d q_i = w_i (pull_t t_i + pull_1), t being the dense value or the teacher's exp(t_i - teacher_m).
struct RowResult {
  float loss, lse, mass, count;
  float weighted_loss;  // row_weight * phi(l), 0 where ignored
  float m, a, d;
  float pull_t, pull_1, teacher_m;
  bool zero;  // an exact 0 in every class
};

// dot: sum q (z - m) where it is known better than from the sums.
template <TargetKind K>
SOFTCE_HD RowResult finish_row(const Acc<K>& acc, const EntrySums& entries, const Entry& first, const RowInputs& in,
                               const RowScalars& s, const float* dot = nullptr) {
  RowResult r = {};
  r.m = acc.m;
  float mass = acc.q, c = acc.c, teacher_scale = 0.0f;
  r.count = 1.0f;
  if constexpr (K == TargetKind::sparse) {
    if (entries.valid == 0.0f) {
      r.zero = true;
      r.count = 0.0f;
      return r;
    }
    mass = entries.q;
    c = entries.c;
    if (in.uniform != 0.0f) {
      mass = fmaf(in.uniform, acc.q, mass);
      c = fmaf(in.uniform, acc.c, c);
    }
    if (in.plain_index) r.count = first.w;
  } else if constexpr (K == TargetKind::teacher) {
    r.teacher_m = acc.tm;
    teacher_scale = s.mix_a / acc.ts;
    mass = teacher_scale * acc.tq;
    c = scaled(acc.tc, teacher_scale);
    if (in.uniform != 0.0f) {
      mass = fmaf(in.uniform, acc.q, mass);
      c = fmaf(in.uniform, acc.c, c);
    }
  }
  if (dot) c = *dot;
  const float log_s = logf(acc.s);
  r.lse = fmaf(acc.m, s.inv_temperature, log_s);
  r.loss = fmaf(mass, log_s, -c * s.inv_temperature);
  r.mass = mass;
  float toward = mass;
  if (s.z_loss != 0.0f) {
    r.loss = fmaf(s.z_loss * r.lse, r.lse, r.loss);
    toward = fmaf(2.0f * s.z_loss, r.lse, mass);
  }
  const Transformed phi = transformed(s, r.loss);
  r.weighted_loss = in.row_weight * phi.value;
  const float outer = static_cast<float>(in.scale * in.row_weight);
  r.zero = outer == 0.0f;
  r.d = outer * phi.slope * s.inv_temperature;
  r.a = r.d * toward / acc.s;
  r.pull_1 = r.d * (K == TargetKind::probs ? s.mix_b : in.uniform);
  r.pull_t = r.d * (K == TargetKind::probs ? s.mix_a : teacher_scale);
  return r;
}

// Whether parts of a class's weight that differ in sign met a logit of -inf, or the target itself is no number.
SOFTCE_HD bool signs_met(const RowResult& r) { return r.loss != r.loss && r.lse > kMinusInf; }

// The gradient of one class from its z and pull = d * (its effective weight).
template <bool kExact>
SOFTCE_HD float gradient_of(float z, float pull, const RowResult& r, const RowScalars& s) {
  const float g = fmaf(r.a, exp_below<kExact>(z - r.m, s.k_hi, s.k_lo), -pull);
  if (s.softcap > 0.0f) {
    const float slope = z * s.inv_softcap;
    return g * fmaf(-slope, slope, 1.0f);
  }
  return g;
}

// The pull of a class without entries.
template <TargetKind K, bool kExact>
SOFTCE_HD float pull_of(float t, float w, const RowResult& r, const RowScalars& s) {
  if constexpr (K == TargetKind::sparse) {
    return r.pull_1 * w;
  } else if constexpr (K == TargetKind::probs) {
    return w * fmaf(r.pull_t, t, r.pull_1);
  } else {
    const float e = exp_below<kExact>(t - r.teacher_m, s.teacher_k_hi, s.teacher_k_lo);
    return w * fmaf(r.pull_t, e, r.pull_1);
  }
}

}  // namespace softce::cuda
