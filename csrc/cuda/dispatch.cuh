// SPDX-License-Identifier: BSD-3-Clause
// From a call to the kernel of its types: one instantiation of launch_rows an element type of the logits, each in a
// source file of its own, so that they compile side by side.
#pragma once
#include <map>
#include <mutex>
#include <tuple>

#include "device.cuh"

namespace softce::cuda {

namespace detail {

using Kernel = void (*)(RowParams);

inline cudaLaunchConfig_t configuration(const Plan& plan, int64_t blocks, cudaStream_t stream,
                                        cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.warps * kLanes));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
  config.stream = stream;
  if (plan.cluster > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = static_cast<unsigned>(plan.cluster);
    attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  return config;
}

// How many clusters of this plan a device runs at a time; 0 if it cannot. The answers are kept: asking takes the driver
// longer than a launch.
inline cudaError_t clusters_at_once(Kernel kernel, const Plan& plan, const Device& device, int* clusters) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device.number, plan.cluster, plan.warps, plan.shared);
  const auto found = known.find(key);
  if (found != known.end()) {
    *clusters = found->second;
    return cudaSuccess;
  }
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.facts.shared_per_block);
  if (error == cudaSuccess && plan.cluster > kPortableCluster)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  if (plan.cluster > 1) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = configuration(plan, plan.cluster, nullptr, &attribute);
    error = cudaOccupancyMaxActiveClusters(clusters, function, &config);
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(clusters, function, plan.warps * kLanes,
                                                          static_cast<size_t>(plan.shared));
    *clusters *= device.facts.multiprocessors;
  }
  if (error != cudaSuccess) return error;
  known[key] = *clusters;
  return cudaSuccess;
}

template <class T, class D, TargetKind K>
Kernel kernel_of(RowMode mode) {
  switch (mode) {
    case RowMode::resident:
      return row_kernel<T, D, K, RowMode::resident>;
    case RowMode::twice:
      return row_kernel<T, D, K, RowMode::twice>;
    default:
      return row_kernel<T, D, K, RowMode::stats>;
  }
}

template <class T, class D, TargetKind K>
std::string run(RowParams& params, const RowShape& shape, const Device& device, cudaStream_t stream) {
  Plan plan;
  Kernel kernel = nullptr;
  int clusters = 0;
  // A device may refuse a cluster that the plan hopes for (16 blocks are not portable): then the next best plan.
  for (int largest = kLargestCluster; clusters == 0 && largest >= 1; largest /= 2) {
    plan = make_plan(shape, device.facts, largest);
    kernel = kernel_of<T, D, K>(plan.mode);
    const cudaError_t error = clusters_at_once(kernel, plan, device, &clusters);
    if (error != cudaSuccess && plan.cluster <= kPortableCluster) return error_text(error, "asking for the occupancy");
    if (error != cudaSuccess) {
      cudaGetLastError();  // the refusal has been dealt with
      clusters = 0;
    }
  }
  if (clusters == 0) return "the device cannot run a block of the kernel's size";
  params.units = plan.units;
  params.x_bytes = plan.x_bytes;
  params.t_bytes = plan.t_bytes;
  const int64_t wanted = params.rows < clusters ? params.rows : clusters;
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = configuration(plan, wanted * plan.cluster, stream, &attribute);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  return error == cudaSuccess ? "" : error_text(error, "launching the row kernel");
}

template <class T, TargetKind K>
std::string run_dense(RowParams& params, DType dense, const RowShape& shape, const Device& device,
                      cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (dense != DType::f32) return run<T, T, K>(params, shape, device, stream);
  }
  return run<T, float, K>(params, shape, device, stream);
}

}  // namespace detail

template <class T>
std::string launch_rows(RowParams params, TargetKind target_kind, DType dense, const RowShape& shape,
                        const Device& device, cudaStream_t stream) {
  switch (target_kind) {
    case TargetKind::probs:
      return detail::run_dense<T, TargetKind::probs>(params, dense, shape, device, stream);
    case TargetKind::teacher:
      return detail::run_dense<T, TargetKind::teacher>(params, dense, shape, device, stream);
    default:
      return detail::run<T, T, TargetKind::sparse>(params, shape, device, stream);
  }
}

}  // namespace softce::cuda
