"""The library of custom ops: registered with Paddle once, called by name, and what it can use on this machine."""

from __future__ import annotations

import ctypes
import re
import warnings
from importlib import metadata
from pathlib import Path

import paddle
from paddle.base import core
from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

from paddle_qwen1m.threads import default_num_threads

LIBRARY = Path(__file__).parents[1] / "_ops.so"

_registered = False


def load() -> None:
    """Register the ops with Paddle, once. Raises ImportError, saying what to do, when the package was not built.

    Where Paddle's device is a GPU that the ops cannot use, a warning says why and the device becomes the CPU.
    """
    global _registered
    if _registered:
        return
    if not LIBRARY.exists():
        raise ImportError(f"{LIBRARY} is missing: {_why_missing()}")
    load_op_meta_info_and_register_op(str(LIBRARY))
    _registered = True
    set_num_threads(default_num_threads())
    if not paddle.device.get_device().startswith("cpu"):
        obstacle = gpu_obstacle()
        if obstacle is not None:
            warnings.warn(f"{obstacle}: Paddle's device is set to cpu", stacklevel=2)
            paddle.device.set_device("cpu")


def _why_missing() -> str:
    for distribution in metadata.distributions(name="paddle-qwen1m"):
        installed = Path(str(distribution.locate_file("paddle_qwen1m"))) / LIBRARY.name
        if installed.exists():
            return (
                f"this source tree hides the package that is installed in {installed.parent}: start Python in another "
                "directory, or run `pip install --editable . --no-build-isolation` in this one"
            )
    return "the custom ops were not built; run `pip install . --no-build-isolation`"


def gpu_obstacle() -> str | None:
    """Why the ops cannot run on Paddle's GPU, or None when they can."""
    if not paddle.device.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        return "Paddle has no NVIDIA GPU"
    if not hasattr(library(), "qwen1m_cuda_linear"):
        return "the custom ops were built without CUDA kernels"
    major, minor = paddle.device.cuda.get_device_capability()
    if major < 8:
        return f"the CUDA kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


def on_gpu() -> bool:
    """Whether tensors are made on a GPU now, by `paddle.device.set_device` or by Paddle's default."""
    load()
    return paddle.device.get_device().startswith("gpu")


def call(name: str, *arguments: object) -> list[paddle.Tensor]:
    """What the op `qwen1m_<name>` returns; ValueError naming it for arguments that do not fit."""
    load()
    try:
        result = core.eager._run_custom_op(f"qwen1m_{name}", *arguments)
    except (OSError, RuntimeError, ValueError) as error:
        reason = re.search(r"\[qwen1m\] (.*?) \[/qwen1m\]", str(error), re.DOTALL)
        if reason is None:
            raise
        raise ValueError(f"{name}: {reason.group(1)}") from None
    return result if isinstance(result, list) else [result]


def library() -> ctypes.CDLL:
    """The library's C functions."""
    load()
    return ctypes.CDLL(str(LIBRARY))


def set_num_threads(count: int) -> None:
    """Threads that every CPU op uses from now on."""
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, got {count}")
    library().qwen1m_cpu_set_num_threads(count)


def cpu_isa() -> str:
    """Instruction set of the CPU ops: avx512, avx2 or generic; the environment variable QWEN1M_CPU_ISA narrows it."""
    name = library().qwen1m_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())
