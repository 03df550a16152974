// SPDX-License-Identifier: BSD-3-Clause
// The kernels of binary.h for one instruction set. A translation unit defines SOFTCE_ISA (its namespace) and SOFTCE_RUN
// (its entry point) and includes this file once; setup.py gives the flags, those of kernels.h.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own intrinsics, which leave an operand undefined that a full mask never reads.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "binary.h"

namespace softce::SOFTCE_ISA {
using namespace softce::cpu;
namespace {
#include "vec.h"
//
#include "io.h"
#include "math.h"

// log(1 + d) for d in [0, 1]: 2 atanh(s) with s = d / (2 + d) <= 1/3, by its series; what is left out is below
// 9^-8 / 17 = 1.4e-9 of it in float32 and 9^-18 / 37 = 2e-19 in float64.
template <class A, class V>
SOFTCE_INLINE V log1p_unit(V d) {
  constexpr int kTerms = sizeof(A) == 4 ? 8 : 18;
  const V s = d / (d + A(2)), z = s * s;
  V p = splat(A(1.0 / (2 * kTerms - 1)));
#pragma GCC unroll 18
  for (int k = kTerms - 2; k >= 0; --k) p = fma(p, z, splat(A(1.0 / (2 * k + 1))));
  return A(2) * s * p;
}

constexpr int kFlush = 32;  // units after which the running sum moves on to double

// What the elements [i, i + n) share: pointers to element i. Their weights are contiguous.
template <class X, class T>
struct Run {
  using A = typename X::Acc;
  using V = typename X::V;
  using W = FloatIO<A>;
  const typename X::Elem* x;
  const typename T::Elem* t;
  const A* w;
  const A* v;
  typename X::Elem* grad;
  A mix_a, mix_b, scale;
  bool stream;
  Exp<A, 5> exp;

  // Losses of one unit; its gradient into `slope`.
  SOFTCE_INLINE V unit(V x, V t, V w, V v, V* slope) const {
    const V positive = fma(t, splat(mix_a), splat(mix_b)), negative = A(1) - positive;
    const V pull = v * positive;
    const V size = vmax(-x, x);
    const V d = exp.exp(-size);
    const V log = log1p_unit<A>(d);
    const V zero = V{};
    const V loss = pull * (vmax(zero, -x) + log) + negative * (vmax(zero, x) + log);
    if (grad) {
      const V large = A(1) / (d + A(1)), small = d * large;  // sigmoid of |x| and -|x|
      const V up = x >= zero ? large : small, down = x >= zero ? small : large;
      *slope = w * (negative * up - pull * down) * scale;
    }
    return w * loss;
  }

  double sum(int64_t n) const {
    double total = 0;
    V running = V{};
    int64_t i = 0;
    const V one = splat(A(1));
    const bool past = stream && reinterpret_cast<uintptr_t>(grad) % kVecBytes == 0;
    for (int held = 0; i + X::kUnit <= n; i += X::kUnit) {
      V a, b, slope;
      X::read(x + i, &a);
      T::read(t + i, &b);
      running += unit(a, b, w ? load<V>(w + i) : one, v ? load<V>(v + i) : one, &slope);
      if (grad) past ? X::write_stream(grad + i, &slope) : X::write(grad + i, &slope);
      if (++held == kFlush) {
        total += sum_of<A>(running);
        running = V{};
        held = 0;
      }
    }
    total += sum_of<A>(running);
    if (i < n) {
      V a, b, c = one, e = one, slope;
      read_part<X>(x + i, n - i, &a, A(0));
      read_part<T>(t + i, n - i, &b, A(0));
      if (w) read_part<W>(w + i, n - i, &c, A(0));
      if (v) read_part<W>(v + i, n - i, &e, A(0));
      const V loss = unit(a, b, c, e, &slope);
      if (grad) write_part<X>(grad + i, n - i, &slope);
      A lanes[kLanes<A>];
      store(lanes, loss);
      for (int64_t k = 0; k < n - i; ++k) total += lanes[k];
    }
    return total;
  }
};

template <class X, class T>
double piece(const BinaryCall& call, int64_t begin, int64_t end) {
  using A = typename X::Acc;
  double total = 0;
  while (begin < end) {
    int64_t n = end - begin;
    const auto at = [&](const void* weights, int64_t length) -> const A* {
      if (!weights) return nullptr;
      const int64_t offset = begin % length;
      if (length - offset < n) n = length - offset;
      return static_cast<const A*>(weights) + offset;
    };
    const A* w = at(call.weight, call.weight_length);
    const A* v = at(call.pos_weight, call.pos_weight_length);
    auto* grad = static_cast<typename X::Elem*>(call.grad);
    const Run<X, T> run{static_cast<const typename X::Elem*>(call.input) + begin,
                        static_cast<const typename T::Elem*>(call.target) + begin,
                        w,
                        v,
                        grad ? grad + begin : nullptr,
                        A(call.mix_a),
                        A(call.mix_b),
                        A(call.scale),
                        call.stream,
                        Exp<A, 5>(1.0, Ref{})};
    total += run.sum(n);
    begin += n;
  }
  if (call.stream) stream_end();
  return total;
}

}  // namespace
}  // namespace softce::SOFTCE_ISA

double softce::cpu::SOFTCE_RUN(const BinaryCall& call, int64_t begin, int64_t end) {
  using namespace softce::SOFTCE_ISA;
  double total = 0;
  with_io(call.dtype, [&](auto io) {
    using X = decltype(io);
    total = call.target_is_acc ? piece<X, FloatIO<typename X::Acc>>(call, begin, end) : piece<X, X>(call, begin, end);
  });
  return total;
}
