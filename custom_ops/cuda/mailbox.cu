// Memory of a rank's card that the other ranks' processes write to.
#include "mailbox.cuh"

using namespace qwen1m::cuda;

int64_t qwen1m_cuda_mailbox_bytes(int32_t degree) { return mailbox_bytes(degree); }

int qwen1m_cuda_make_mailbox(int32_t degree, int64_t* address) {
  void* memory = nullptr;
  cudaError_t status = cudaMalloc(&memory, mailbox_bytes(degree));
  if (status == cudaSuccess) status = cudaMemset(memory, 0, mailbox_bytes(degree));
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  if (status == cudaSuccess) {
    *address = reinterpret_cast<int64_t>(memory);
    return cudaSuccess;
  }
  cudaFree(memory);
  cudaGetLastError();  // told here, and not by the next launch once more
  return status;
}
