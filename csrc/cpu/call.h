// SPDX-License-Identifier: BSD-3-Clause
// What passes between dispatch.cpp (plain flags) and the kernels (one translation unit per instruction set).
//
// Plain data and function declarations only: an inline function or a standard template here would be compiled with
// several instruction sets under one name, and the linker might keep the one that this CPU cannot run. Everything
// else that the kernels use lives in a namespace of their instruction set (kernels.h).
#pragma once
#include <cstddef>
#include <cstdint>

#include "../softce.h"

namespace softce::cpu {

enum class Op : int { stats, grad, fused };

struct Call {
  const Problem* problem = nullptr;
  Op op = Op::stats;
  bool extras = false;
  void* stats = nullptr;       // acc (kStats or kStatsExtra, R), null: not wanted
  const void* lse = nullptr;   // acc (R,), grad only
  const void* coef = nullptr;  // acc (coef_rows, R), grad only
  int coef_rows = 0;
  Block out;                         // grad and fused
  bool large = false;                // `out` is too large for the caches; by its shape alone
  bool stream = false;               // write `out` past the caches
  const void* row_weight = nullptr;  // acc (R,), fused only, null: 1
  double factor = 1.0;               // fused: scale / denom
  ParallelFor parallel = nullptr;
};

// What one instruction set offers.
struct Kernels {
  // Runs the call; returns, for fused, the sum over rows of row_weight * phi(l), added in an order that depends on
  // shapes alone.
  double (*run)(const Call&);
  // How many of n indices are not ignored; -1 where one is neither that nor a class.
  int64_t (*count)(const int64_t* index, int64_t n, int64_t ignore_index, int64_t classes);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif

// Scratch of the calling thread, 64-byte aligned, kept for its next call; throws std::bad_alloc. `slot` names one of
// kSlots independent buffers.
constexpr int kSlots = 2;
void* scratch(int slot, size_t bytes);

}  // namespace softce::cpu
