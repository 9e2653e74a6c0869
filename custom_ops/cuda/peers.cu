// Memory of other ranks' cards: names, and rows that the copy engines bring there beside the computation. A product
// leaves no processor free, so that a kernel that copied would run behind it instead of beside it.
#include <cuda.h>

#include <cstring>
#include <memory>

#include "common.cuh"
#include "driver.h"
#include "qwen1m/peers.h"

namespace {

using namespace qwen1m::cuda;

static_assert(sizeof(cudaIpcMemHandle_t) == QWEN1M_MEMORY_NAME_BYTES, "an allocation's name is its handle");

constexpr int kMostOthers = QWEN1M_PEER_RANKS - 1;

struct Copier {
  cudaStream_t stream;
  cudaEvent_t ready, sent[QWEN1M_COPIER_MARKS];
  uint32_t* numbers;  // 0, 1, 2, ...: what comes into a flag is copied, too, so that it is behind the rows
};

Copier& copier_at(int64_t address) { return *reinterpret_cast<Copier*>(address); }

void* memory_at(int64_t address) { return reinterpret_cast<void*>(address); }

// An error is told here, and not by the next launch once more.
cudaError_t told(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Of steps that give a status, the first that is not a success; those behind it are not done.
template <typename... Steps>
cudaError_t in_turn(Steps... steps) {
  cudaError_t status = cudaSuccess;
  (void)((status = steps(), status == cudaSuccess) && ...);
  return told(status);
}

bool takes(int32_t count, int32_t number, int32_t mark) {
  return count >= 1 && count <= kMostOthers && number >= 0 && number < QWEN1M_PEER_NUMBERS && mark >= 0 &&
         mark < QWEN1M_COPIER_MARKS;
}

struct Flags {
  const uint32_t* of[kMostOthers];
};

__global__ void await_rows_kernel(const __grid_constant__ Flags flags, uint32_t number) {
  const uint32_t* flag = flags.of[threadIdx.x];
  uint32_t seen;
  do {
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen != number);
}

}  // namespace

int qwen1m_cuda_make_copier(int64_t* copier) {
  auto made = std::make_unique<Copier>();
  uint32_t numbers[QWEN1M_PEER_NUMBERS];
  for (uint32_t i = 0; i < QWEN1M_PEER_NUMBERS; ++i) numbers[i] = i;
  const cudaError_t status =
      in_turn([&] { return cudaStreamCreateWithFlags(&made->stream, cudaStreamNonBlocking); },
              [&] { return cudaEventCreateWithFlags(&made->ready, cudaEventDisableTiming); },
              [&] {
                cudaError_t status = cudaSuccess;
                for (cudaEvent_t& sent : made->sent) {
                  if (status == cudaSuccess) status = cudaEventCreateWithFlags(&sent, cudaEventDisableTiming);
                }
                return status;
              },
              [&] { return cudaMalloc(&made->numbers, sizeof numbers); },
              [&] { return cudaMemcpy(made->numbers, numbers, sizeof numbers, cudaMemcpyHostToDevice); });
  if (status == cudaSuccess) *copier = reinterpret_cast<int64_t>(made.release());
  return status;
}

int qwen1m_cuda_name_memory(int64_t address, char* name, int64_t* offset) {
  static const auto find_range = find_driver_function<decltype(&cuMemGetAddressRange)>("cuMemGetAddressRange", 3020);
  if (find_range == nullptr) return cudaErrorNotSupported;
  CUdeviceptr begin;
  size_t bytes;
  if (find_range(&begin, &bytes, static_cast<CUdeviceptr>(address)) != CUDA_SUCCESS) return cudaErrorInvalidValue;
  cudaIpcMemHandle_t handle;
  const cudaError_t status = told(cudaIpcGetMemHandle(&handle, memory_at(static_cast<int64_t>(begin))));
  if (status != cudaSuccess) return status;
  std::memcpy(name, &handle, sizeof handle);
  *offset = address - static_cast<int64_t>(begin);
  return cudaSuccess;
}

int qwen1m_cuda_open_memory(const char* name, int64_t* address) {
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, name, sizeof handle);
  void* memory = nullptr;
  const cudaError_t status = told(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess));
  *address = reinterpret_cast<int64_t>(memory);
  return status;
}

int qwen1m_cuda_send_rows(const qwen1m_send_rows* a, qwen1m_stream stream) {
  if (!takes(a->count, a->number, a->mark) || a->bytes < 0) return cudaErrorInvalidValue;
  const Copier& copier = copier_at(a->copier);
  cudaError_t status = in_turn([&] { return cudaEventRecord(copier.ready, as_stream(stream)); },
                               [&] { return cudaStreamWaitEvent(copier.stream, copier.ready); });
  const auto copy = [&](int64_t to, const void* from, size_t bytes) {
    return cudaMemcpyAsync(memory_at(to), from, bytes, cudaMemcpyDefault, copier.stream);
  };
  for (int i = 0; i < a->count && status == cudaSuccess; ++i) {
    status = in_turn([&] { return copy(a->to[i], memory_at(a->from[i]), a->bytes); },
                     [&] { return copy(a->flags[i], copier.numbers + a->number, sizeof(uint32_t)); });
  }
  return status == cudaSuccess ? told(cudaEventRecord(copier.sent[a->mark], copier.stream)) : status;
}

int qwen1m_cuda_await_rows(const qwen1m_await_rows* a, qwen1m_stream stream) {
  if (!takes(a->count, a->number, a->mark)) return cudaErrorInvalidValue;
  if (a->copier != 0) {
    const cudaError_t status = told(cudaStreamWaitEvent(as_stream(stream), copier_at(a->copier).sent[a->mark]));
    if (status != cudaSuccess) return status;
  }
  Flags flags{};
  for (int i = 0; i < a->count; ++i) flags.of[i] = static_cast<const uint32_t*>(memory_at(a->flags[i]));
  await_rows_kernel<<<1, a->count, 0, as_stream(stream)>>>(flags, static_cast<uint32_t>(a->number));
  return cudaGetLastError();
}
