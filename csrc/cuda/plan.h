// SPDX-License-Identifier: BSD-3-Clause
// How a row is spread over a device: plain arithmetic on sizes, so that a CPU can check it for every shape.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace softce::cuda {

constexpr int kMaxWarps = 8;
constexpr int kMaxEntries = 256;            // one thread of a block an entry
constexpr int64_t kMaxClasses = 1LL << 30;  // positions within a row are 32-bit, offsets of rows 64-bit
constexpr int kPortableCluster = 8, kLargestCluster = 16;

// What the plan needs to know of a device.
struct DeviceFacts {
  int multiprocessors = 0;
  int shared_per_block = 0;  // largest dynamic shared memory of a block, opted in
  int shared_per_multiprocessor = 0;
  int shared_reserved = 0;  // of each block, by the driver
  bool clusters = false;    // bulk copies, clusters and distributed shared memory: compute capability 9 on
};

// stats: one read, no gradient.  resident: the row stays in shared memory between its two sweeps.
// twice: it does not fit and is read again for the gradient.
enum class RowMode : int { stats = 0, resident = 1, twice = 2 };

struct RowShape {
  int64_t rows = 0, classes = 0;
  int entries = 0;      // of a sparse target, 0 if dense
  int logit_bytes = 4;  // of one element
  int dense_bytes = 0;  // of one element, 0 if sparse
  bool fused = false;
};

struct Plan {
  RowMode mode = RowMode::stats;
  int cluster = 1;               // blocks a row
  int warps = 1;                 // a block
  int units = 0;                 // 16-byte units of logits a slice, one slice a warp
  int x_bytes = 0, t_bytes = 0;  // shared memory of a slice: logits, dense target
  int shared = 0;                // dynamic shared memory of a block
};

// Fixed part of a block's shared memory, ahead of the slices: barriers, partial sums, entries (row_kernel.cuh).
constexpr int kFixedShared = 8 * kMaxWarps + 2 * 32 * (kMaxWarps + kLargestCluster);
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int fixed_shared(int entries) {
  return (kFixedShared + 2 * entries * 16 + 127) / 128 * 128;
}

inline int64_t staged_length(int64_t elements, int64_t element_bytes) {
  return (elements * element_bytes + 31) / 16 * 16;
}

// Warps of a block: about eight units a lane keep loads in flight, and the entries of a sparse target want a thread
// each.
inline int warps_for(const RowShape& shape, int cluster) {
  const int64_t row_units = shape.classes * shape.logit_bytes / 16;
  const int64_t wanted = (row_units / cluster + 255) / 256, least = (shape.entries + 31) / 32;
  const int64_t warps = wanted > least ? wanted : least;
  return static_cast<int>(warps < 1 ? 1 : (warps > kMaxWarps ? kMaxWarps : warps));
}

// The plan with a given number of blocks a row and warps a block.
inline Plan plan_with(const RowShape& shape, RowMode mode, int cluster, int warps) {
  Plan plan;
  plan.mode = mode;
  plan.cluster = cluster;
  plan.warps = warps;
  const int per_unit = 16 / shape.logit_bytes;
  const int64_t slices = static_cast<int64_t>(warps) * cluster;
  const int64_t units = (shape.classes / per_unit + slices - 1) / slices;  // a row has no more whole units than that
  int64_t shared = fixed_shared(shape.entries);
  plan.units = static_cast<int>(units);
  if (mode == RowMode::resident) {
    constexpr int64_t kTooMuch = 1 << 30;                        // far beyond any device, and still an int
    const int64_t most = units * per_unit + 2 * (per_unit - 1);  // a slice's elements, the row's head and tail included
    const int64_t x_bytes = staged_length(most, shape.logit_bytes);
    const int64_t t_bytes = shape.dense_bytes ? staged_length(most, shape.dense_bytes) : 0;
    shared += warps * (x_bytes + t_bytes);
    if (shared > kTooMuch) {
      plan.shared = static_cast<int>(kTooMuch);
      return plan;
    }
    plan.x_bytes = static_cast<int>(x_bytes);
    plan.t_bytes = static_cast<int>(t_bytes);
  }
  plan.shared = static_cast<int>(shared);
  return plan;
}

// Blocks a row where nothing has to be held: more than one only while the rows alone leave multiprocessors idle and
// every block would still have work.
inline int spread(const RowShape& shape, const DeviceFacts& device) {
  int cluster = 1;
  const int64_t row_bytes = shape.classes * (shape.logit_bytes + shape.dense_bytes);
  while (device.clusters && cluster < kPortableCluster && shape.rows * cluster < device.multiprocessors &&
         row_bytes / cluster >= 65536)
    cluster *= 2;
  return cluster;
}

// A row stays on chip if some cluster holds it: the smallest with two blocks a multiprocessor, so that one block loads
// while the other stores; else the smallest with one. `largest` is the largest cluster that may be asked for.
inline Plan make_plan(const RowShape& shape, const DeviceFacts& device, int largest) {
  const int least = spread(shape, device);
  if (!shape.fused) return plan_with(shape, RowMode::stats, least, warps_for(shape, least));
  const int most = device.clusters ? largest : 1;
  const int half = device.shared_per_multiprocessor / 2 - device.shared_reserved;
  const int two_blocks = half < device.shared_per_block ? half : device.shared_per_block;
  for (const int limit : {two_blocks, device.shared_per_block}) {
    for (int cluster = least; cluster <= most; cluster *= 2) {
      if (cluster > kPortableCluster && limit == two_blocks) break;
      const Plan plan = plan_with(shape, RowMode::resident, cluster, warps_for(shape, cluster));
      if (plan.shared <= limit) return plan;
    }
  }
  return plan_with(shape, RowMode::twice, least, warps_for(shape, least));
}

}  // namespace softce::cuda
