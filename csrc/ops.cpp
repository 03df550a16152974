// SPDX-License-Identifier: BSD-3-Clause
// The CPU implementations of the softce:: operators (schemas: softce/ops.py) and the plain C functions that Python
// reads facts from (softce/_library.py). Everything goes through LibTorch's stable ABI, so one build serves every
// torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "softce.h"
#include "tensors.h"

#define SOFTCE_EXPORT extern "C" __attribute__((visibility("default")))

namespace softce {
namespace {

// ---- Spec: one list of its fields, in memory order, for the copy and for Python's comparison ----

struct Field {
  const char* name;
  size_t offset;
};
#define FIELD(name) \
  Field { #name, offsetof(Spec, name) }
constexpr Field kFields[] = {
    FIELD(mix_a),  FIELD(mix_b),  FIELD(temperature), FIELD(softcap),           FIELD(z_loss), FIELD(phi),
    FIELD(phi_p0), FIELD(phi_p1), FIELD(dense_kind),  FIELD(dense_temperature), FIELD(scale),  FIELD(empty_zero)};
#undef FIELD
constexpr size_t kFieldCount = sizeof(kFields) / sizeof(Field);
constexpr bool fields_in_order() {
  for (size_t i = 0; i < kFieldCount; ++i)
    if (kFields[i].offset != i * sizeof(double)) return false;
  return sizeof(Spec) == kFieldCount * sizeof(double);
}
static_assert(fields_in_order(), "kFields must list every field of Spec in its order");

Spec spec_of(const std::vector<double>& values) {
  if (values.size() != kFieldCount) fail("spec must have ", kFieldCount, " values, got ", values.size());
  Spec spec;
  std::memcpy(static_cast<void*>(&spec), values.data(), sizeof(Spec));
  const auto choice = [](const char* name, double value, double last) {
    if (!(value >= 0 && value <= last && value == static_cast<int>(value)))
      fail("spec.", name, " must be a whole number from 0 to ", last, ", got ", value);
  };
  choice("phi", spec.phi, static_cast<double>(Phi::poly1));
  choice("dense_kind", spec.dense_kind, static_cast<double>(DenseKind::logits));
  if (!(spec.temperature > 0)) fail("spec.temperature must be positive, got ", spec.temperature);
  if (!(spec.dense_temperature > 0)) fail("spec.dense_temperature must be positive, got ", spec.dense_temperature);
  if (!(spec.softcap >= 0)) fail("spec.softcap must be 0 (none) or positive, got ", spec.softcap);
  return spec;
}

// ---- arguments ----

// A dtype that logits can have, as the kernels name it.
bool float_dtype(int32_t dtype, DType* out) {
  if (dtype == aoti_torch_dtype_float32()) return *out = DType::f32, true;
  if (dtype == aoti_torch_dtype_float64()) return *out = DType::f64, true;
  if (dtype == aoti_torch_dtype_bfloat16()) return *out = DType::bf16, true;
  if (dtype == aoti_torch_dtype_float16()) return *out = DType::f16, true;
  return false;
}

// Everything a call knows once its arguments are checked.
struct Call {
  Problem problem;
  View logits;
  int32_t acc = 0;  // dtype of statistics and per-row values
  int64_t rows = 0;
};

// "rows" (R, C) with class stride 1, or "planes" (B, C, S) with the last stride 1.
Block block_of(const View& view) {
  Block block;
  if (view.dim == 2) {
    if (view.sizes[1] > 1 && view.strides[1] != 1 && !view.empty())
      fail(view.name, " of shape ", view.shape(), " must have stride 1 over the classes (the last dimension), got ",
           view.strides[1]);
    block.class_stride = 1;
  } else {
    if (view.sizes[2] > 1 && view.strides[2] != 1 && !view.empty())
      fail(view.name, " of shape ", view.shape(), " must have stride 1 in the last dimension, got ", view.strides[2]);
    block.class_stride = view.strides[1];
  }
  block.data = view.data;
  block.batch_stride = view.strides[0];
  if (!float_dtype(view.dtype, &block.dtype))
    fail(view.name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(view.dtype));
  return block;
}

Block packed_block(const Call& call, void* data) {
  Block block = call.problem.logits;
  block.data = data;
  block.class_stride = call.problem.inner;
  block.batch_stride = call.problem.classes * call.problem.inner;
  return block;
}

struct TargetArgs {
  const OptionalTensor &index, &value, &rest, &dense, &weight;
};

void set_target(Call& call, const TargetArgs& args, int64_t ignore_index) {
  Target& target = call.problem.target;
  target.ignore_index = ignore_index;
  if (args.index.has_value() == args.dense.has_value())
    fail("exactly one of index (sparse target) and dense must be given, got ", args.index ? "both" : "neither");
  if (args.index) {
    const View index = view_of(*args.index, "index");
    const int64_t entries = index.dim == 2 ? index.sizes[1] : 1;
    if (index.dim == 1) {  // (R,) is (R, 1): spares the caller a view
      check_packed(index, aoti_torch_dtype_int64(), {call.rows});
    } else {
      check_packed(index, aoti_torch_dtype_int64(), {call.rows, entries});
      if (entries < 1) fail("index must have at least one column, got shape ", index.shape());
    }
    target.index = static_cast<const int64_t*>(index.data);
    target.entries = entries;
    if (args.value) {
      const View value = view_of(*args.value, "value");
      check_packed(value, call.acc, {call.rows, entries});
      target.value = value.data;
    }
    if (args.rest) {
      const View rest = view_of(*args.rest, "rest");
      check_packed(rest, call.acc, {call.rows});
      target.rest = rest.data;
    }
  } else {
    if (args.value || args.rest) fail(args.value ? "value" : "rest", " goes with index, not with a dense target");
    const View dense = view_of(*args.dense, "dense");
    if (dense.dtype != call.acc) check_dtype(dense, call.logits.dtype);
    bool same = dense.dim == call.logits.dim;
    for (int64_t d = 0; same && d < dense.dim; ++d) same = dense.sizes[d] == call.logits.sizes[d];
    if (!same) fail("dense must have the logits' shape ", call.logits.shape(), ", got ", dense.shape());
    target.dense = block_of(dense);
  }
  if (args.weight) {
    const View weight = view_of(*args.weight, "weight");
    check_packed(weight, call.acc, {call.problem.classes});
    target.weight = weight.data;
  }
}

// A gradient written over the logits needs every element at its own address, and no other argument there.
void check_writable(const Call& call, const OptionalTensor& other, const char* name) {
  if (!other) return;
  const View view = view_of(*other, name);
  if (!view.empty() && !call.logits.empty() && call.logits.overlaps(view))
    fail("in place, ", name, " must not share memory with the logits");
}

void check_in_place(const Call& call, const TargetArgs& args) {
  const View& view = call.logits;
  if (!view.empty()) {
    const Problem& p = call.problem;
    const int64_t batch_stride = p.logits.batch_stride, class_stride = p.logits.class_stride;
    const bool planes_apart = p.classes <= 1 || class_stride >= p.inner;
    const int64_t item = (p.classes - 1) * class_stride + p.inner;  // elements that one batch item spans
    const bool class_outermost = p.batch > 1 && batch_stride >= p.inner &&
                                 (p.classes <= 1 || class_stride >= (p.batch - 1) * batch_stride + p.inner);
    if (!(class_outermost || (planes_apart && (p.batch <= 1 || batch_stride >= item))))
      fail("in place, logits of shape ", view.shape(), " must not overlap themselves (expanded logits?)");
  }
  check_writable(call, args.index, "index");
  check_writable(call, args.value, "value");
  check_writable(call, args.rest, "rest");
  check_writable(call, args.dense, "dense");
  check_writable(call, args.weight, "weight");
}

Call call_of(const Tensor& logits, const TargetArgs& target, int64_t ignore_index, const std::vector<double>& spec,
             bool in_place) {
  Call call;
  call.logits = view_of(logits, "logits", in_place);
  const View& view = call.logits;
  if (view.dim != 2 && view.dim != 3) fail("logits must be (R, C) or (B, C, S), got ", view.shape());
  Problem& p = call.problem;
  p.logits = block_of(view);
  p.batch = view.sizes[0];
  p.classes = view.sizes[1];
  p.inner = view.dim == 3 ? view.sizes[2] : 1;
  call.rows = p.batch * p.inner;
  call.acc = p.logits.dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  p.spec = spec_of(spec);
  set_target(call, target, ignore_index);
  if (in_place) check_in_place(call, target);
  return call;
}

// ---- running ----

// std::out_of_range reaches Python as IndexError. The beginning of the message is part of the interface.
[[noreturn]] void fail_index(const BadIndex& bad, const Call& call) {
  std::ostringstream message;
  message << "softce: target out of range: value " << bad.value << " in row " << bad.row << ", expected 0 <= target < "
          << call.problem.classes << " (the number of classes) or ignore_index (" << call.problem.target.ignore_index
          << ")";
  throw std::out_of_range(message.str());
}

Tensor new_stats(const Call& call, bool extras, bool wanted = true) {
  const int64_t sizes[] = {!wanted ? 0 : extras ? kStatsExtra : kStats, call.rows};
  return new_tensor(sizes, 2, call.acc);
}

void* data_of(const Tensor& tensor) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &data));
  return data;
}

