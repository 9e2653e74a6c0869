// What a process says to the other ranks of its job without Python: that it lives, what it has done, how it ended.
//
// It says so over the sockets of parallel/job.py, in the frames of parallel/connection.py: a length of 8 bytes,
// little-endian, then JSON. Each beat is {"kind": "beat", "work": w, "entered": e, "busy": 0 or 1}, see
// qwen1m_progress. The last frame of a process that ends by exit is {"kind": "exit", "status": s, ...} with the same
// counters. One that is killed, crashes or calls _exit sends none: its connection closes without a word.
#pragma once

#include "qwen1m/types.h"

typedef struct {
  int64_t work;     // tiles that the CPU ops have finished, and marks that a GPU has reached
  int64_t entered;  // collectives and replays that the host has begun: as many on every rank of a job
  int32_t busy;     // 1 while a collective waits, or a GPU has not reached its last mark
} qwen1m_progress;

QWEN1M_API void qwen1m_read_progress(qwen1m_progress* out);

// Around each collective that the host calls.
QWEN1M_API void qwen1m_enter_collective(void);
QWEN1M_API void qwen1m_leave_collective(void);

// A mark behind all that was computed so far.
typedef struct {
} qwen1m_mark_progress;

QWEN1M_API void qwen1m_cpu_mark_progress(const qwen1m_mark_progress*);

// Inside a capture there is no mark.
QWEN1M_API int qwen1m_cuda_mark_progress(const qwen1m_mark_progress*, qwen1m_stream);
// How many marks the GPU has reached, and whether there are others; asked without waiting.
QWEN1M_API int64_t qwen1m_cuda_reached_marks(int32_t* pending);

// The marks of a GPU belong to this process's progress.
QWEN1M_API void qwen1m_count_marks(int64_t (*reached_marks)(int32_t* pending));
QWEN1M_API void qwen1m_count_replay(void);

// From now on `fd`, a connected socket, gets a beat every `seconds`, and the last frame.
QWEN1M_API void qwen1m_open_peer(int fd, double seconds);
// It gets nothing more; to be called before it is closed.
QWEN1M_API void qwen1m_close_peer(int fd);
// Sends the frame behind those that are not out yet; 0, or the errno of what went wrong. After `seconds` ETIMEDOUT: the
// next call, with another frame or an empty one, goes on with it; or EBUSY: another thread's frame is on its way still,
// and this one was not taken.
QWEN1M_API int qwen1m_send_to_peer(int fd, const char* frame, int64_t size, double seconds);
