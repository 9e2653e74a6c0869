// Runs of bytes at a distance from one another, each a system call: too short for an interpreter to make them.
#include "qwen1m/files.h"

#include <errno.h>
#include <unistd.h>

int qwen1m_cpu_read_rows(qwen1m_read* a) {
  a->done = 0;
  for (int64_t row = 0; row < a->rows; ++row) {
    char* const out = static_cast<char*>(a->out) + row * a->out_pitch;
    for (int64_t have = 0; have < a->bytes;) {
      const ssize_t got = pread(a->descriptor, out + have, a->bytes - have, a->position + row * a->pitch + have);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return errno;
      if (got == 0) return 0;
      have += got;
      a->done += got;
    }
  }
  return 0;
}
