// SPDX-License-Identifier: BSD-3-Clause
// The row kernel: statistics of every row and, if asked for, its gradient. One block, or one cluster of blocks, a row;
// one slice a warp; blocks take rows in turn until there are none left.
//
//     stage    the slice into shared memory (resident only; begun as soon as the previous row's slice is done with)
//     sweep    the slice: sums of one lane -> warp -> block -> cluster, each in a fixed order
//     finish   the row's scalars, by every thread alike
//     emit     the slice's gradient
//
// Traffic: one read of logits and dense target, one write of the gradient; `twice` reads both again.
#pragma once
#include "by_class.cuh"
#include "launch.h"
#include "plan.h"
#include "stage.cuh"

namespace softce::cuda {

// A call as the kernel sees it. Strides in elements, between rows.
struct RowParams {
  const void* logits;
  const void* dense;
  void* out;
  int64_t logits_stride, dense_stride, out_stride;
  const int64_t* index;
  const float *value, *rest, *weight, *row_weight;
  float* stats;          // (kStats, rows)
  float* row_loss;       // (rows): row_weight * phi(l), fused only
  const double* counts;  // (count_parts): their sum is the mean's denominator; null: `scale` is final
  int count_parts;
  bool empty_zero;
  double scale;
  int64_t rows, ignore_index;
  int classes, entries;
  int units, x_bytes, t_bytes;  // of a slice, as planned
  RowScalars scalars;
};

// The fixed part of a block's shared memory. Everything in twos is used by rows in turn, so that one barrier a row is
// enough: a thread can only be one row ahead of another.
template <TargetKind K>
struct Fixed {
  uint64_t arrived[kMaxWarps];
  Acc<K> warp_sum[2][kMaxWarps];
  Acc<K> block_sum[2][kLargestCluster];
  Entry entries[1];  // 2 * RowParams::entries
};
static_assert(offsetof(Fixed<TargetKind::teacher>, entries) == kFixedShared, "plan.h reserves it");

// scale / denominator, from the partial counts in their order.
__device__ __forceinline__ double reduced_scale(double scale, const double* counts, int parts, bool empty_zero,
                                                int lane) {
  if (!counts) return scale;
  double total = 0.0;
  for (int part = lane; part < parts; part += kLanes) total += counts[part];
  total = warp_join(total, [](double a, double b) { return a + b; });
  return total == 0.0 && empty_zero ? 0.0 : scale / total;
}

template <class T>
__device__ __forceinline__ Entry read_entry(const RowParams& p, int64_t row, int k, int64_t c) {
  if (c == p.ignore_index) return entry_without_class(true);
  if (c < 0 || c >= p.classes) return entry_without_class(false);
  Entry entry;
  entry.index = static_cast<int>(c);
  entry.z = capped(to_float(static_cast<const T*>(p.logits)[row * p.logits_stride + c]), p.scalars);
  entry.w = p.weight ? p.weight[c] : 1.0f;
  entry.q = entry.w * p.scalars.mix_a * (p.value ? p.value[row * p.entries + k] : 1.0f);
  return entry;
}

__device__ __forceinline__ EntrySums sum_entries(const Entry* entries, int count, float m, int lane) {
  EntrySums sums;
  if (count == 1) {
    add_entry(sums, entries[0], m);
    return sums;
  }
  for (int k = lane; k < count; k += kLanes) add_entry(sums, entries[k], m);
  return warp_join(sums, [](const EntrySums& a, const EntrySums& b) {
    EntrySums sum;
    sum.q = a.q + b.q, sum.c = a.c + b.c, sum.valid = a.valid + b.valid;
    return sum;
  });
}

// What a kernel may ask of the registers without a spill: a dense target wider than the logits, or a teacher, takes
// more.
template <class T, class D, TargetKind K, RowMode M>
struct Tuning {
  static constexpr bool kResident = M == RowMode::resident;
  static constexpr bool kLight = K == TargetKind::sparse || (K == TargetKind::probs && sizeof(D) == sizeof(T));
  static constexpr int kBlocksAtOnce = kResident && K == TargetKind::sparse ? 3 : 2;  // on a multiprocessor
  static constexpr int kBatch = kResident || !kLight ? 2 : 4;  // units that a lane loads before it uses the first
};

template <class T, class D, TargetKind K, RowMode M>
__global__ void __launch_bounds__(kMaxWarps* kLanes, Tuning<T, D, K, M>::kBlocksAtOnce)
    row_kernel(const __grid_constant__ RowParams p) {
  constexpr bool kExact = sizeof(T) == 4;
  constexpr bool kResident = M == RowMode::resident;
  constexpr int kBatch = Tuning<T, D, K, M>::kBatch;
  unsigned char* const memory = dynamic_shared();
  Fixed<K>& fixed = *reinterpret_cast<Fixed<K>*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  const int rank = cluster_rank(), size = cluster_size();
  const int slice_number = rank * warps + warp, slices = size * warps;
  const int64_t step = gridDim.x / size;
  const auto join = [&p](const Acc<K>& a, const Acc<K>& b) { return merged<K, kExact>(a, b, p.scalars); };
  const auto of_row = [&](Acc<K> acc, int turn) {  // the sums of all lanes
    acc = warp_join(acc, join);
    if (lane == 0) fixed.warp_sum[turn][warp] = acc;
    __syncthreads();
    acc = warp_join(lane < warps ? fixed.warp_sum[turn][lane] : Acc<K>(), join);
    if (size > 1) {
      if (warp == 0 && lane < size) store_to_rank(&fixed.block_sum[turn][rank], lane, acc);
      cluster_sync();
      acc = warp_join(lane < size ? fixed.block_sum[turn][lane] : Acc<K>(), join);
    }
    return acc;
  };

  RowInputs inputs = {p.scalars.mix_b, 1.0f, 0.0, K == TargetKind::sparse && p.entries == 1 && !p.value};
  if constexpr (M != RowMode::stats) inputs.scale = reduced_scale(p.scale, p.counts, p.count_parts, p.empty_zero, lane);

  unsigned char* const slices_at = memory + fixed_shared(p.entries);
  unsigned char* const x_memory = slices_at + warp * (p.x_bytes + p.t_bytes);
  unsigned char* const t_memory = x_memory + p.x_bytes;
  SliceStaging<T, D, K> staging;
  Slice<T, D> slice = {};
  const auto locate = [&](int64_t row) {  // the slice of `row` in device memory
    const T* const x = static_cast<const T*>(p.logits) + row * p.logits_stride;
    const Range range = slice_range(x, p.classes, p.units, slice_number, slices);
    slice.begin = range.begin;
    slice.length = range.end - range.begin;
    slice.x = x + range.begin;
    if constexpr (K != TargetKind::sparse)
      slice.t = static_cast<const D*>(p.dense) + row * p.dense_stride + range.begin;
    if (p.weight) slice.w = p.weight + range.begin;
    if constexpr (M != RowMode::stats) slice.out = static_cast<T*>(p.out) + row * p.out_stride + range.begin;
  };
  const auto stage = [&](int64_t row) {
    locate(row);
    staging.start(x_memory, t_memory, slice, lane, &fixed.arrived[warp]);
  };

  int64_t row = blockIdx.x / size;
  Entry entry = {};
  if (K == TargetKind::sparse && row < p.rows && thread < p.entries)
    entry = read_entry<T>(p, row, thread, p.index[row * p.entries + thread]);
  if constexpr (kResident) {
    staging.prepare(&fixed.arrived[warp], lane);
    if (row < p.rows) stage(row);
  }
  if (size > 1) cluster_sync();  // no block writes into one that has not started

  for (int turn = 0; row < p.rows; row += step, turn ^= 1) {
    Entry* const entries = fixed.entries + turn * p.entries;
    const bool more = row + step < p.rows;
    int64_t next_class = 0;
    if constexpr (K == TargetKind::sparse) {
      if (thread < p.entries) {
        entries[thread] = entry;
        if (more) next_class = p.index[(row + step) * p.entries + thread];
      }
      if (p.rest) inputs.uniform = fmaf(p.scalars.mix_a, p.rest[row], p.scalars.mix_b);
    }
    if (p.row_weight) inputs.row_weight = p.row_weight[row];

    if constexpr (kResident) {
      staging.finish(slice, &fixed.arrived[warp], turn);
    } else {
      locate(row);
    }
    Acc<K> acc;
    sweep<T, D, K, kBatch>(slice, lane, p.scalars, inputs.uniform != 0.0f, acc);
    acc = of_row(acc, turn);

    EntrySums sums;
    if constexpr (K == TargetKind::sparse) sums = sum_entries(entries, p.entries, acc.m, lane);
    const Entry first = K == TargetKind::sparse ? entries[0] : Entry{};
    RowResult result = finish_row<K>(acc, sums, first, inputs, p.scalars);
    if constexpr (K != TargetKind::probs) {
      if (signs_met(result)) {  // for every thread of the row alike
        Acc<K> part;
        part.c = dot_by_class<T, D, K>(slice, lane, entries, p.entries, inputs.uniform, acc, p.scalars);
        size > 1 ? cluster_sync() : __syncthreads();  // the sums before have been read
        const float dot = of_row(part, turn).c;
        result = finish_row<K>(acc, sums, first, inputs, p.scalars, &dot);
      }
    }
    if (rank == 0 && thread == 0) {
      p.stats[kLoss * p.rows + row] = result.loss;
      p.stats[kLse * p.rows + row] = result.lse;
      p.stats[kMass * p.rows + row] = result.mass;
      p.stats[kCount * p.rows + row] = result.count;
      if constexpr (M != RowMode::stats) p.row_loss[row] = result.weighted_loss;
    }
    // Of another row than the one being written, so that in place it is still a logit.
    if (K == TargetKind::sparse && more && thread < p.entries) entry = read_entry<T>(p, row + step, thread, next_class);

    if constexpr (M != RowMode::stats) {
      emit<T, D, K, kBatch>(slice, lane, p.scalars, result);
      if constexpr (K == TargetKind::sparse) {
        __syncwarp();  // the entries' gradients are written over what emit wrote there
        emit_entries(slice, entries, p.entries, lane, p.scalars, result);
      }
    }
    if constexpr (kResident) {
      staging.release();
      if (more) stage(row + step);
    }
  }
  if (size > 1) cluster_sync();  // no block ends while another may write into it
}

}  // namespace softce::cuda
