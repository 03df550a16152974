// SPDX-License-Identifier: BSD-3-Clause
// Binary cross-entropy with logits, element by element: the sum of the losses and, in the same pass, the gradient.
// x, t and, where given, the weights w and v (the positive part's) are read once and the gradient is written once.
//
//   t' = mix_a * t + mix_b
//   l  = w * (v * t' * softplus(-x) + (1 - t') * softplus(x))
//   dl/dx = w * ((1 - t') * sigmoid(x) - v * t' * sigmoid(-x))
//
// With d = e^-|x|: softplus(x) = max(x, 0) + log1p(d), and sigmoid(|x|) = 1 / (1 + d), sigmoid(-|x|) = d / (1 + d), so
// that one exponential serves them all and neither end cancels.
#pragma once
#include <cstdint>

#include "../softce.h"

namespace softce::cpu {

struct BinaryCall {
  const void* input = nullptr;   // n elements of dtype
  const void* target = nullptr;  // n elements of dtype, or of the accumulation type if target_is_acc
  const void* weight = nullptr;  // acc, repeats every weight_length elements; null: 1
  const void* pos_weight = nullptr;
  int64_t weight_length = 0, pos_weight_length = 0;
  void* grad = nullptr;  // n elements of dtype; null: not wanted
  DType dtype = DType::f32;
  bool target_is_acc = false;
  bool stream = false;  // write the gradient past the caches
  int64_t n = 0;
  double mix_a = 1, mix_b = 0;
  double scale = 1;  // of the gradient
};

constexpr int64_t kBinaryPiece = 1 << 14;  // elements of a task, whatever the number of threads

// Adds up the losses of elements [begin, end), a piece, and writes their gradient.
using BinaryPiece = double (*)(const BinaryCall&, int64_t begin, int64_t end);
double binary_avx2(const BinaryCall&, int64_t begin, int64_t end);
double binary_avx512(const BinaryCall&, int64_t begin, int64_t end);
double binary_baseline(const BinaryCall&, int64_t begin, int64_t end);

}  // namespace softce::cpu
