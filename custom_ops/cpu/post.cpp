// Tensors that lie in host memory already: copies, done at once.
#include "qwen1m/post.h"

#include <stdlib.h>
#include <string.h>

qwen1m_parcel* qwen1m_cpu_take_parcel(int64_t bytes) {
  void* memory = malloc(bytes > 0 ? bytes : 1);
  return memory == nullptr ? nullptr : new qwen1m_parcel{memory, bytes, nullptr, 0};
}

void qwen1m_cpu_give_parcel(qwen1m_parcel* parcel) {
  free(parcel->memory);
  delete parcel;
}

int qwen1m_cpu_await_parcel(qwen1m_parcel*, double) { return 0; }

void qwen1m_cpu_post(const qwen1m_post* a) {
  memcpy(static_cast<char*>(a->parcel->memory) + a->offset, a->values, a->bytes);
}

void qwen1m_cpu_upload(const qwen1m_upload* a) {
  memcpy(a->values, static_cast<const char*>(a->parcel->memory) + a->offset, a->bytes);
}
