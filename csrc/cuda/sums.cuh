// SPDX-License-Identifier: BSD-3-Clause
// The kernels before and after the row kernel: the mean's denominator and the loss. Sums run in double, in an order
// that depends on the number of rows alone.
#pragma once
#include "row_kernel.cuh"

namespace softce::cuda {
namespace {

constexpr int kSumThreads = 512;
constexpr int kMostParts = 128;
constexpr int64_t kRowsPerPart = 8192;

inline int parts_of(int64_t rows) {
  const int64_t parts = (rows + kRowsPerPart - 1) / kRowsPerPart;
  return static_cast<int>(parts < 1 ? 1 : (parts > kMostParts ? kMostParts : parts));
}

// What a row adds to the mean's denominator: csrc/softce.h, kCount.
__device__ inline double row_count(const RowParams& p, int64_t row) {
  double count = 1.0;
  if (p.index) {
    const int64_t* const entries = p.index + row * p.entries;
    bool valid = false;
    for (int k = 0; k < p.entries; ++k) valid = valid || entries[k] != p.ignore_index;
    if (!valid) return 0.0;
    if (p.entries == 1 && !p.value && p.weight)
      count = entries[0] >= 0 && entries[0] < p.classes ? p.weight[entries[0]] : nan("");
  }
  return p.row_weight ? count * p.row_weight[row] : count;
}

template <class Term>
__device__ double block_sum(int64_t rows, Term term) {
  __shared__ double partial[kSumThreads / kLanes];
  double sum = 0.0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.x)
    sum += term(row);
  const auto plus = [](double a, double b) { return a + b; };
  sum = warp_join(sum, plus);
  if (threadIdx.x % kLanes == 0) partial[threadIdx.x / kLanes] = sum;
  __syncthreads();
  const int lane = threadIdx.x % kLanes;
  return warp_join(lane < kSumThreads / kLanes ? partial[lane] : 0.0, plus);
}

__global__ void __launch_bounds__(kSumThreads) count_rows(const __grid_constant__ RowParams p, double* parts) {
  const double sum = block_sum(p.rows, [&p](int64_t row) { return row_count(p, row); });
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads) sum_losses(const float* row_loss, int64_t rows, double* parts) {
  const double sum = block_sum(rows, [row_loss](int64_t row) { return static_cast<double>(row_loss[row]); });
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kLanes) finish_loss(const double* losses, int loss_parts, const double* counts,
                                                      int count_parts, double scale, bool empty_zero, float* loss) {
  const int lane = threadIdx.x;
  const double factor = reduced_scale(scale, counts, count_parts, empty_zero, lane);
  double sum = 0.0;
  for (int part = lane; part < loss_parts; part += kLanes) sum += losses[part];
  sum = warp_join(sum, [](double a, double b) { return a + b; });
  // Nothing to divide by and nothing to say: 0, even where the sum is no number.
  if (lane == 0) *loss = static_cast<float>(factor == 0.0 && empty_zero && counts ? 0.0 : sum * factor);
}

}  // namespace
}  // namespace softce::cuda
