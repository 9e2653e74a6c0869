// PD_BUILD_OP binding of the marks that tell how far the computation is.
#include "qwen1m/job.h"

#include "call.h"

namespace qwen1m {
namespace {

void mark_progress(Tensor& values, bool replayed) {
  const Call call(values);
#ifdef QWEN1M_WITH_CUDA
  if (call.on_gpu()) qwen1m_count_marks(qwen1m_cuda_reached_marks);
#endif
  if (replayed) qwen1m_count_replay();
  call.run(qwen1m_mark_progress{}, QWEN1M_KERNEL(mark_progress));
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_mark_progress)
    .Inputs({"values"})
    .Outputs({"same"})
    .Attrs({"replayed: bool"})
    .SetInplaceMap({{"values", "same"}})
    .SetKernelFn(PD_KERNEL(qwen1m::mark_progress));
