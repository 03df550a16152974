// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels as operators of their own, torch.ops.softce_cuda.*, with the arguments of those in softce/ops.py,
// and the facts that softce/backends/cuda.py reads. Checks and allocation only; everything goes through LibTorch's
// stable ABI, so one build serves every torch from TORCH_TARGET_VERSION on, and the library loads where there is no
// GPU.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "launch.h"
#include "plan.h"
#include "tensors.h"

#define SOFTCE_EXPORT extern "C" __attribute__((visibility("default")))

namespace softce::cuda {
namespace {

using Numbers = std::vector<double>;

struct Place {
  int32_t type = 0, index = 0;
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

Place place_of(const Tensor& tensor) {
  Place place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
  return place;
}

// Facts of a dense tensor on the logits' device. The pointer is only ever handed to kernels.
View view_at(const Tensor& tensor, const char* name, const Place& place, bool written = false) {
  View view;
  view.name = name;
  const AtenTensorHandle handle = tensor.get();
  if (!(place_of(tensor) == place)) fail(name, " must be on the logits' device");
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  if (layout != aoti_torch_layout_strided()) fail(name, " must be a dense (strided) tensor, not a sparse one");
  int64_t* facts = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &view.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &facts));
  view.sizes = facts;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &facts));
  view.strides = facts;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &view.dtype));
  if (written) {
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle, &view.data));
  } else {
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
    view.data = const_cast<void*>(data);  // read only from here on
  }
  return view;
}

Block rows_of(const View& view) {
  Block block;
  if (view.dim != 2) fail(view.name, " must be (rows, classes), got ", view.shape());
  if (view.sizes[1] > 1 && view.strides[1] != 1)
    fail(view.name, " must have stride 1 over the classes, got ", view.strides[1]);
  block.data = view.data;
  block.batch_stride = view.strides[0];
  if (view.dtype == aoti_torch_dtype_float32()) {
    block.dtype = DType::f32;
  } else if (view.dtype == aoti_torch_dtype_bfloat16()) {
    block.dtype = DType::bf16;
  } else if (view.dtype == aoti_torch_dtype_float16()) {
    block.dtype = DType::f16;
  } else {
    fail(view.name, " must be float32, bfloat16 or float16, got ", dtype_name(view.dtype));
  }
  return block;
}

Spec spec_of(const Numbers& values) {
  Spec spec;
  if (values.size() * sizeof(double) != sizeof(Spec))
    fail("spec must have ", sizeof(Spec) / sizeof(double), " values, got ", values.size());
  std::memcpy(static_cast<void*>(&spec), values.data(), sizeof(Spec));
  if (!(spec.temperature > 0)) fail("spec.temperature must be positive, got ", spec.temperature);
  if (!(spec.dense_temperature > 0)) fail("spec.dense_temperature must be positive, got ", spec.dense_temperature);
  if (!(spec.softcap >= 0)) fail("spec.softcap must be 0 (none) or positive, got ", spec.softcap);
  if (!(spec.phi >= 0 && spec.phi <= static_cast<double>(Phi::poly1)))
    fail("spec.phi must be from 0 to ", static_cast<int>(Phi::poly1), ", got ", spec.phi);
  return spec;
}

struct Arguments {
  const OptionalTensor &index, &value, &rest, &dense, &weight;
};

struct Call {
  Problem problem;
  View logits;
  Place place;
};

void set_target(Call& call, const Arguments& args, int64_t ignore_index) {
  Target& target = call.problem.target;
  const int64_t rows = call.problem.batch, classes = call.problem.classes;
  const int32_t acc = aoti_torch_dtype_float32();
  target.ignore_index = ignore_index;
  if (args.index.has_value() == args.dense.has_value())
    fail("exactly one of index (sparse target) and dense must be given, got ", args.index ? "both" : "neither");
  if (args.index) {
    const View index = view_at(*args.index, "index", call.place);
    target.entries = index.dim == 2 ? index.sizes[1] : 1;
    if (index.dim == 1) {
      check_packed(index, aoti_torch_dtype_int64(), {rows});
    } else {
      check_packed(index, aoti_torch_dtype_int64(), {rows, target.entries});
    }
    if (target.entries < 1 || target.entries > kMaxEntries)
      fail("index must have 1 to ", kMaxEntries, " columns, got shape ", index.shape());
    target.index = static_cast<const int64_t*>(index.data);
    if (args.value) {
      const View value = view_at(*args.value, "value", call.place);
      check_packed(value, acc, {rows, target.entries});
      target.value = value.data;
    }
    if (args.rest) {
      const View rest = view_at(*args.rest, "rest", call.place);
      check_packed(rest, acc, {rows});
      target.rest = rest.data;
    }
  } else {
    if (args.value || args.rest) fail(args.value ? "value" : "rest", " goes with index, not with a dense target");
    const View dense = view_at(*args.dense, "dense", call.place);
    target.dense = rows_of(dense);
    if (dense.dtype != acc) check_dtype(dense, call.logits.dtype);
    if (dense.sizes[0] != rows || dense.sizes[1] != classes)
      fail("dense must have the logits' shape ", call.logits.shape(), ", got ", dense.shape());
  }
  if (args.weight) {
    const View weight = view_at(*args.weight, "weight", call.place);
    check_packed(weight, acc, {classes});
    target.weight = weight.data;
  }
}

