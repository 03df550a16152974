// SPDX-License-Identifier: BSD-3-Clause
// What only a GPU has: asynchronous copies into shared memory, clusters, shuffles.
//
// From compute capability 9 on a warp's slice arrives by one bulk copy (cp.async.bulk) that completes on the warp's own
// mbarrier; before that, by 16-byte cp.async of every lane. Bytes outside whole 16-byte units travel through registers.
#pragma once
#include "row_slice.cuh"

namespace softce::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SOFTCE_BULK 1
#else
#define SOFTCE_BULK 0
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- clusters ----

__device__ __forceinline__ int cluster_rank() {
#if SOFTCE_BULK
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if SOFTCE_BULK
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// All threads of all blocks of the cluster; shared memory written before is visible after.
__device__ __forceinline__ void cluster_sync() {
#if SOFTCE_BULK
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Copies `value` to where `mine` lies in the shared memory of block `rank` of the cluster.
template <class V>
__device__ __forceinline__ void store_to_rank(V* mine, int rank, const V& value) {
#if SOFTCE_BULK
  static_assert(sizeof(V) % 4 == 0, "whole words");
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i)
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address + 4 * i), "r"(words[i]) : "memory");
#endif
}

// ---- shuffles ----

template <class V>
__device__ __forceinline__ V shuffled(const V& value, int lane_mask, bool broadcast) {
  static_assert(sizeof(V) % 4 == 0, "whole words");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i)
    words[i] = broadcast ? __shfl_sync(0xffffffffu, words[i], 0) : __shfl_xor_sync(0xffffffffu, words[i], lane_mask);
  V out;
  memcpy(&out, words, sizeof(V));
  return out;
}

// Joins one value a lane in a fixed order; every lane gets lane 0's result.
template <class V, class Join>
__device__ __forceinline__ V warp_join(V value, Join join) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value = join(value, shuffled(value, mask, false));
  return shuffled(value, 0, true);
}

// ---- staging of a slice ----

#if SOFTCE_BULK
__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int phase) {
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(phase)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
#else
__device__ __forceinline__ void unit_copy(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
#endif

// A slice of one array on its way into a buffer: whole units asynchronously, the edges held in a register until they
// are put beside them.
template <class T>
struct Staging {
  T* buffer;      // where the slice's first element will be
  int edge;       // this lane's element outside whole units, or -1
  T edge_value;

  // Returns the bytes that a bulk copy has been or is to be asked for by lane 0.
  __device__ __forceinline__ int plan(unsigned char* memory, const T* from, int n, int lane, Cut& cut) {
    buffer = staged(memory, from);
    cut = cut_of(from, n);
    edge = edge_element(cut, n, lane);
    if (edge >= 0) edge_value = from[edge];
    return cut.units * kUnit;
  }

  __device__ __forceinline__ void start(const T* from, const Cut& cut, int lane, uint64_t* barrier) const {
#if SOFTCE_BULK
    if (lane == 0 && cut.units > 0) bulk_copy(buffer + cut.head, from + cut.head, cut.units * kUnit, barrier);
#else
    for (int unit = lane; unit < cut.units; unit += kLanes)
      unit_copy(buffer + cut.head + unit * kPerUnit<T>, from + cut.head + unit * kPerUnit<T>);
#endif
  }

  __device__ __forceinline__ void put_edge() const {
    if (edge >= 0) buffer[edge] = edge_value;
  }
};

// Before a buffer is filled again: the warp is done reading it, and its own writes come before the copy engine's.
__device__ __forceinline__ void release_buffers() {
#if SOFTCE_BULK
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncwarp();
}

// A warp's slice of logits and dense target.
template <class T, class D, TargetKind K>
struct SliceStaging {
  Staging<T> x;
  Staging<D> t;

  __device__ __forceinline__ void start(unsigned char* x_memory, unsigned char* t_memory, const T* x_from,
                                        const D* t_from, int n, int lane, uint64_t* barrier) {
    Cut x_cut, t_cut;
    int bytes = x.plan(x_memory, x_from, n, lane, x_cut);
    if constexpr (K != TargetKind::sparse) bytes += t.plan(t_memory, t_from, n, lane, t_cut);
#if SOFTCE_BULK
    if (lane == 0) barrier_expect(barrier, bytes);
#endif
    x.start(x_from, x_cut, lane, barrier);
    if constexpr (K != TargetKind::sparse) t.start(t_from, t_cut, lane, barrier);
#if !SOFTCE_BULK
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  __device__ __forceinline__ void finish(uint64_t* barrier, int phase) const {
#if SOFTCE_BULK
    barrier_wait(barrier, phase);
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
    x.put_edge();
    if constexpr (K != TargetKind::sparse) t.put_edge();
    __syncwarp();
  }
};

}  // namespace softce::cuda
