// One call of an op: checks that its tensors fit and lie on one device, allocates there, runs that device's kernel.
//
// What does not fit stops with the argument and what it got. Values of tensors on a GPU are never looked at, since that
// would make the host wait: they are checked on a CPU alone.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "paddle/phi/api/all.h"
#include "qwen1m/pages.h"

// The CUDA face of a kernel, where there is one.
#ifdef QWEN1M_WITH_CUDA
#include <cuda_runtime_api.h>
#define QWEN1M_CUDA(function) function
#else
#define QWEN1M_CUDA(function) nullptr
#endif
// Arguments of Call::run: a kernel's two faces, with workspace on a GPU or without.
#define QWEN1M_KERNEL(name) qwen1m_cpu_##name, QWEN1M_CUDA(qwen1m_cuda_##name)
#define QWEN1M_WORKSPACE_KERNEL(name) QWEN1M_KERNEL(name), QWEN1M_CUDA(qwen1m_cuda_##name##_workspace)

namespace qwen1m {

using paddle::DataType;
using paddle::Tensor;
using OptionalTensor = paddle::optional<Tensor>;
using Shape = std::vector<int64_t>;  // -1 stands for any size
using Tensors = std::vector<Tensor>;

inline std::string text(int64_t number) { return std::to_string(number); }

inline std::string text(const Shape& shape) {
  std::string out;
  for (const int64_t size : shape) out += (out.empty() ? "" : ", ") + (size < 0 ? "*" : text(size));
  return "[" + out + "]";
}

// paddle_qwen1m/ops shows the user what stands between the marks.
[[noreturn]] inline void refuse(const std::string& reason) { PD_THROW("[qwen1m] " + reason + " [/qwen1m]"); }

// The reason is put together only when the condition does not hold.
#define QWEN1M_REQUIRE(condition, reason) \
  do {                                    \
    if (!(condition)) refuse(reason);     \
  } while (false)

// What the struct of a kernel takes: the tensor's memory, to be written or not.
template <typename T>
T* pointer(const Tensor& tensor) {
  return const_cast<T*>(tensor.data<T>());
}
inline void* memory(const Tensor& tensor) { return const_cast<void*>(tensor.data()); }

inline qwen1m_dtype storage_type(const Tensor& tensor, const char* name) {
  switch (tensor.dtype()) {
    case DataType::FLOAT32: return QWEN1M_FLOAT32;
    case DataType::BFLOAT16: return QWEN1M_BFLOAT16;
    case DataType::FLOAT16: return QWEN1M_FLOAT16;
    default: break;
  }
  refuse(std::string(name) + " must be float32, bfloat16 or float16, got " + phi::DataTypeToString(tensor.dtype()));
}

// "float32", "bfloat16" or "float16"
inline DataType named_type(const std::string& dtype) {
  if (dtype == "float32") return DataType::FLOAT32;
  if (dtype == "bfloat16") return DataType::BFLOAT16;
  if (dtype == "float16") return DataType::FLOAT16;
  refuse("dtype must be float32, bfloat16 or float16, got " + dtype);
}

class Call {
 public:
  // The op runs where `like` lies.
  explicit Call(const Tensor& like) : like_(like), gpu_(like.is_gpu()) {
#ifndef QWEN1M_WITH_CUDA
    QWEN1M_REQUIRE(!gpu_, "the custom ops were built without CUDA kernels, got a tensor on a GPU");
#endif
  }

  bool on_gpu() const { return gpu_; }

  void expect_shape(const Tensor& tensor, const char* name, const Shape& expected) const {
    QWEN1M_REQUIRE(tensor.place() == like_.place(), std::string(name) + " must lie on " + like_.place().DebugString() +
                                                        " as the others do, got " + tensor.place().DebugString());
    const Shape actual = tensor.shape();
    bool same = actual.size() == expected.size();
    for (size_t i = 0; same && i < actual.size(); ++i) same = expected[i] < 0 || actual[i] == expected[i];
    QWEN1M_REQUIRE(same, std::string(name) + " must have shape " + text(expected) + ", got " + text(actual));
  }

  void expect(const Tensor& tensor, const char* name, DataType type, const Shape& shape) const {
    QWEN1M_REQUIRE(tensor.dtype() == type, std::string(name) + " must be " + phi::DataTypeToString(type) + ", got " +
                                               phi::DataTypeToString(tensor.dtype()));
    expect_shape(tensor, name, shape);
  }

  // What passes between ops: float32 on a CPU, bfloat16 or float16 on a GPU.
  qwen1m_dtype expect_activation(const Tensor& tensor, const char* name, const Shape& shape) {
    if (gpu_) return expect_stored(tensor, name, shape);
    expect(tensor, name, DataType::FLOAT32, shape);
    return QWEN1M_FLOAT32;
  }

  // Weights and caches: any of the three types on a CPU; on a GPU one type of 16 bits, that of the activations.
  qwen1m_dtype expect_stored(const Tensor& tensor, const char* name, const Shape& shape) {
    expect_shape(tensor, name, shape);
    const qwen1m_dtype type = storage_type(tensor, name);
    if (!gpu_) return type;
    QWEN1M_REQUIRE(type != QWEN1M_FLOAT32, std::string(name) + " must be bfloat16 or float16 on a GPU, got float32");
    if (activation_ == DataType::UNDEFINED) activation_ = tensor.dtype();
    QWEN1M_REQUIRE(tensor.dtype() == activation_, std::string(name) + " must be " + phi::DataTypeToString(activation_) +
                                                      " as the others are, got " +
                                                      phi::DataTypeToString(tensor.dtype()));
    return type;
  }

