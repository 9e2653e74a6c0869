#!/usr/bin/env bash
# Runs every CUDA kernel on small shapes under compute-sanitizer: memory errors, then races in shared memory.
#   python tools/cuda_library.py && tools/sanitize_gpu.sh [memcheck racecheck]
set -euo pipefail
cd "$(dirname "$0")/.."

attention=tests/gpu/test_attention.py
cases=(
    "$attention::test_dense_prefill_at_borders[64-129]"
    "$attention::test_dense_prefill_at_borders[256-1537]"
    "$attention::test_dense_prefill_of_every_shape[5-1-128-dtype0]"
    "$attention::test_pieces_of_many_sequences_in_one_call"
    "$attention::test_sparse_prefill_attends_to_what_its_index_names[budget2-1100-70-5-1-128-dtype0]"
    "$attention::test_sparse_prefill_attends_to_what_its_index_names[budget1-2500-450-4-2-64-dtype1]"
    "$attention::test_decode_batch_of_different_lengths[7-1-128-dtype0]"
    "$attention::test_decode_batch_of_different_lengths[14-2-64-dtype1]"
    "tests/gpu/test_probe.py::test_sums_of_columns_and_diagonals[dtype0-128-1088-64]"
    "tests/gpu/test_probe.py::test_sums_of_columns_and_diagonals[dtype1-64-40-40]"
    "tests/gpu/test_select_critical.py::test_forced_entries_come_first"
    "tests/gpu/test_sparse_index.py::test_golden_vectors"
    "tests/gpu/test_sparse_index.py::test_no_selection_at_all"
    "tests/gpu/test_sampling.py::test_every_row_has_settings_of_its_own[1501]"
    "tests/gpu/test_sampling.py::test_equal_logits_are_ordered_by_id"
    "tests/gpu/test_step_ops.py::test_rotary_table"
    "tests/gpu/test_step_ops.py::test_rotate_queries"
    "tests/gpu/test_step_ops.py::test_decode_inputs"
    "tests/gpu/test_step_ops.py::test_linear_of_any_few_rows"
    "tests/gpu/test_step_ops.py::test_rms_norm[True-1.0-17-3584-dtype0]"
    "tests/gpu/test_step_ops.py::test_silu_mul[3-104-dtype1]"
    "tests/gpu/test_step_ops.py::test_rotate_and_cache"
)
for tool in ${*:-memcheck racecheck}; do
    echo "compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --kernel-name-exclude kernel_substring=at:: --error-exitcode 9 \
        python3 -m pytest -q -p no:cacheprovider "${cases[@]}" 2>&1 | tail -n 6
done
