// PD_BUILD_OP bindings of copies between a device and the host that nothing waits for.
#include "qwen1m/post.h"

#include "call.h"

namespace qwen1m {
namespace {

// A parcel travels through Paddle as the number that its address is.
qwen1m_parcel* expect_parcel(int64_t address, int64_t offset, int64_t bytes) {
  auto* const parcel = reinterpret_cast<qwen1m_parcel*>(address);
  QWEN1M_REQUIRE(offset >= 0 && offset + bytes <= parcel->bytes,
                 text(bytes) + " bytes at " + text(offset) + " do not fit the parcel of " + text(parcel->bytes));
  return parcel;
}

int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * phi::SizeOf(tensor.dtype()); }

void post(Tensor& values, int64_t parcel, int64_t offset) {
  const int64_t bytes = bytes_of(values);
  Call(values).run(
      qwen1m_post{
          .values = values.data(),
          .parcel = expect_parcel(parcel, offset, bytes),
          .offset = offset,
          .bytes = bytes,
      },
      QWEN1M_KERNEL(post));
}

void upload(Tensor& values, int64_t parcel, int64_t offset) {
  const int64_t bytes = bytes_of(values);
  Call(values).run(
      qwen1m_upload{
          .values = memory(values),
          .parcel = expect_parcel(parcel, offset, bytes),
          .offset = offset,
          .bytes = bytes,
      },
      QWEN1M_KERNEL(upload));
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_post)
    .Inputs({"values"})
    .Outputs({"same"})
    .Attrs({"parcel: int64_t", "offset: int64_t"})
    .SetInplaceMap({{"values", "same"}})
    .SetKernelFn(PD_KERNEL(qwen1m::post));

PD_BUILD_OP(qwen1m_upload)
    .Inputs({"values"})
    .Outputs({"written"})
    .Attrs({"parcel: int64_t", "offset: int64_t"})
    .SetInplaceMap({{"values", "written"}})
    .SetKernelFn(PD_KERNEL(qwen1m::upload));