  // The pages of one layer; both caches are of one type and shape. What their numbers stand for, scales float16
  // [2, pages, page_size, G] of keys and values and frame float32 [2, G, D], powers and centre, comes with bytes alone:
  // int8, or uint8 that hold E4M3, for which Paddle has had a type since version 3.
  qwen1m_cache expect_cache(const Tensor& key, const Tensor& value, const OptionalTensor& scales,
                            const OptionalTensor& frame) {
    const bool int8 = key.dtype() == DataType::INT8, quantised = int8 || key.dtype() == DataType::UINT8;
    QWEN1M_REQUIRE(quantised == static_cast<bool>(scales) && quantised == static_cast<bool>(frame),
                   "scales and frame belong to a cache of int8 or uint8, and it to them; key_cache is " +
                       phi::DataTypeToString(key.dtype()));
    if (quantised) expect_shape(key, "key_cache", {-1, -1, -1, -1});
    const qwen1m_dtype type = int8        ? QWEN1M_INT8
                              : quantised ? QWEN1M_E4M3
                                          : expect_stored(key, "key_cache", {-1, -1, -1, -1});
    expect(value, "value_cache", key.dtype(), key.shape());
    const Shape shape = key.shape();
    QWEN1M_REQUIRE(shape[3] == 64 || shape[3] == 128, "head_dim must be 64 or 128, got " + text(shape[3]));
    expect_page_size(shape[1]);
    qwen1m_cache cache{memory(key),
                       memory(value),
                       type,
                       static_cast<int32_t>(shape[1]),
                       static_cast<int32_t>(shape[2]),
                       static_cast<int32_t>(shape[3]),
                       {}};
    if (quantised) {
      expect(*scales, "scales", DataType::FLOAT16, {2, shape[0], shape[1], shape[2]});
      expect(*frame, "frame", DataType::FLOAT32, {2, shape[2], shape[3]});
      auto* scale = static_cast<char*>(memory(*scales));
      const auto* power = frame->data<float>();
      cache.frame = {scale, scale + shape[0] * shape[1] * shape[2] * qwen1m_bytes_of(QWEN1M_FLOAT16), power,
                     power + shape[2] * shape[3]};
    }
    return cache;
  }

  // One that the CUDA kernels of prefill read: 8-bit pages are dequantised first.
  qwen1m_cache expect_readable_cache(const Tensor& key, const Tensor& value, const OptionalTensor& scales,
                                     const OptionalTensor& frame) {
    const qwen1m_cache cache = expect_cache(key, value, scales, frame);
    QWEN1M_REQUIRE(!gpu_ || !qwen1m_is_quantised(cache.dtype),
                   "key_cache must be dequantised first on a GPU, got " + phi::DataTypeToString(key.dtype()));
    return cache;
  }

  // The CUDA kernels move 8 values of a row at a time.
  void expect_width(int64_t width) const {
    QWEN1M_REQUIRE(!gpu_ || width % 8 == 0, "rows must hold a multiple of 8 values on a GPU, got " + text(width));
  }

  void expect_page_size(int64_t size) const {
    QWEN1M_REQUIRE(size >= 1, "page_size must be at least 1, got " + text(size));
    QWEN1M_REQUIRE(!gpu_ || (size >= 64 && (size & (size - 1)) == 0),
                   "page_size must be a power of two and at least 64 on a GPU, got " + text(size));
  }

  // The pages for keys [0, end) must exist: entry `first` of the tables is the sequence's first.
  void expect_pages(const Tensor& tables, int64_t first, int64_t end, const Tensor& key_cache) const {
    const int64_t page_size = key_cache.shape()[1], pages = key_cache.shape()[0], width = tables.shape().back();
    QWEN1M_REQUIRE(end >= 1 && end <= width * page_size,
                   "the block table has room for " + text(width * page_size) + " keys, got " + text(end));
    if (gpu_) return;
    const int32_t* table = tables.data<int32_t>() + first;
    for (int64_t i = 0; i < (end + page_size - 1) / page_size; ++i) {
      QWEN1M_REQUIRE(table[i] >= 0 && table[i] < pages,
                     "page " + text(table[i]) + " of the block table is not one of the cache's " + text(pages));
    }
  }

  Tensor make(const Shape& shape, DataType type) const { return paddle::empty(shape, type, like_.place()); }

  // In the type of the activations, which an argument has shown.
  Tensor make_activation(const Shape& shape) const { return make(shape, gpu_ ? activation_ : DataType::FLOAT32); }

  template <typename Arguments, typename Cpu, typename Cuda>
  void run(const Arguments& arguments, Cpu cpu, [[maybe_unused]] Cuda cuda) const {
    if (!gpu_) return cpu(&arguments);
#ifdef QWEN1M_WITH_CUDA
    expect_success(cuda(&arguments, like_.stream()));
#endif
  }

  template <typename Arguments, typename Cpu, typename Cuda, typename Workspace>
  void run(const Arguments& arguments, Cpu cpu, [[maybe_unused]] Cuda cuda,
           [[maybe_unused]] Workspace workspace_bytes) const {
    if (!gpu_) return cpu(&arguments);
#ifdef QWEN1M_WITH_CUDA
    const Tensor workspace = make({std::max<int64_t>(1, workspace_bytes(&arguments))}, DataType::UINT8);
    expect_success(cuda(&arguments, memory(workspace), like_.stream()));
#endif
  }

 private:
#ifdef QWEN1M_WITH_CUDA
  static void expect_success(int status) {
    QWEN1M_REQUIRE(status == cudaSuccess,
                   "CUDA error " + text(status) + " (" + cudaGetErrorString(static_cast<cudaError_t>(status)) + ")");
  }
#endif

  const Tensor& like_;
  const bool gpu_;
  DataType activation_ = DataType::UNDEFINED;
};

}  // namespace qwen1m
