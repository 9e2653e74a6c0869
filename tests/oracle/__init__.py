"""Numpy float64 reference of every custom op: what each must compute, written to be read beside the specification.

Functions carry the names, arguments and shapes of `paddle_qwen1m.ops` (its docstring explains the letters) and are
slow on purpose. Inputs are arrays of any float type that numpy holds; arithmetic and results are float64. Caches and
`out` are written in place, as the ops do. "Section" and "property" refer to the specification of dual chunk and
vertical-slash attention that the tests quote.

Beside the ops: the explicit pairwise form of dual chunk attention (pairwise.py), which shares nothing but the relative
positions' definition with the three-stage form, the rules that turn positions, lengths and recall into numbers, a
whole forward pass (model.py), and golden vectors of the index conversion (index_vectors.py).
"""

# ruff: noqa: F401  the names that `import oracle` offers

from .dense import (
    INTER,
    INTRA,
    SUCC,
    StageKeys,
    attend,
    dca_decode,
    dca_prefill,
    decode_lengths,
    dense_piece,
    merge,
    pieces_of,
    read_pages,
    stages_of,
)
from .index import IndexRow, SparseIndex, fallback, index_rows, index_stage, sparse_index, split_stages, visited_cells
from .index_tables import IndexTables, column_spans, index_tables, listed_bits, listed_columns, used_width
from .layers import (
    add_rms_norm,
    embedding,
    gather_rows,
    join_columns,
    linear,
    rms_norm,
    rotate_and_cache,
    rotate_queries,
    silu_mul,
)
from .pairwise import pairwise_dca
from .positions import (
    critical_positions,
    decode_inputs,
    inverse_frequencies,
    key_positions,
    query_positions,
    relative_positions,
    rotary_table,
    rotate,
    temperature,
)
from .sampling import (
    IN_PROMPT,
    LARGEST_COUNT,
    SETTINGS,
    allowed_tokens,
    candidates,
    log_softmax,
    mask_words,
    processed_logits,
    sample,
    top_logprobs,
    uniform,
)
from .selection import (
    LOCAL_DIAGONALS,
    PADDING,
    SINK_COLUMNS,
    dca_probe,
    diagonal_sums,
    effective_vertical_size,
    probe_scores,
    refine_budget,
    select_critical,
)
from .sparse import dca_sparse_prefill, sparse_piece
from .weight8 import numbers_of, round_rows, round_to, round_weight, widen_rows, widen_weight
