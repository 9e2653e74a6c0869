// Pieces of a GPU's memory: asynchronous copies on a stream beside those that compute.
#include <cuda_runtime.h>

#include <mutex>
#include <vector>

#include "qwen1m/pieces.h"

namespace qwen1m {
namespace cuda {
namespace {

// The device's stream for pieces, made at the first call. Never destroyed: a process that ends may be in the middle of
// a copy.
cudaError_t stream_of(int32_t device, cudaStream_t* stream) {
  static std::mutex& mutex = *new std::mutex;
  static std::vector<cudaStream_t>& streams = *new std::vector<cudaStream_t>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (streams.size() <= static_cast<size_t>(device)) streams.resize(device + 1, nullptr);
  if (streams[device] == nullptr) {
    const cudaError_t made = cudaStreamCreateWithFlags(&streams[device], cudaStreamNonBlocking);
    if (made != cudaSuccess) return made;
  }
  *stream = streams[device];
  return cudaSuccess;
}

// Queues `copy` of each piece and its place in the parcel, and the parcel's event behind them.
template <typename Copy>
int each(const qwen1m_pieces* a, Copy copy) {
  cudaStream_t stream;
  cudaError_t status = cudaSetDevice(a->parcel->device);
  if (status == cudaSuccess) status = stream_of(a->parcel->device, &stream);
  char* const first = static_cast<char*>(a->parcel->memory) + a->offset;
  for (int64_t i = 0; status == cudaSuccess && i < a->count; ++i)
    if (a->pieces[i] != nullptr) status = copy(a->pieces[i], first + i * a->bytes, stream);
  return status != cudaSuccess ? status : cudaEventRecord(static_cast<cudaEvent_t>(a->parcel->event), stream);
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

int qwen1m_cuda_gather(const qwen1m_pieces* a) {
  return each(a, [&](const void* piece, void* place, cudaStream_t stream) {
    return cudaMemcpyAsync(place, piece, a->bytes, cudaMemcpyDeviceToHost, stream);
  });
}

int qwen1m_cuda_scatter(const qwen1m_pieces* a) {
  return each(a, [&](void* piece, const void* place, cudaStream_t stream) {
    return cudaMemcpyAsync(piece, place, a->bytes, cudaMemcpyHostToDevice, stream);
  });
}
