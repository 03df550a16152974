// SPDX-License-Identifier: BSD-3-Clause
// The contract between the operators (ops.cpp) and the kernels of every backend: plain C++, no torch.
//
// A row of logits x (C classes):  y = softcap(x) / temperature,  lse = logsumexp(y),  p = exp(y - lse).
// Its target is an effective weight q over the classes with mass Q = sum(q):
//     t   what the caller gave: K sparse entries over a per-row rest, or C dense values
//     t'  = mix_a * t + mix_b                       (label smoothing)
//     q_c = w_c * t'_c                              (class weights, 1 where absent)
// Row loss      l = Q * lse - sum(q * y) + z_loss * lse^2,       0 * (-inf) counts as 0
// Row transform L = phi(l)
#pragma once
#include <cstdint>

namespace softce {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// What the values of `dense` are.
enum class DenseKind : int { probs = 0, logits = 1 };

// Row transforms; p0 and p1 are their parameters. `softce/row_losses.py` has the formulas.
enum class Phi : int { identity = 0, focal = 1, label_relaxation = 2, generalized = 3, poly1 = 4 };

enum class Reduction : int { mean = 1, sum = 2 };

// The scalars of a call. They cross the operator boundary as one float list, in this order
// (`softce/ops.py: Spec` is the other half, and a test compares the two through softce_spec_fields()).
struct Spec {
  double mix_a = 1.0;
  double mix_b = 0.0;
  double temperature = 1.0;
  double softcap = 0.0;  // 0: none; else y0 = softcap * tanh(x / softcap)
  double z_loss = 0.0;
  double phi = 0.0;  // Phi
  double phi_p0 = 0.0;
  double phi_p1 = 0.0;
  double dense_kind = 0.0;         // DenseKind
  double dense_temperature = 1.0;  // teacher probabilities are softmax(dense / dense_temperature)
  double scale = 1.0;              // multiplies the reduced loss and its gradient (row_fused only)
  double empty_zero = 0.0;         // 1: the mean over no counted row is 0 instead of nan (row_fused only)
};

// Logits or dense targets as a strided block: element (b, c, s) lies at
// data + b * batch_stride + c * class_stride + s.  Row r = b * inner + s.
//   inner == 1 and class_stride == 1:   "rows", (batch, C) with any batch_stride
//   otherwise:                          "planes", (batch, C, inner), the inner stride is 1
struct Block {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0;
  int64_t class_stride = 1;
};

// acc is the statistics type: float64 for float64 logits, else float32. rows R = batch * inner.
struct Target {
  const int64_t* index = nullptr;  // (R, K) class of each sparse entry, or null for a dense target
  const void* value = nullptr;     // acc (R, K) weight of each entry, null: 1.  Duplicates add up.
  const void* rest = nullptr;      // acc (R,) what every class has besides the entries, null: 0
  int64_t entries = 0;             // K
  int64_t ignore_index = -100;     // entries with this class are padding; a row of padding alone is ignored
  Block dense;                     // same shape as the logits; dtype as the logits, or the acc dtype
  const void* weight = nullptr;    // acc (C,) class weights, null: 1
};

// Statistics rows of the (kStats or kStatsExtra, R) acc output.
enum StatsRow : int {
  kLoss = 0,   // l before phi; 0 where ignored
  kLse = 1,    // lse; 0 where ignored
  kMass = 2,   // Q; 0 where ignored
  kCount = 3,  // what the row adds to the mean's denominator: w[y] for plain class indices (K = 1,
               // no value), 1 for every other target, 0 where ignored
  kStats = 4,
  kTargetLogp = 4,  // sum_c t_c * (y_c - lse), without weights and smoothing; 0 where ignored
  kEntropy = 5,     // -sum_c p_c * log p_c; 0 where ignored
  kCorrect = 6,     // 1 if the first argmax of y is the target's first argmax, else 0
  kStatsExtra = 7,
};

struct Problem {
  Block logits;
  int64_t batch = 0, classes = 0, inner = 1;
  Target target;
  Spec spec;
};

// Runs body(begin, end, ctx) over [0, n) on the caller's threads.
using ParallelFor = void (*)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* ctx);

// First row whose index is out of [0, C) and not ignore_index is reported here.
struct BadIndex {
  int64_t row = -1;
  int64_t value = 0;
};

// Every launch checks the indices before it touches memory with them, and returns false with `bad` filled
// when one is out of range: nothing has been written then.

// stats: acc (kStats or kStatsExtra, R).
bool launch_row_stats(const Problem&, bool extras, void* stats, ParallelFor, BadIndex* bad);

// dlogits_i = (p_i * (A + B * y_i) - D * q_i) * dy_i/dx_i with per-row acc coefficients
// coef (coef_rows, R): row 0 is A, row 1 is D, row 2 (if coef_rows == 3) is B; lse: acc (R,).
// A row whose coefficients are all 0 gets an exact 0, whatever its logits hold.
// `out` may be the logits' own memory.
bool launch_row_grad(const Problem&, const void* lse, const void* coef, int coef_rows, const Block& out, ParallelFor,
                     BadIndex* bad);

// Both in one pass: the row is read once from memory and its gradient written once.
//   loss (acc, 1 element) = scale * sum_r row_weight_r * phi(l_r) / denom
//   denom = sum_r row_weight_r * count_r for mean, 1 for sum
//   dlogits = d loss / d logits; `out` may be the logits' own memory.
//   stats: null where nobody wants them
// Deterministic: the sums over rows run in row order in double, whatever the number of threads.
bool launch_row_fused(const Problem&, const void* row_weight, Reduction, bool extras, void* loss, void* stats,
                      const Block& out, ParallelFor, BadIndex* bad);

// Instruction sets: "avx512_bf16", "avx512", "avx2", "neon"/"baseline". isa_report() lists those built, best first.
const char* isa_chosen();
bool isa_choose(const char* name);  // false if it was not built or this CPU lacks it
const char* isa_report();           // one "name: usable" or "name: why not" line each, '\n' between

}  // namespace softce
