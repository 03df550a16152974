// SPDX-License-Identifier: BSD-3-Clause
// The sweep over rows whose sums do not tell sum q (z - m), for host and device alike.
#pragma once
#include "row_slice.cuh"

namespace softce::cuda {

// One lane's part of sum q (z - m) of a sparse target or a teacher, every q put together before it is multiplied: parts
// that differ in sign would be infinities of both signs where z is -inf. That happens to few rows.
template <class T, class D, TargetKind K>
SOFTCE_HD float dot_by_class(const Slice<T, D>& slice, int lane, const Entry* entries, int count, float uniform,
                             const Acc<K>& acc, const RowScalars& s) {
  const float m = finite_reference(acc.m);
  float c = 0.0f;
  SOFTCE_ROLLED
  for (int at = lane; at < slice.length; at += kLanes) {
    float x[1], t[1], w[1], q;
    unpack_one<T, D, K>(slice, at, x, t, w);
    if constexpr (K == TargetKind::sparse) {
      q = rounded_product(w[0], uniform);
      SOFTCE_ROLLED
      for (int k = 0; k < count; ++k)
        if (entries[k].index == slice.begin + at) q += entries[k].q;
    } else {
      const float e = exp_below<sizeof(T) == 4>(t[0] - acc.tm, s.teacher_k_hi, s.teacher_k_lo);
      q = w[0] * fmaf(s.mix_a / acc.ts, e, uniform);
    }
    if (q != 0.0f) c = fmaf(q, capped(x[0], s) - m, c);
  }
  return c;
}

}  // namespace softce::cuda
