// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels of one instruction set. A translation unit defines SOFTCE_ISA (its namespace) and
// SOFTCE_KERNELS (what dispatch.cpp finds them by) and includes this file once; setup.py gives the flags:
//   kernels_avx2.cpp         -mavx2 -mfma -mf16c
//   kernels_avx512.cpp       -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
//   kernels_avx512_bf16.cpp  the same and -mavx512bf16, where the compiler knows it
//   kernels_baseline.cpp     none
// All but the last compile to nothing where the CPU is not an x86-64. One that defines SOFTCE_BUT_BFLOAT16 has
// kernels for bfloat16 logits alone, and leaves all others to the kernels of that name.
//
// Nothing from the C++ library is used but declarations: what it inlines would have the same name in every unit.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own intrinsics, which leave an operand undefined that a full mask never reads.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "call.h"

namespace softce::SOFTCE_ISA {
using namespace softce::cpu;
namespace {
#include "vec.h"
//
#include "io.h"

#if defined(SOFTCE_BUT_BFLOAT16)
constexpr bool kBFloat16Only = true;
#else
constexpr bool kBFloat16Only = false;
#endif
// Whether this unit has kernels for logits of X that accumulate in A.
template <class X, class A>
constexpr bool kRuns = sizeof(typename X::Acc) == sizeof(A) && !kBFloat16Only;
template <>
constexpr bool kRuns<BF16, float> = true;

#include "math.h"
#include "row.h"
//
#include "generic.h"
#include "rows.h"
#include "sweeps.h"
//
#include "group.h"
#include "planes.h"
//
#include "short_write.h"
//
#include "short_rows.h"

template <class A>
double run_as(const Call& call) {
  Context<A> ctx(call);
  const bool planes = planes_take(ctx), short_rows = short_rows_take(ctx);
  ctx.coarse_exp = call.problem->logits.dtype == DType::bf16 && !planes && !short_rows && takes_fast(ctx);
  if (planes || short_rows) {
    double loss = 0;
    with_io(call.problem->logits.dtype, [&](auto io) {
      using X = decltype(io);
      if constexpr (kRuns<X, A>) loss = planes ? run_planes<X>(ctx) : run_short_rows<X>(ctx);
    });
    return loss;
  }
  const Sweeps<A> sweeps = sweeps_for(ctx);
  return Rows<A>{ctx, sweeps}.run();
}

double run(const Call& call) {
#if defined(SOFTCE_BUT_BFLOAT16)
  return call.problem->logits.dtype == DType::bf16 ? run_as<float>(call) : SOFTCE_BUT_BFLOAT16.run(call);
#else
  return call.problem->logits.dtype == DType::f64 ? run_as<double>(call) : run_as<float>(call);
#endif
}

int64_t count(const int64_t* index, int64_t n, int64_t ignore_index, int64_t classes) {
  // No branch and no place of the bad ones: vectors count three to seven times as fast as a loop that asks each.
  int64_t outside = 0, ignored = 0;
  for (int64_t r = 0; r < n; ++r) {
    outside += uint64_t(index[r]) >= uint64_t(classes);
    ignored += index[r] == ignore_index;
  }
  return outside == (uint64_t(ignore_index) >= uint64_t(classes) ? ignored : 0) ? n - ignored : -1;
}

}  // namespace
}  // namespace softce::SOFTCE_ISA

const softce::cpu::Kernels softce::cpu::SOFTCE_KERNELS = {softce::SOFTCE_ISA::run, softce::SOFTCE_ISA::count};
