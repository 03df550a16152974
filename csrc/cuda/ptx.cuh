// SPDX-License-Identifier: BSD-3-Clause
// The instructions that C++ has no words for: clusters, shuffles, asynchronous copies. emulation/on_cpu.h gives the
// same functions to a CPU, so that everything built on them can be run without a GPU.
#pragma once
#include <cstdint>

// Bulk copies, mbarriers and clusters: from compute capability 9.0 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SOFTCE_BULK 1
#else
#define SOFTCE_BULK 0
#endif

namespace softce::cuda {

// A block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t shuffle_xor(uint32_t word, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, word, lane_mask);
}

__device__ __forceinline__ uint32_t shuffle_first(uint32_t word) { return __shfl_sync(0xffffffffu, word, 0); }

#if SOFTCE_BULK
// ---- clusters ----

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// All threads of all blocks of the cluster; shared memory written before is visible after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes `word` to where `mine` lies in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void store_word_to_rank(uint32_t* mine, int rank, uint32_t word) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// ---- bulk copies, completing on an mbarrier of one arrival ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The one arrival of a phase, which ends when `bytes` have been copied.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int phase) {
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(address), "r"(phase)
                 : "memory");
  } while (!done);
}

// Both ends and the size are multiples of 16 bytes.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Orders this thread's accesses to shared memory before those of the copy engine that come after a barrier.
__device__ __forceinline__ void fence_before_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ void store_word_to_rank(uint32_t*, int, uint32_t) {}

// ---- 16-byte copies, completing for the thread that asked ----

__device__ __forceinline__ void unit_copy(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void unit_copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void unit_copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
#endif

}  // namespace softce::cuda
