// Parcels of a GPU: pinned memory, and an event that the host asks for until it is reached.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "qwen1m/post.h"

namespace qwen1m {
namespace cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kSmallestBytes = 1 << 16, kLargestKept = 1 << 24;
constexpr std::chrono::microseconds kSpin(50), kSleep(20);

struct Kept {
  std::mutex mutex;
  std::vector<qwen1m_parcel*> parcels;
};

// Never destroyed, as parcels are not: a process that ends may be in the middle of a copy.
Kept& kept() {
  static Kept& only = *new Kept;
  return only;
}

cudaEvent_t event_of(const qwen1m_parcel* parcel) { return static_cast<cudaEvent_t>(parcel->event); }

// cudaSuccess, cudaErrorNotReady or what went wrong. That a copy is under way is no error for the next launch to find.
cudaError_t state_of(const qwen1m_parcel* parcel) {
  const cudaError_t state = cudaEventQuery(event_of(parcel));
  if (state == cudaErrorNotReady) (void)cudaGetLastError();
  return state;
}

// Between a parcel's memory and a device's, with its event behind the copy.
int copy(qwen1m_parcel* parcel, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, qwen1m_stream stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const cudaError_t copied = cudaMemcpyAsync(to, from, bytes, kind, queue);
  return copied != cudaSuccess ? copied : cudaEventRecord(event_of(parcel), queue);
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// Pinning and unpinning memory waits for the whole device: few sizes serve all, and but for large ones all are kept.
qwen1m_parcel* qwen1m_cuda_take_parcel(int64_t bytes) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  Kept& all = kept();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto fits = [&](const qwen1m_parcel* one) {
      return one->bytes >= bytes && one->bytes / 4 < std::max(bytes, kSmallestBytes) && one->device == device &&
             state_of(one) == cudaSuccess;
    };
    const auto found = std::find_if(all.parcels.begin(), all.parcels.end(), fits);
    if (found != all.parcels.end()) {
      qwen1m_parcel* const parcel = *found;
      all.parcels.erase(found);
      return parcel;
    }
  }
  int64_t size = kSmallestBytes;
  while (size < bytes) size *= 2;
  void* memory;
  if (cudaHostAlloc(&memory, size, cudaHostAllocDefault) != cudaSuccess) return nullptr;
  cudaEvent_t event;
  if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess) {
    cudaFreeHost(memory);
    return nullptr;
  }
  return new qwen1m_parcel{memory, size, event, device};
}

void qwen1m_cuda_give_parcel(qwen1m_parcel* parcel) {
  if (parcel->bytes > kLargestKept) {
    cudaFreeHost(parcel->memory);  // waits for the copies
    cudaEventDestroy(event_of(parcel));
    delete parcel;
    return;
  }
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.parcels.push_back(parcel);
}

int qwen1m_cuda_await_parcel(qwen1m_parcel* parcel, double seconds) {
  const Clock::time_point began = Clock::now();
  while (true) {
    const cudaError_t status = state_of(parcel);
    const auto waited = Clock::now() - began;
    if (status != cudaErrorNotReady || waited >= std::chrono::duration<double>(seconds)) return status;
    if (waited >= kSpin) std::this_thread::sleep_for(kSleep);
  }
}

int qwen1m_cuda_post(const qwen1m_post* a, qwen1m_stream stream) {
  char* const to = static_cast<char*>(a->parcel->memory) + a->offset;
  return copy(a->parcel, to, a->values, a->bytes, cudaMemcpyDeviceToHost, stream);
}

int qwen1m_cuda_upload(const qwen1m_upload* a, qwen1m_stream stream) {
  const char* const from = static_cast<const char*>(a->parcel->memory) + a->offset;
  return copy(a->parcel, a->values, from, a->bytes, cudaMemcpyHostToDevice, stream);
}
