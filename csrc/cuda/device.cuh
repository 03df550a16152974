// SPDX-License-Identifier: BSD-3-Clause
// A device, and the launches of the row kernels by element type (dispatch.cuh defines them).
#pragma once
#include <string>

#include "row_kernel.cuh"

namespace softce::cuda {

struct Device {
  DeviceFacts facts;
  int number = 0;
  std::string reason;  // why not, or ""
};
const Device& device_of(int number);
std::string error_text(cudaError_t error, const char* what);

// `target_kind` and `dense` (dtype of a dense target) choose among the kernels for logits of type T.
template <class T>
std::string launch_rows(RowParams params, TargetKind target_kind, DType dense, const RowShape& shape,
                        const Device& device, cudaStream_t stream);

}  // namespace softce::cuda