void run_grad(const Call& call, const Tensor& lse, const Tensor& coef, const Block& out) {
  const View lse_view = view_of(lse, "lse"), coef_view = view_of(coef, "coef");
  check_packed(lse_view, call.acc, {call.rows});
  const int64_t coef_rows = coef_view.dim == 2 && coef_view.sizes[0] == 2 ? 2 : 3;
  check_packed(coef_view, call.acc, {coef_rows, call.rows});
  BadIndex bad;
  if (!launch_row_grad(call.problem, lse_view.data, coef_view.data, static_cast<int>(coef_rows), out, parallel_for,
                       &bad))
    fail_index(bad, call);
}

std::tuple<Tensor, Tensor> run_fused(const Call& call, const OptionalTensor& row_weight, bool mean, bool extras,
                                     bool want_stats, const Block& out) {
  const void* weights = nullptr;
  if (row_weight) {
    const View view = view_of(*row_weight, "row_weight");
    check_packed(view, call.acc, {call.rows});
    weights = view.data;
  }
  Tensor loss = new_tensor(nullptr, 0, call.acc);
  Tensor stats = new_stats(call, extras, want_stats);
  BadIndex bad;
  if (!launch_row_fused(call.problem, weights, mean ? Reduction::mean : Reduction::sum, extras && want_stats,
                        data_of(loss), want_stats ? data_of(stats) : nullptr, out, parallel_for, &bad))
    fail_index(bad, call);
  return {std::move(loss), std::move(stats)};
}

