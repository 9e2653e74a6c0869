// Clusters of thread blocks, which reach each other's shared memory: Hopper's. Elsewhere a block is alone.
#pragma once

#include "common.cuh"

namespace qwen1m {
namespace cuda {

// That a kernel's blocks form clusters, of so many along x.
inline cudaLaunchAttribute clusters_of(unsigned blocks) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  return cluster;
}

// All threads of a cluster arrive, then wait: what each has written before is visible to all.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

}  // namespace cuda
}  // namespace qwen1m
