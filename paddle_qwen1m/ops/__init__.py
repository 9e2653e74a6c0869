"""Python face of the custom ops: one function an op, one signature on every device.

Shapes use these letters: T rows (tokens) of a step, S sequences, H query heads, G KV heads, D head_dim, V query
variants (1 to 3, in the order of `Stage`), M keys that the last row of a piece sees, R row blocks of a piece.

Attention reads a paged cache: `key_cache` and `value_cache` are [pages, page_size, G, D]; a sequence's block table
lists its pages in order. Cached keys are rotated at p mod L and never multiplied by the temperature: the caller puts
m(n)^2 into `scale`. L is `chunk_len` = chunk_size - local_size, a multiple of page_size.

A cache may be of 8 bits, int8 or uint8 that hold E4M3 (Paddle 2.6 has no type for these): what its numbers stand for
is a `Quantised`, which the ops that read or write them take beside it. On a GPU rotate_and_cache, dca_decode and
copy_page do; others read pages that `dequantize_pages` has widened.

A weight may be bytes with scales, a `Weight8`.

An op runs where its tensors lie, all on one device. Activations are float32 on a CPU, where weights and caches are
float32, bfloat16 or float16; on a GPU activations, weights and caches are of one type, bfloat16 or float16, and a page
holds a power of two of tokens, at least 64. The residual stream, rotary tables, scales, LSE, sums and logits are
float32 everywhere.

Shapes and types are checked as the op is called (custom_ops/paddle); what does not fit raises ValueError naming the op,
the argument and what it got. Values (ids, slots, lengths, pages) are checked on a CPU only: on a GPU an op launches its
kernels and does not wait.
"""

from paddle_qwen1m.ops.attention import Stage, dca_decode, dca_prefill, dca_sparse_prefill
from paddle_qwen1m.ops.files import read_rows
from paddle_qwen1m.ops.keys import PROBE_ROWS, SparseIndex, dca_probe, index_chains, select_critical, sparse_index
from paddle_qwen1m.ops.library import LIBRARY, cpu_isa, gpu_obstacle, load, on_gpu, set_num_threads
from paddle_qwen1m.ops.mailbox import MAILBOX_ROWS, MAILBOX_WIDTH, make_mailbox, sending_linear, sum_rms_norm
from paddle_qwen1m.ops.pages import Quantised, copy_page, dequantize_pages
from paddle_qwen1m.ops.peers import (
    COPIER_MARKS,
    PEER_NUMBERS,
    PEER_RANKS,
    await_rows,
    make_copier,
    name_memory,
    open_memory,
    parts_rms_norm,
    send_rows,
)
from paddle_qwen1m.ops.pieces import PieceBuffer
from paddle_qwen1m.ops.post import Post, tensor, upload
from paddle_qwen1m.ops.progress import mark_progress
from paddle_qwen1m.ops.sampling import IN_PROMPT, LARGEST_COUNT, sample, top_logprobs
from paddle_qwen1m.ops.step import (
    FEW_ROWS,
    add_rms_norm,
    cast,
    decode_inputs,
    embedding,
    gated_linear,
    gather_rows,
    join_columns,
    linear,
    rms_norm,
    rotary_table,
    rotate_and_cache,
    rotate_queries,
    rotating_linear,
    silu_mul,
)
from paddle_qwen1m.ops.weight8 import FEW_ROWS as FEW_ROWS_OF_8_BITS
from paddle_qwen1m.ops.weight8 import (
    Rows8,
    Weight8,
    WidenedOnce,
    add_rms_norm8,
    gated_product8,
    multiplies_rows8,
    product8,
    rms_norm8,
    round_rows,
    round_weight,
    widen_weight,
)

__all__ = [
    "COPIER_MARKS",
    "FEW_ROWS",
    "FEW_ROWS_OF_8_BITS",
    "IN_PROMPT",
    "LARGEST_COUNT",
    "LIBRARY",
    "MAILBOX_ROWS",
    "MAILBOX_WIDTH",
    "PEER_NUMBERS",
    "PEER_RANKS",
    "PROBE_ROWS",
    "PieceBuffer",
    "Post",
    "Quantised",
    "Rows8",
    "SparseIndex",
    "Stage",
    "Weight8",
    "WidenedOnce",
    "add_rms_norm",
    "add_rms_norm8",
    "await_rows",
    "cast",
    "copy_page",
    "cpu_isa",
    "dca_decode",
    "dca_prefill",
    "dca_probe",
    "dca_sparse_prefill",
    "decode_inputs",
    "dequantize_pages",
    "embedding",
    "gated_linear",
    "gated_product8",
    "gather_rows",
    "gpu_obstacle",
    "index_chains",
    "join_columns",
    "linear",
    "load",
    "make_copier",
    "make_mailbox",
    "mark_progress",
    "multiplies_rows8",
    "name_memory",
    "on_gpu",
    "open_memory",
    "parts_rms_norm",
    "product8",
    "read_rows",
    "rms_norm",
    "rms_norm8",
    "rotary_table",
    "rotate_and_cache",
    "rotate_queries",
    "rotating_linear",
    "round_rows",
    "round_weight",
    "sample",
    "select_critical",
    "send_rows",
    "sending_linear",
    "set_num_threads",
    "silu_mul",
    "sparse_index",
    "sum_rms_norm",
    "tensor",
    "top_logprobs",
    "upload",
    "widen_weight",
]