// ---- operators: the arguments' order is that of the schemas in softce/ops.py ----

Tensor row_stats(const Tensor& logits, const OptionalTensor& index, const OptionalTensor& value,
                 const OptionalTensor& rest, const OptionalTensor& dense, const OptionalTensor& weight,
                 int64_t ignore_index, const std::vector<double>& spec, bool extras) {
  const Call call = call_of(logits, {index, value, rest, dense, weight}, ignore_index, spec, false);
  Tensor stats = new_stats(call, extras);
  BadIndex bad;
  if (!launch_row_stats(call.problem, extras, data_of(stats), parallel_for, &bad)) fail_index(bad, call);
  return stats;
}

Tensor row_grad(const Tensor& logits, const Tensor& lse, const Tensor& coef, const OptionalTensor& index,
                const OptionalTensor& value, const OptionalTensor& rest, const OptionalTensor& dense,
                const OptionalTensor& weight, int64_t ignore_index, const std::vector<double>& spec) {
  const Call call = call_of(logits, {index, value, rest, dense, weight}, ignore_index, spec, false);
  Tensor out = new_tensor(call.logits.sizes, call.logits.dim, call.logits.dtype);
  run_grad(call, lse, coef, packed_block(call, data_of(out)));
  return out;
}

void row_grad_(const Tensor& logits, const Tensor& lse, const Tensor& coef, const OptionalTensor& index,
               const OptionalTensor& value, const OptionalTensor& rest, const OptionalTensor& dense,
               const OptionalTensor& weight, int64_t ignore_index, const std::vector<double>& spec) {
  const Call call = call_of(logits, {index, value, rest, dense, weight}, ignore_index, spec, true);
  check_writable(call, lse, "lse");
  check_writable(call, coef, "coef");
  run_grad(call, lse, coef, call.problem.logits);
}

