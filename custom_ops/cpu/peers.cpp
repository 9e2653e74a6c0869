// Rows that ranks bring into each other's memory, and their sums.
#include "qwen1m/peers.h"

#include <string.h>

#include <thread>

namespace {

uint32_t* flag_at(int64_t address) { return reinterpret_cast<uint32_t*>(address); }

}  // namespace

void qwen1m_cpu_send_rows(const qwen1m_send_rows* a) {
  for (int i = 0; i < a->count; ++i) {
    memcpy(reinterpret_cast<void*>(a->to[i]), reinterpret_cast<const void*>(a->from[i]), a->bytes);
    __atomic_store_n(flag_at(a->flags[i]), static_cast<uint32_t>(a->number), __ATOMIC_RELEASE);
  }
}

void qwen1m_cpu_await_rows(const qwen1m_await_rows* a) {
  for (int i = 0; i < a->count; ++i) {
    while (__atomic_load_n(flag_at(a->flags[i]), __ATOMIC_ACQUIRE) != static_cast<uint32_t>(a->number)) {
      std::this_thread::yield();
    }
  }
}

void qwen1m_cpu_parts_rms_norm(const qwen1m_parts_rms_norm* a) {
  qwen1m_rms_norm norm = a->norm;
  const auto* own = static_cast<const float*>(norm.delta);
  const auto* part = static_cast<const float*>(a->parts);
  for (int64_t i = 0; i < norm.tokens * norm.width; ++i) {
    float sum = 0;
    for (int rank = 0; rank < a->degree; ++rank) {
      sum += rank == a->rank ? own[i] : part[(rank - (rank > a->rank)) * a->stride + i];
    }
    norm.residual[i] += sum;
  }
  norm.delta = nullptr;
  qwen1m_cpu_rms_norm(&norm);
}
