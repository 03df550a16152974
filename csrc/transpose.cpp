// SPDX-License-Identifier: BSD-3-Clause
// softce::transpose_: a float32 matrix turned over into memory that exists, for products that want its columns as rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "tensors.h"

namespace softce {
namespace {

constexpr int64_t kColumns = 64;  // four lines of a row at a time: what is read lies far apart
constexpr int64_t kRows = 16;     // and fills a line of every row that is written

struct Job {
  const float* from;
  float* to;
  int64_t rows, columns, stride;
};

void columns(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  float part[kRows][kColumns];  // a power of two between the rows would have their lines evict each other
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kColumns, count = std::min(kColumns, job.columns - first);
    for (int64_t low = 0; low < job.rows; low += kRows) {
      const int64_t high = std::min(low + kRows, job.rows);
      for (int64_t r = low; r < high; ++r) std::copy_n(job.from + r * job.stride + first, count, part[r - low]);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t r = low; r < high; ++r) job.to[(first + c) * job.rows + r] = part[r - low][c];
    }
  }
}

void transpose_(const Tensor& x, const Tensor& out) {
  const View from = view_of(x, "x"), to = view_of(out, "out", true);
  check_dtype(from, aoti_torch_dtype_float32());
  if (from.dim != 2 || (from.sizes[1] > 1 && from.strides[1] != 1))
    fail("x must be a matrix with stride 1 in the last dimension, got shape ", from.shape());
  check_packed(to, aoti_torch_dtype_float32(), {from.sizes[1], from.sizes[0]});
  if (from.empty()) return;
  if (from.overlaps(to)) fail("out must not share memory with x");
  Job job{static_cast<const float*>(from.data), static_cast<float*>(to.data), from.sizes[0], from.sizes[1],
          from.strides[0]};
  const int64_t blocks = (job.columns + kColumns - 1) / kColumns;
  parallel_for(blocks, (int64_t{1} << 15) / (job.rows * kColumns), columns, &job);
}

}  // namespace
}  // namespace softce

STABLE_TORCH_LIBRARY_IMPL(softce, CPU, m) { m.impl("transpose_", TORCH_BOX(&softce::transpose_)); }
