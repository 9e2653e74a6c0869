// What a GPU does in one launch: here one after the other, by way of memory.
#include "parallel.h"
#include "qwen1m/step.h"

using qwen1m::Scratch;

void qwen1m_cpu_gated_linear(const qwen1m_linear* a) {
  const Scratch gate_up(static_cast<size_t>(a->tokens * a->out_features));
  qwen1m_linear linear = *a;
  linear.y = gate_up.data;
  qwen1m_cpu_linear(&linear);
  const qwen1m_silu_mul silu{gate_up.data, a->y, a->tokens, a->out_features / 2, QWEN1M_FLOAT32};
  qwen1m_cpu_silu_mul(&silu);
}

void qwen1m_cpu_rotating_linear(const qwen1m_rotating_linear* a) {
  const Scratch qkv(static_cast<size_t>(a->linear.tokens * a->linear.out_features));
  qwen1m_rotating_linear parts = *a;
  parts.linear.y = qkv.data;
  parts.rotation.qkv = qkv.data;
  qwen1m_cpu_linear(&parts.linear);
  qwen1m_cpu_rotate_and_cache(&parts.rotation);
}
