#include "parallel.h"

#include <pthread.h>
#include <stdlib.h>

#include <new>

#include "cblas.h"
#include "qwen1m/types.h"

extern "C" void scipy_openblas_set_num_threads(int);

namespace qwen1m {

namespace {
int threads = 1;

// Before a fork. The threads that wait for this one's next team would be missing in the child, which would wait for
// them for ever; without them parent and child each start a new team.
void end_idle_team() { omp_pause_resource_all(omp_pause_hard); }

}  // namespace

int num_threads() { return threads; }

Scratch::Scratch(size_t floats) {
  const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  data = static_cast<float*>(aligned_alloc(64, bytes ? bytes : 64));
  if (!data) throw std::bad_alloc();
}

Scratch::~Scratch() { free(data); }

}  // namespace qwen1m

// The kernels share out the work themselves and call one single-threaded GEMM a task.
void qwen1m_cpu_set_num_threads(int count) {
  static const int registered = pthread_atfork(qwen1m::end_idle_team, nullptr, nullptr);
  (void)registered;
  qwen1m::threads = count;
  scipy_openblas_set_num_threads(1);
}
