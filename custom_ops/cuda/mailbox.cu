// Memory of a rank's card that the other ranks' processes write to.
#include <cstring>

#include "mailbox.cuh"

namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == QWEN1M_MAILBOX_NAME_BYTES, "a mailbox's name is its handle");

// An error is told here, and not by the next launch once more.
cudaError_t told(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace

using namespace qwen1m::cuda;

int64_t qwen1m_cuda_mailbox_bytes(int32_t degree) { return mailbox_bytes(degree); }

int qwen1m_cuda_make_mailbox(int32_t degree, int64_t* address, char* name) {
  void* memory = nullptr;
  cudaError_t status = cudaMalloc(&memory, mailbox_bytes(degree));
  if (status != cudaSuccess) return told(status);
  cudaIpcMemHandle_t handle;
  status = cudaMemset(memory, 0, mailbox_bytes(degree));
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  if (status == cudaSuccess) status = cudaIpcGetMemHandle(&handle, memory);
  if (status != cudaSuccess) {
    cudaFree(memory);
    return told(status);
  }
  std::memcpy(name, &handle, sizeof handle);
  *address = reinterpret_cast<int64_t>(memory);
  return cudaSuccess;
}

int qwen1m_cuda_open_mailbox(const char* name, int64_t* address) {
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, name, sizeof handle);
  void* memory = nullptr;
  const cudaError_t status = told(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess));
  *address = reinterpret_cast<int64_t>(memory);
  return status;
}
