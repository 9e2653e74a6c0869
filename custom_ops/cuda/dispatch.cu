// Which attention kernel runs: chosen by the device, the activations' type and the head size.
//
// With QWEN1M_SM80_ATTENTION defined Hopper runs what other cards run: the reference that its own kernels are held to.
#include <type_traits>

#include "attention.cuh"

namespace qwen1m {
namespace cuda {
namespace {

// f(T{}, D): the activations' type, and the head size as a type of its own.
template <typename F>
int with_shape(qwen1m_dtype dtype, int head_dim, F&& f) {
  return with_half_type(dtype, [&](auto type) -> int {
    switch (head_dim) {
      case 64: return f(type, std::integral_constant<int, 64>{});
      case 128: return f(type, std::integral_constant<int, 128>{});
      default: return cudaErrorInvalidValue;
    }
  });
}

bool on_hopper() {
#ifdef QWEN1M_SM80_ATTENTION
  return false;
#else
  return is_hopper();
#endif
}

bool probes_on_hopper(const qwen1m_dca_probe& a) {
  return a.cache.head_dim == 128 && sm90::takes_probe(a) && on_hopper();
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

int64_t qwen1m_cuda_dca_prefill_workspace(const qwen1m_dca_prefill* a) {
  return a->cache.head_dim == 128 && on_hopper() ? sm90::dca_prefill_workspace(*a) : 0;
}

int qwen1m_cuda_dca_prefill(const qwen1m_dca_prefill* a, void* workspace, qwen1m_stream stream) {
  return with_shape(a->activation, a->cache.head_dim, [&](auto type, auto head_dim) {
    if constexpr (head_dim.value == 128) {
      if (on_hopper()) return sm90::dca_prefill<decltype(type)>(*a, workspace, stream);
    }
    return sm80::dca_prefill<decltype(type), head_dim.value>(*a, stream);
  });
}

int64_t qwen1m_cuda_dca_sparse_prefill_workspace(const qwen1m_dca_sparse_prefill* a) {
  return a->cache.head_dim == 128 && on_hopper() ? sm90::dca_sparse_prefill_workspace(*a) : 0;
}

int qwen1m_cuda_dca_sparse_prefill(const qwen1m_dca_sparse_prefill* a, void* workspace, qwen1m_stream stream) {
  return with_shape(a->activation, a->cache.head_dim, [&](auto type, auto head_dim) {
    if constexpr (head_dim.value == 128) {
      if (on_hopper()) return sm90::dca_sparse_prefill<decltype(type)>(*a, workspace, stream);
    }
    return sm80::dca_sparse_prefill<decltype(type), head_dim.value>(*a, stream);
  });
}

int qwen1m_cuda_dca_decode(const qwen1m_dca_decode* a, void* workspace, qwen1m_stream stream) {
  return with_shape(a->activation, a->cache.head_dim, [&](auto type, auto head_dim) -> int {
    using T = decltype(type);
    if constexpr (head_dim.value == 128) {
      if (qwen1m_is_quantised(a->cache.dtype)) {
        return on_hopper() && sm90::takes_decode_bytes(*a) ? sm90::dca_decode_bytes<T>(*a, stream)
                                                           : sm80::dca_decode_bytes<T>(*a, workspace, stream);
      }
      if (on_hopper() && sm90::takes_decode(*a)) return sm90::dca_decode<T>(*a, stream);
    }
    if (qwen1m_is_quantised(a->cache.dtype)) return cudaErrorInvalidValue;
    return sm80::dca_decode<T, head_dim.value>(*a, workspace, stream);
  });
}

int64_t qwen1m_cuda_dca_probe_workspace(const qwen1m_dca_probe* a) {
  return probes_on_hopper(*a) ? sm90::dca_probe_workspace(*a) : dca_probe_workspace(*a);
}

int qwen1m_cuda_dca_probe(const qwen1m_dca_probe* a, void* workspace, qwen1m_stream stream) {
  return with_shape(a->activation, a->cache.head_dim, [&](auto type, auto head_dim) {
    if constexpr (head_dim.value == 128) {
      if (probes_on_hopper(*a)) return sm90::dca_probe<decltype(type)>(*a, workspace, stream);
    }
    return dca_probe<decltype(type), head_dim.value>(*a, workspace, stream);
  });
}
