// SPDX-License-Identifier: BSD-3-Clause
// Launches: facts of the device, the kernels before and after the row kernel (denominator and loss), the two calls.
#include <map>
#include <mutex>

#include "device.cuh"
#include "launch.h"
#include "sums.cuh"

namespace softce::cuda {

// ---- devices ----

std::string error_text(cudaError_t error, const char* what) {
  return std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

namespace {

// Makes a device the current one for a while.
class Current {
 public:
  explicit Current(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess) error = cudaSetDevice(device);
  }
  ~Current() {
    if (error == cudaSuccess) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  cudaError_t error;

 private:
  int before_ = 0;
};

Device read_device(int number) {
  Device device;
  device.number = number;
  const Current current(number);
  if (current.error != cudaSuccess) {
    cudaGetLastError();
    device.reason = error_text(current.error, "choosing the device");
    return device;
  }
  int major = 0, minor = 0;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&device.facts.multiprocessors, cudaDevAttrMultiProcessorCount},
      {&device.facts.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&device.facts.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&device.facts.shared_reserved, cudaDevAttrReservedSharedMemoryPerBlock},
  };
  for (const auto& [value, attribute] : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, number);
    if (error != cudaSuccess) {
      device.reason = error_text(error, "reading the device's attributes");
      return device;
    }
  }
  // Whether there is machine code for this device is the runtime's to say.
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(sum_losses));
  if (error != cudaSuccess) {
    cudaGetLastError();
    device.reason = "built for compute capability 8.x, 9.0 and 10.x, the device has " + std::to_string(major) + "." +
                    std::to_string(minor) + " (" + cudaGetErrorName(error) + ")";
  }
  // What the kernels were compiled for, not what the device could do: from 9.0 on they use bulk copies and clusters.
  device.facts.clusters = attributes.ptxVersion >= 90;
  return device;
}

}  // namespace

const Device& device_of(int number) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(number);
  return found != devices.end() ? found->second : devices.emplace(number, read_device(number)).first->second;
}

std::string device_reason(int device) { return device_of(device).reason; }

// ---- calls ----

namespace {

RowShape shape_of(const Problem& problem, bool fused) {
  const auto bytes = [](DType type) { return type == DType::f32 ? 4 : 2; };
  RowShape shape;
  shape.rows = problem.batch;
  shape.classes = problem.classes;
  shape.entries = problem.target.index ? static_cast<int>(problem.target.entries) : 0;
  shape.logit_bytes = bytes(problem.logits.dtype);
  shape.dense_bytes = problem.target.index ? 0 : bytes(problem.target.dense.dtype);
  shape.fused = fused;
  return shape;
}

RowParams params_of(const Problem& problem, float* stats) {
  const Target& target = problem.target;
  RowParams p = {};
  p.logits = problem.logits.data;
  p.logits_stride = problem.logits.batch_stride;
  p.dense = target.dense.data;
  p.dense_stride = target.dense.batch_stride;
  p.index = target.index;
  p.value = static_cast<const float*>(target.value);
  p.rest = static_cast<const float*>(target.rest);
  p.weight = static_cast<const float*>(target.weight);
  p.stats = stats;
  p.rows = problem.batch;
  p.classes = static_cast<int>(problem.classes);
  p.entries = target.index ? static_cast<int>(target.entries) : 0;
  p.ignore_index = target.ignore_index;
  p.scale = problem.spec.scale;
  p.empty_zero = problem.spec.empty_zero != 0.0;
  p.scalars = row_scalars(problem.spec);
  return p;
}

std::string launch_kernel(const Problem& problem, const RowParams& params, bool fused, int device,
                          cudaStream_t stream) {
  const Device& facts = device_of(device);
  const TargetKind kind = problem.target.index                                                ? TargetKind::sparse
                          : problem.spec.dense_kind == static_cast<double>(DenseKind::logits) ? TargetKind::teacher
                                                                                              : TargetKind::probs;
  const RowShape shape = shape_of(problem, fused);
  const DType dense = problem.target.dense.dtype;
  switch (problem.logits.dtype) {
    case DType::bf16:
      return launch_rows<bf16>(params, kind, dense, shape, facts, stream);
    case DType::f16:
      return launch_rows<f16>(params, kind, dense, shape, facts, stream);
    default:
      return launch_rows<float>(params, kind, dense, shape, facts, stream);
  }
}

std::string launched(const char* what) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : error_text(error, what);
}

size_t row_loss_bytes(int64_t rows) { return (static_cast<size_t>(rows) * sizeof(float) + 15) / 16 * 16; }

}  // namespace

std::string describe_plan(const RowShape& shape, int device) {
  const Plan plan = make_plan(shape, device_of(device).facts, kLargestCluster);
  const char* const modes[] = {"stats", "resident", "twice"};
  return std::string(modes[static_cast<int>(plan.mode)]) + ' ' + std::to_string(plan.cluster) + ' ' +
         std::to_string(plan.warps) + ' ' + std::to_string(plan.shared);
}

size_t fused_scratch_bytes(int64_t rows) { return row_loss_bytes(rows) + 2 * kMostParts * sizeof(double); }

std::string launch_row_stats(const Problem& problem, float* stats, int device, void* stream) {
  if (problem.batch == 0) return "";
  return launch_kernel(problem, params_of(problem, stats), false, device, static_cast<cudaStream_t>(stream));
}

std::string launch_row_fused(const Problem& problem, const Fused& fused, float* stats, int device, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  const int parts = parts_of(problem.batch);
  RowParams params = params_of(problem, stats);
  params.row_weight = fused.row_weight;
  params.out = fused.out;
  params.out_stride = fused.out_stride;
  params.row_loss = static_cast<float*>(fused.scratch);
  double* const losses = reinterpret_cast<double*>(static_cast<char*>(fused.scratch) + row_loss_bytes(problem.batch));
  double* const counts = losses + kMostParts;
  std::string error;
  if (fused.mean && !params.index && !fused.row_weight && problem.batch > 0) {
    params.scale /= static_cast<double>(problem.batch);  // every row counts 1
  } else if (fused.mean) {
    count_rows<<<parts, kSumThreads, 0, stream>>>(params, counts);
    error = launched("launching the denominator's kernel");
    params.counts = counts;
    params.count_parts = parts;
  }
  if (error.empty() && problem.batch > 0) error = launch_kernel(problem, params, true, device, stream);
  if (!error.empty()) return error;
  sum_losses<<<parts, kSumThreads, 0, stream>>>(params.row_loss, params.rows, losses);
  finish_loss<<<1, kLanes, 0, stream>>>(losses, parts, params.counts, params.count_parts, params.scale,
                                        params.empty_zero, fused.loss);
  return launched("launching the loss's kernels");
}

}  // namespace softce::cuda