Call call_of(const Tensor& logits, const Arguments& args, int64_t ignore_index, const Numbers& spec, bool extras,
             bool written = false) {
  if (extras) fail("the CUDA C++ kernels have no extra statistics");
  Call call;
  call.place = place_of(logits);
  call.logits = view_at(logits, "logits", call.place, written);
  Problem& problem = call.problem;
  problem.logits = rows_of(call.logits);
  problem.batch = call.logits.sizes[0];
  problem.classes = call.logits.sizes[1];
  if (problem.classes < 1 || problem.classes > kMaxClasses)
    fail("logits must have 1 to ", kMaxClasses, " classes, got shape ", call.logits.shape());
  problem.spec = spec_of(spec);
  set_target(call, args, ignore_index);
  if (call.place.type != aoti_torch_device_type_cuda())
    fail("logits must be on a CUDA device for the CUDA C++ kernels");
  const std::string reason = device_reason(call.place.index);
  if (!reason.empty()) fail("the CUDA C++ kernels cannot run on device ", call.place.index, ": ", reason);
  return call;
}

// A gradient written over the logits needs every element at its own address, and no other argument there.
void check_in_place(const Call& call, const Arguments& args, const OptionalTensor& row_weight) {
  const View& view = call.logits;
  if (view.empty()) return;
  if (view.sizes[0] > 1 && view.strides[0] < view.sizes[1])
    fail("in place, logits of shape ", view.shape(), " must not overlap themselves (expanded logits?)");
  const std::pair<const OptionalTensor&, const char*> others[] = {{args.index, "index"},   {args.value, "value"},
                                                                  {args.rest, "rest"},     {args.dense, "dense"},
                                                                  {args.weight, "weight"}, {row_weight, "row_weight"}};
  for (const auto& [tensor, name] : others) {
    if (!tensor) continue;
    const View other = view_at(*tensor, name, call.place);
    if (!other.empty() && view.overlaps(other)) fail("in place, ", name, " must not share memory with the logits");
  }
}

// torch's current stream. The function lives in torch's CUDA library, which a CPU-only torch lacks, so it is looked up.
void* stream_of(const Place& place) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, kName);
    if (!found)
      if (void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, kName);
    return reinterpret_cast<Function>(found);
  }();
  if (!function) fail("this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(place.index, &stream));
  return stream;
}

Tensor new_tensor_at(const Place& place, std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[2] = {1, 1};
  const auto dim = static_cast<int64_t>(sizes.size());
  if (dim == 2) strides[0] = sizes.begin()[1] > 0 ? sizes.begin()[1] : 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes.begin(), strides, dtype, place.type, place.index, &handle));
  return Tensor(handle);
}

void* data_of(const Tensor& tensor) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &data));
  return data;
}

void check_launch(const std::string& error) {
  if (!error.empty()) fail("the CUDA C++ kernels failed: ", error);
}

std::tuple<Tensor, Tensor> run_fused(const Call& call, const OptionalTensor& row_weight, bool mean, void* out,
                                     int64_t out_stride) {
  Fused fused;
  const int32_t acc = aoti_torch_dtype_float32();
  const int64_t rows = call.problem.batch;
  if (row_weight) {
    const View view = view_at(*row_weight, "row_weight", call.place);
    check_packed(view, acc, {rows});
    fused.row_weight = static_cast<const float*>(view.data);
  }
  Tensor loss = new_tensor_at(call.place, {}, acc);
  Tensor stats = new_tensor_at(call.place, {kStats, rows}, acc);
  const Tensor scratch =
      new_tensor_at(call.place, {static_cast<int64_t>(fused_scratch_bytes(rows))}, aoti_torch_dtype_uint8());
  fused.mean = mean;
  fused.loss = static_cast<float*>(data_of(loss));
  fused.out = out;
  fused.out_stride = out_stride;
  fused.scratch = data_of(scratch);
  check_launch(launch_row_fused(call.problem, fused, static_cast<float*>(data_of(stats)), call.place.index,
                                stream_of(call.place)));
  return {std::move(loss), std::move(stats)};
}

// ---- operators: the arguments' order is that of the schemas in softce/ops.py ----

