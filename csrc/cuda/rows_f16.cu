// SPDX-License-Identifier: BSD-3-Clause
// The row kernels for f16 logits.
#include "dispatch.cuh"

namespace softce::cuda {

template std::string launch_rows<f16>(RowParams, TargetKind, DType, const RowShape&, const Device&, cudaStream_t);

}  // namespace softce::cuda
