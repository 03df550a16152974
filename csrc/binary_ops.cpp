// SPDX-License-Identifier: BSD-3-Clause
// The CPU implementation of softce::binary_fused (schema: softce/binary.py).
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/binary.h"
#include "tensors.h"

namespace softce {
namespace {

constexpr int64_t kStreamBytes = int64_t{8} << 20;  // gradients that no cache will hold are written past it

// The instruction set that the row kernels run on.
cpu::BinaryPiece chosen_piece() {
#if defined(__x86_64__)
  if (std::strncmp(isa_chosen(), "avx512", 6) == 0) return cpu::binary_avx512;
  if (std::strcmp(isa_chosen(), "avx2") == 0) return cpu::binary_avx2;
#endif
  return cpu::binary_baseline;
}

DType dtype_of(const View& view) {
  if (view.dtype == aoti_torch_dtype_float32()) return DType::f32;
  if (view.dtype == aoti_torch_dtype_float64()) return DType::f64;
  if (view.dtype == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (view.dtype == aoti_torch_dtype_float16()) return DType::f16;
  fail(view.name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(view.dtype));
}

const void* weights_of(const OptionalTensor& tensor, const char* name, int32_t acc, int64_t* length) {
  if (!tensor) return nullptr;
  const View view = view_of(*tensor, name);
  if (view.dim != 1 || view.sizes[0] < 1) fail(name, " must be (L,) with L > 0, got ", view.shape());
  *length = view.sizes[0];
  check_packed(view, acc, {*length});
  return view.data;
}

struct Job {
  const cpu::BinaryCall& call;
  cpu::BinaryPiece run;
  std::vector<double> sums;
};

void run_pieces(int64_t from, int64_t to, void* context) {
  Job& job = *static_cast<Job*>(context);
  for (int64_t i = from; i < to; ++i) {
    const int64_t begin = i * cpu::kBinaryPiece, end = begin + cpu::kBinaryPiece;
    job.sums[static_cast<size_t>(i)] = job.run(job.call, begin, end < job.call.n ? end : job.call.n);
  }
}

std::tuple<Tensor, Tensor> binary_fused(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                        const OptionalTensor& pos_weight, const std::vector<double>& mix, double scale,
                                        bool gradient) {
  const View x = view_of(input, "input"), t = view_of(target, "target");
  if (x.dim != 1) fail("input must be flat, (n,), got ", x.shape());
  if (mix.size() != 2) fail("mix must hold two values, got ", mix.size());
  cpu::BinaryCall call;
  call.dtype = dtype_of(x);
  call.n = x.sizes[0];
  const int32_t acc = call.dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  check_packed(x, x.dtype, {call.n});
  check_packed(t, t.dtype == acc ? acc : x.dtype, {call.n});
  call.target_is_acc = t.dtype == acc && acc != x.dtype;
  call.input = x.data;
  call.target = t.data;
  call.weight = weights_of(weight, "weight", acc, &call.weight_length);
  call.pos_weight = weights_of(pos_weight, "pos_weight", acc, &call.pos_weight_length);
  call.mix_a = mix[0];
  call.mix_b = mix[1];
  call.scale = scale;
  const int64_t size[] = {gradient ? call.n : 0};
  Tensor grad = new_tensor(size, 1, x.dtype);
  if (gradient) {
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(grad.get(), &call.grad));
    call.stream = call.n * static_cast<int64_t>(aoti_torch_dtype_element_size(x.dtype)) >= kStreamBytes;
  }

  const int64_t pieces = (call.n + cpu::kBinaryPiece - 1) / cpu::kBinaryPiece;
  Job job{call, chosen_piece(), std::vector<double>(static_cast<size_t>(pieces))};
  parallel_for(pieces, 1, run_pieces, &job);
  double sum = 0;
  for (const double part : job.sums) sum += part;
  sum *= scale;

  Tensor loss = new_tensor(nullptr, 0, acc);
  void* out = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(loss.get(), &out));
  if (call.dtype == DType::f64) {
    *static_cast<double*>(out) = sum;
  } else {
    *static_cast<float*>(out) = static_cast<float>(sum);
  }
  return {std::move(loss), std::move(grad)};
}

}  // namespace
}  // namespace softce

STABLE_TORCH_LIBRARY_IMPL(softce, CPU, m) { m.impl("binary_fused", TORCH_BOX(&softce::binary_fused)); }
