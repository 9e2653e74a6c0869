// Threads and scratch memory of the CPU kernels.
#pragma once

#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#include "progress.h"
#include "qwen1m/types.h"

namespace qwen1m {

constexpr int kBlock = QWEN1M_ROW_BLOCK;  // rows of a row block and keys of a block of the sparse index
constexpr int kProbeRows = 64;            // at most so many critical queries

int num_threads();

// Floats aligned to a cache line, freed with the object. Throws std::bad_alloc.
struct Scratch {
  explicit Scratch(size_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data;
};

// Runs body(task, arena) for task = 0..tasks-1, taken in order by whichever thread is free; the arena is the thread's
// own and holds `arena_floats` floats.
template <typename Body>
void parallel_tasks(int64_t tasks, size_t arena_floats, const Body& body) {
  const int threads = tasks < num_threads() ? static_cast<int>(tasks) : num_threads();
  if (threads < 1) return;
  const size_t stride = (arena_floats + 15) / 16 * 16;
  Scratch arenas(stride * threads);
#pragma omp parallel num_threads(threads)
  {
    float* arena = arenas.data + stride * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      body(task, arena);
      advance();
    }
  }
}

// Runs body(begin, end) over contiguous shares of 0..count-1.
template <typename Body>
void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  const int64_t shares = (count + grain - 1) / grain;
  const int threads = shares < num_threads() ? static_cast<int>(shares) : num_threads();
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    advance();
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num();
    body(count * thread / threads, count * (thread + 1) / threads);
    advance();
  }
}

}  // namespace qwen1m
