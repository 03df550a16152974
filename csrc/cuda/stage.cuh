// SPDX-License-Identifier: BSD-3-Clause
// Joining over warps and clusters, and the staging of a warp's slice in shared memory: by one bulk copy that completes
// on the warp's own mbarrier (compute capability 9.0 on), else by 16-byte cp.async of every lane. Bytes outside whole
// 16-byte units travel through registers.
#pragma once
#include "row_slice.cuh"
#ifdef SOFTCE_EMULATED
#include "emulation/on_cpu.h"
#else
#include "ptx.cuh"
#endif

namespace softce::cuda {

// Copies `value` to where `mine` lies in the shared memory of block `rank` of the cluster.
template <class V>
__device__ __forceinline__ void store_to_rank(V* mine, int rank, const V& value) {
  static_assert(sizeof(V) % 4 == 0, "whole words");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  SOFTCE_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i)
    store_word_to_rank(reinterpret_cast<uint32_t*>(mine) + i, rank, words[i]);
}

// Joins one value a lane in a fixed order; every lane gets lane 0's result.
template <class V, class Join>
__device__ __forceinline__ V warp_join(V value, Join join) {
  static_assert(sizeof(V) % 4 == 0, "whole words");
  uint32_t words[sizeof(V) / 4];
  SOFTCE_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    memcpy(words, &value, sizeof(V));
    SOFTCE_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) words[i] = shuffle_xor(words[i], mask);
    V other;
    memcpy(&other, words, sizeof(V));
    value = join(value, other);
  }
  memcpy(words, &value, sizeof(V));
  SOFTCE_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) words[i] = shuffle_first(words[i]);
  memcpy(&value, words, sizeof(V));
  return value;
}

// One array's part of a slice.
template <class T>
struct Staging {
  T* buffer;  // where the slice's first element will be
  int edge;   // this lane's element outside whole units, or -1
  T edge_value;

  __device__ __forceinline__ Cut plan(unsigned char* memory, const T* from, int n, int lane) {
    const Cut cut = cut_of(from, n);
    buffer = staged(memory, from);
    edge = edge_element(cut, n, lane);
    if (edge >= 0) edge_value = from[edge];
    return cut;
  }

  __device__ __forceinline__ void start(const T* from, const Cut& cut, int lane, uint64_t* barrier) const {
#if SOFTCE_BULK
    if (lane == 0 && cut.units > 0) bulk_copy(buffer + cut.head, from + cut.head, cut.units * kUnit, barrier);
#else
    (void)barrier;
    for (int unit = lane; unit < cut.units; unit += kLanes)
      unit_copy(buffer + cut.head + unit * kPerUnit<T>, from + cut.head + unit * kPerUnit<T>);
#endif
  }

  __device__ __forceinline__ void put_edge() const {
    if (edge >= 0) buffer[edge] = edge_value;
  }
};

// A warp's slice of logits and dense target.
template <class T, class D, TargetKind K>
struct SliceStaging {
  Staging<T> x;
  Staging<D> t;

  __device__ __forceinline__ static void prepare(uint64_t* barrier, int lane) {
#if SOFTCE_BULK
    if (lane == 0) barrier_init(barrier);
    __syncwarp();
#else
    (void)barrier, (void)lane;
#endif
  }

  __device__ __forceinline__ void start(unsigned char* x_memory, unsigned char* t_memory, const Slice<T, D>& slice,
                                        int lane, uint64_t* barrier) {
    const Cut x_cut = x.plan(x_memory, slice.x, slice.length, lane);
    Cut t_cut = {};
    if constexpr (K != TargetKind::sparse) t_cut = t.plan(t_memory, slice.t, slice.length, lane);
#if SOFTCE_BULK
    if (lane == 0) barrier_expect(barrier, (x_cut.units + t_cut.units) * kUnit);
#endif
    x.start(slice.x, x_cut, lane, barrier);
    if constexpr (K != TargetKind::sparse) t.start(slice.t, t_cut, lane, barrier);
#if !SOFTCE_BULK
    unit_copies_commit();
#endif
  }

  // Waits, and points the slice at what has arrived.
  __device__ __forceinline__ void finish(Slice<T, D>& slice, uint64_t* barrier, int phase) const {
#if SOFTCE_BULK
    barrier_wait(barrier, phase);
#else
    (void)barrier, (void)phase;
    unit_copies_wait();
#endif
    x.put_edge();
    slice.x = x.buffer;
    if constexpr (K != TargetKind::sparse) {
      t.put_edge();
      slice.t = t.buffer;
    }
    __syncwarp();
  }

  // The warp is done reading, and what it wrote comes before what the next copy writes.
  __device__ __forceinline__ static void release() {
#if SOFTCE_BULK
    fence_before_bulk();
#endif
    __syncwarp();
  }
};

}  // namespace softce::cuda