Tensor row_stats(const Tensor& logits, const OptionalTensor& index, const OptionalTensor& value,
                 const OptionalTensor& rest, const OptionalTensor& dense, const OptionalTensor& weight,
                 int64_t ignore_index, const Numbers& spec, bool extras) {
  const Call call = call_of(logits, {index, value, rest, dense, weight}, ignore_index, spec, extras);
  const torch::stable::accelerator::DeviceGuard guard(call.place.index);
  Tensor stats = new_tensor_at(call.place, {kStats, call.problem.batch}, aoti_torch_dtype_float32());
  check_launch(
      launch_row_stats(call.problem, static_cast<float*>(data_of(stats)), call.place.index, stream_of(call.place)));
  return stats;
}

std::tuple<Tensor, Tensor, Tensor> row_fused(const Tensor& logits, const OptionalTensor& index,
                                             const OptionalTensor& value, const OptionalTensor& rest,
                                             const OptionalTensor& dense, const OptionalTensor& weight,
                                             const OptionalTensor& row_weight, int64_t ignore_index,
                                             const Numbers& spec, bool mean, bool extras) {
  const Call call = call_of(logits, {index, value, rest, dense, weight}, ignore_index, spec, extras);
  const torch::stable::accelerator::DeviceGuard guard(call.place.index);
  const int64_t classes = call.problem.classes;
  Tensor out = new_tensor_at(call.place, {call.problem.batch, classes}, call.logits.dtype);
  auto [loss, stats] = run_fused(call, row_weight, mean, data_of(out), classes);
  return {std::move(loss), std::move(out), std::move(stats)};
}

std::tuple<Tensor, Tensor> row_fused_(const Tensor& logits, const OptionalTensor& index, const OptionalTensor& value,
                                      const OptionalTensor& rest, const OptionalTensor& dense,
                                      const OptionalTensor& weight, const OptionalTensor& row_weight,
                                      int64_t ignore_index, const Numbers& spec, bool mean, bool extras) {
  const Arguments args = {index, value, rest, dense, weight};
  const Call call = call_of(logits, args, ignore_index, spec, extras, true);
  check_in_place(call, args, row_weight);
  const torch::stable::accelerator::DeviceGuard guard(call.place.index);
  return run_fused(call, row_weight, mean, call.logits.data, call.problem.logits.batch_stride);
}

}  // namespace
}  // namespace softce::cuda

#define SOFTCE_TARGET "Tensor? index, Tensor? value, Tensor? rest, Tensor? dense, Tensor? weight"
#define SOFTCE_FUSED SOFTCE_TARGET ", Tensor? row_weight, int ignore_index, float[] spec, bool mean, bool extras"

STABLE_TORCH_LIBRARY(softce_cuda, m) {
  m.def("row_stats(Tensor logits, " SOFTCE_TARGET ", int ignore_index, float[] spec, bool extras) -> Tensor");
  m.def("row_fused(Tensor logits, " SOFTCE_FUSED ") -> (Tensor loss, Tensor dlogits, Tensor stats)");
  m.def("row_fused_(Tensor(a!) logits, " SOFTCE_FUSED ") -> (Tensor loss, Tensor stats)");
}

// For CPU tensors too: they get the operators' own complaint, after all other checks.
#define SOFTCE_IMPLEMENT(m)                                 \
  m.impl("row_stats", TORCH_BOX(&softce::cuda::row_stats)); \
  m.impl("row_fused", TORCH_BOX(&softce::cuda::row_fused)); \
  m.impl("row_fused_", TORCH_BOX(&softce::cuda::row_fused_))
STABLE_TORCH_LIBRARY_IMPL(softce_cuda, CUDA, m) { SOFTCE_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(softce_cuda, CPU, m) { SOFTCE_IMPLEMENT(m); }

// ---- facts for Python ----

SOFTCE_EXPORT int64_t softce_cuda_max_entries() { return softce::cuda::kMaxEntries; }
SOFTCE_EXPORT int64_t softce_cuda_max_classes() { return softce::cuda::kMaxClasses; }

// Why a device cannot run the kernels, "" if it can.
SOFTCE_EXPORT const char* softce_cuda_device_reason(int device) {
  thread_local std::string reason;
  reason = softce::cuda::device_reason(device);
  return reason.c_str();
}

// "mode cluster warps shared-bytes" of a shape on a device (plan.h); dense_bytes is 0 for a sparse target.
SOFTCE_EXPORT const char* softce_cuda_plan(int device, int64_t rows, int64_t classes, int entries, int logit_bytes,
                                           int dense_bytes, int fused) {
  thread_local std::string plan;
  softce::cuda::RowShape shape;
  shape.rows = rows, shape.classes = classes, shape.entries = entries;
  shape.logit_bytes = logit_bytes, shape.dense_bytes = dense_bytes, shape.fused = fused != 0;
  plan = softce::cuda::describe_plan(shape, device);
  return plan.c_str();
}

#ifndef SOFTCE_VERSION
#define SOFTCE_VERSION "unknown"
#endif

SOFTCE_EXPORT const char* softce_build_info() { return "softce: " SOFTCE_VERSION; }
