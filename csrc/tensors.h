// SPDX-License-Identifier: BSD-3-Clause
// Tensors as the operators see them: plain facts read once from a stable-ABI handle, the checks that every argument
// goes through, and the allocation of outputs.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "pool.h"
#include "softce.h"

namespace softce {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "softce: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_uint8()) return "uint8";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  return "another dtype";
}

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "") << sizes[d];
  text << (dim == 1 ? ",)" : ")");
  return text.str();
}

// A dense CPU tensor: name for messages, where it lies, how it is laid out. Sizes and strides are borrowed.
struct View {
  const char* name = "";
  void* data = nullptr;  // never null: an empty tensor points at a dummy, because null means "not given" to kernels
  int32_t dtype = 0;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  std::string shape() const { return shape_text(sizes, dim); }

  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }

  bool empty() const {
    for (int64_t d = 0; d < dim; ++d)
      if (sizes[d] == 0) return true;
    return false;
  }

  // One past the last byte that the tensor can touch.
  const char* end() const {
    const char* begin = static_cast<const char*>(data);
    if (empty()) return begin;
    int64_t last = 0;
    for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
    return begin + (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  }

  bool overlaps(const View& other) const {
    return static_cast<const char*>(data) < other.end() && static_cast<const char*>(other.data) < end();
  }
};

inline View view_of(const Tensor& tensor, const char* name, bool written = false) {
  static double dummy;
  View view;
  view.name = name;
  const AtenTensorHandle handle = tensor.get();
  int32_t device = 0, layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  if (device != aoti_torch_device_type_cpu()) fail(name, " must be on the CPU like the other tensors of the call");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  if (layout != aoti_torch_layout_strided()) fail(name, " must be a dense (strided) tensor, not a sparse one");
  int64_t* facts = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &view.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &facts));
  view.sizes = facts;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &facts));
  view.strides = facts;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &view.dtype));
  if (view.empty()) {
    view.data = &dummy;
  } else if (written) {
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle, &view.data));
  } else {
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
    view.data = const_cast<void*>(data);  // read only from here on: Block and Target hold it as const
  }
  return view;
}

inline void check_dtype(const View& view, int32_t dtype) {
  if (view.dtype != dtype) fail(view.name, " must be ", dtype_name(dtype), ", got ", dtype_name(view.dtype));
}

// A per-row or per-class vector or matrix in the kernels' form: exact shape, contiguous.
inline void check_packed(const View& view, int32_t dtype, std::initializer_list<int64_t> sizes) {
  check_dtype(view, dtype);
  bool same = view.dim == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < view.dim; ++d) same = view.sizes[d] == sizes.begin()[d];
  if (!same)
    fail(view.name, " must have shape ", shape_text(sizes.begin(), static_cast<int64_t>(sizes.size())), ", got ",
         view.shape());
  if (!view.contiguous()) fail(view.name, " must be contiguous, got shape ", view.shape(), " with other strides");
}

// A new contiguous CPU tensor of at most three dimensions; large ones come from the pool.
inline Tensor new_tensor(const int64_t* sizes, int64_t dim, int32_t dtype) {
  int64_t strides[3] = {1, 1, 1};
  int64_t numel = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = numel;
    numel *= sizes[d] > 0 ? sizes[d] : 1;
  }
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] == 0) numel = 0;
  const size_t bytes = static_cast<size_t>(numel) * aoti_torch_dtype_element_size(dtype);
  const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  if (pool::PooledBlock* block = bytes >= pool::kSmallest ? pool::acquire(bytes) : nullptr) {
    const auto deleter = [](void*, void* context) { pool::release(static_cast<pool::PooledBlock*>(context)); };
    if (torch_from_blob(pool::data(block), dim, sizes, strides, 0, dtype, cpu, -1, &handle, aoti_torch_layout_strided(),
                        nullptr, 0, deleter, block) != 0) {
      pool::release(block);
      fail("torch refused an output of ", bytes, " bytes");
    }
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, cpu, -1, &handle));
  }
  return Tensor(handle);
}

// Over torch's threads; small jobs stay with the caller.
inline void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (grain < 1) grain = 1;
  if (n <= grain) {
    if (n > 0) body(0, n, context);
    return;
  }
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

}  // namespace softce