std::tuple<Tensor, Tensor, Tensor> row_fused(const Tensor& logits, const OptionalTensor& index,
                                             const OptionalTensor& value, const OptionalTensor& rest,
                                             const OptionalTensor& dense, const OptionalTensor& weight,
                                             const OptionalTensor& row_weight, int64_t ignore_index,
                                             const std::vector<double>& spec, bool mean, bool extras, bool want_stats) {
  const Call call = call_of(logits, {index, value, rest, dense, weight}, ignore_index, spec, false);
  Tensor out = new_tensor(call.logits.sizes, call.logits.dim, call.logits.dtype);
  auto [loss, stats] = run_fused(call, row_weight, mean, extras, want_stats, packed_block(call, data_of(out)));
  return {std::move(loss), std::move(out), std::move(stats)};
}

std::tuple<Tensor, Tensor> row_fused_(const Tensor& logits, const OptionalTensor& index, const OptionalTensor& value,
                                      const OptionalTensor& rest, const OptionalTensor& dense,
                                      const OptionalTensor& weight, const OptionalTensor& row_weight,
                                      int64_t ignore_index, const std::vector<double>& spec, bool mean, bool extras) {
  const Call call = call_of(logits, {index, value, rest, dense, weight}, ignore_index, spec, true);
  check_writable(call, row_weight, "row_weight");
  return run_fused(call, row_weight, mean, extras, true, call.problem.logits);
}

// Memory for what Python's loops fill: `like` gives the dtype.
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size) {
  constexpr size_t kMostDims = 3;  // new_tensor's
  if (size.size() > kMostDims) fail("size must have at most ", kMostDims, " dimensions, got ", size.size());
  int64_t bytes = sizeof(double);
  for (const int64_t length : size)
    if (length < 0 || __builtin_mul_overflow(bytes, std::max<int64_t>(length, 1), &bytes))
      fail("size must be neither negative nor too large, got ",
           shape_text(size.data(), static_cast<int64_t>(size.size())));
  return new_tensor(size.data(), static_cast<int64_t>(size.size()), view_of(like, "like").dtype);
}

}  // namespace
}  // namespace softce

STABLE_TORCH_LIBRARY_IMPL(softce, CPU, m) {
  m.impl("new_empty", TORCH_BOX(&softce::new_empty));
  m.impl("row_stats", TORCH_BOX(&softce::row_stats));
  m.impl("row_grad", TORCH_BOX(&softce::row_grad));
  m.impl("row_grad_", TORCH_BOX(&softce::row_grad_));
  m.impl("row_fused", TORCH_BOX(&softce::row_fused));
  m.impl("row_fused_", TORCH_BOX(&softce::row_fused_));
}

// ---- facts for Python ----

SOFTCE_EXPORT const char* softce_isa_chosen() { return softce::isa_chosen(); }
SOFTCE_EXPORT int softce_isa_choose(const char* name) { return softce::isa_choose(name); }
SOFTCE_EXPORT const char* softce_isa_report() { return softce::isa_report(); }

SOFTCE_EXPORT const char* softce_spec_fields() {
  static const std::string fields = [] {
    std::string joined;
    for (const softce::Field& field : softce::kFields) joined += (joined.empty() ? "" : ",") + std::string(field.name);
    return joined;
  }();
  return fields.c_str();
}

#ifndef SOFTCE_VERSION
#define SOFTCE_VERSION "unknown"
#endif
#ifndef SOFTCE_FLAGS
#define SOFTCE_FLAGS ""
#endif

// "key: value" lines; no date, so that equal sources build equal libraries.
SOFTCE_EXPORT const char* softce_build_info() {
  return "softce: " SOFTCE_VERSION
#ifdef __clang__
         "\ncompiler: " __VERSION__
#else
         "\ncompiler: gcc " __VERSION__
#endif
         "\nflags: " SOFTCE_FLAGS "\ntorch: " TORCH_VERSION
#ifdef __SANITIZE_ADDRESS__
         "\nsanitizers: address, undefined"
#endif
      ;
}
