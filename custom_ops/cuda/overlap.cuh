// Launches that overlap: on Hopper the blocks of a kernel may start while the launch before it in the stream still runs
// (programmatic dependent launch), so that a decode step of some 500 short kernels does not wait for each to drain.
//
// A kernel launched so may, before await_previous(), only read what was written before the two launches that precede
// it; every block calls that, and writes nothing before. After it, where blocks of the next launch may share the
// processors, all call admit_next(); norms do so before. So three launches at most are under way at a time, unless
// norms follow each other.
#pragma once

#include <utility>

#include "clusters.cuh"
#include "common.cuh"

namespace qwen1m {
namespace cuda {

// Waits until all launches before are complete and what they wrote is visible.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the blocks of the next launch begin where there is room, once all blocks of this one have called it or ended.
__device__ inline void admit_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether this device runs the code above, by a driver that captures such launches into graphs.
inline bool launches_overlap() {
  int driver = 0;
  return is_hopper() && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
}

// `cluster` blocks along x form a cluster; 1: none.
template <typename... Parameters, typename... Arguments>
int launch_overlapping_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 threads,
                                size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t launch{};
  launch.gridDim = grid;
  launch.blockDim = threads;
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = attributes;
  if (launches_overlap()) {
    cudaLaunchAttribute& overlap = attributes[launch.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) attributes[launch.numAttrs++] = clusters_of(cluster);
  return cudaLaunchKernelEx(&launch, kernel, std::forward<Arguments>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
int launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                       Arguments&&... arguments) {
  return launch_overlapping_clusters(kernel, 1, grid, threads, shared_bytes, stream,
                                     std::forward<Arguments>(arguments)...);
}

}  // namespace cuda
}  // namespace qwen1m
