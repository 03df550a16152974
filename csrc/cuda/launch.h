// SPDX-License-Identifier: BSD-3-Clause
// What the operators (ops.cpp) call: plain C++, no torch and no CUDA headers. csrc/softce.h has the problem's meaning.
// Everything is asynchronous on the given stream of the current device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "plan.h"
#include "softce.h"

namespace softce::cuda {

// Outputs and reduction of a fused call.
struct Fused {
  const float* row_weight = nullptr;  // (R,) or null
  bool mean = true;
  float* loss = nullptr;    // 1 element
  void* out = nullptr;      // gradient, element type of the logits; may be the logits' memory
  int64_t out_stride = 0;   // elements between its rows
  void* scratch = nullptr;  // fused_scratch_bytes(R), 16-byte aligned
};

size_t fused_scratch_bytes(int64_t rows);

// Why these kernels cannot run on a device, or "". Reads the device's facts once and keeps them.
std::string device_reason(int device);

// How rows would be laid out on a device: "mode cluster warps shared-bytes". For tables and tests.
std::string describe_plan(const RowShape&, int device);

// stats: float32 (kStats, R). Both return what went wrong, or "".
std::string launch_row_stats(const Problem&, float* stats, int device, void* stream);
std::string launch_row_fused(const Problem&, const Fused&, float* stats, int device, void* stream);

}  // namespace softce::cuda
