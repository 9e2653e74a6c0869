// How far a GPU is: an event behind each layer or replay, asked by the thread that sends the beats.
#include <cuda_runtime.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <vector>

#include "qwen1m/job.h"

namespace qwen1m {
namespace cuda {
namespace {

struct Marks {
  std::mutex mutex;
  std::deque<cudaEvent_t> pending;
  std::vector<cudaEvent_t> free;
  std::atomic<int64_t> reached{0};
  int device = 0;
};

// Never destroyed: the thread that asks outlives the static objects of a process that ends.
Marks& marks() {
  static Marks& only = *new Marks;
  return only;
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

int64_t qwen1m_cuda_reached_marks(int32_t* pending) {
  Marks& all = marks();
  const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
  if (!lock) {  // a mark is being made, which takes as long as the GPU's queue is full
    *pending = 1;
    return all.reached;
  }
  if (!all.pending.empty()) {
    // First of all: a thread that has chosen no device makes a context on the first one, 0.5 GB of another rank's card.
    cudaSetDevice(all.device);
    // Asking is no part of a capture that another thread may be in the middle of, and must not break it.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    while (!all.pending.empty() && cudaEventQuery(all.pending.front()) == cudaSuccess) {
      all.free.push_back(all.pending.front());
      all.pending.pop_front();
      ++all.reached;
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
  }
  *pending = !all.pending.empty();
  return all.reached;
}

int qwen1m_cuda_mark_progress(const qwen1m_mark_progress*, qwen1m_stream stream) {
  cudaStreamCaptureStatus capture;
  const cudaError_t asked = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  if (asked != cudaSuccess || capture != cudaStreamCaptureStatusNone) return asked;
  Marks& all = marks();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (all.free.empty()) {
    cudaEvent_t event;
    const cudaError_t made = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (made != cudaSuccess) return made;
    all.free.push_back(event);
    cudaGetDevice(&all.device);
  }
  const cudaError_t recorded = cudaEventRecord(all.free.back(), static_cast<cudaStream_t>(stream));
  if (recorded != cudaSuccess) return recorded;
  all.pending.push_back(all.free.back());
  all.free.pop_back();
  return cudaSuccess;
}
