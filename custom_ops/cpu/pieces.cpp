// Pieces that lie in host memory already: copies, done at once.
#include "qwen1m/pieces.h"

#include <string.h>

namespace {

// Calls `copy` with each piece and its place in the parcel.
template <typename Copy>
int each(const qwen1m_pieces* a, Copy copy) {
  char* const first = static_cast<char*>(a->parcel->memory) + a->offset;
  for (int64_t i = 0; i < a->count; ++i)
    if (a->pieces[i] != nullptr) copy(a->pieces[i], first + i * a->bytes);
  return 0;
}

}  // namespace

int qwen1m_cpu_gather(const qwen1m_pieces* a) {
  return each(a, [&](const void* piece, void* place) { memcpy(place, piece, a->bytes); });
}

int qwen1m_cpu_scatter(const qwen1m_pieces* a) {
  return each(a, [&](void* piece, const void* place) { memcpy(piece, place, a->bytes); });
}
