"""Qwen2.5-7B/14B-Instruct-1M on PaddlePaddle. Importing this package registers the model with PaddleNLP."""

from paddle_qwen1m.threads import default_num_threads

_num_threads = default_num_threads()  # before Paddle is imported, which sets OMP_NUM_THREADS

from paddle_qwen1m import ops  # noqa: E402
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM, register  # noqa: E402

ops.set_num_threads(_num_threads)
register()

__all__ = ["Qwen2OneMForCausalLM", "ops", "register"]
__version__ = "0.1.0"
