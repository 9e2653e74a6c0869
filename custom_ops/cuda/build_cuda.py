"""Compiles custom_ops/cuda with nvcc: for setup.py, CI, and tools that use the kernels without Paddle.

python custom_ops/cuda/build_cuda.py     compiles every kernel and keeps nothing
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ARCHITECTURES = ("sm_80", "compute_80", "sm_90a")
"""Machine code for Ampere and Hopper; on anything newer the driver compiles the PTX."""
FOLDER_ARCHITECTURES = {"sm90": ("sm_90a",)}
"""Folders whose kernels need instructions that only some architectures have."""
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")


def find_toolkit() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, that of the nvcc on the PATH, or /usr/local/cuda; None where there is none."""
    on_path = shutil.which("nvcc")
    candidates = (os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parents[1], "/usr/local/cuda")
    for home in (Path(candidate) for candidate in candidates if candidate):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            return home
    return None


def find_nvcc() -> str | None:
    """nvcc of the toolkit."""
    toolkit = find_toolkit()
    return None if toolkit is None else str(toolkit / "bin" / "nvcc")


def host_options(toolkit: Path) -> tuple[list[str], list[str]]:
    """How host code is compiled and linked: with the toolkit's headers, and the runtime inside the library.

    A runtime of its own gets on with whichever Paddle loads beside it; that its names are hidden keeps the two apart.
    """
    include = toolkit / "include"
    folders = [folder for folder in (include, include / "cccl") if folder.is_dir()]
    runtimes = [*toolkit.glob("lib*/libcudart_static.a"), *toolkit.glob("targets/*/lib/libcudart_static.a")]
    runtimes += toolkit.glob("lib/*/libcudart_static.a")
    if not runtimes:
        raise FileNotFoundError(f"{toolkit} has no libcudart_static.a: install the whole CUDA toolkit")
    link = [str(runtimes[0]), "-Wl,--exclude-libs,libcudart_static.a", "-lrt", "-ldl", "-lpthread"]
    return [f"-isystem{folder}" for folder in folders], link


def gencode(architecture: str) -> str:
    """nvcc's option for machine code (sm_80) or for PTX that the driver compiles (compute_80)."""
    number = architecture.rpartition("_")[2]
    return f"-gencode=arch=compute_{number},code={architecture}"


def compile_objects(out: Path, architectures: Sequence[str] = ARCHITECTURES, extra: Sequence[str] = ()) -> list[Path]:
    """One object file a .cu, compiled on all cores, for `architectures` or those of its folder.

    Raises CalledProcessError; nvcc's messages are on stderr.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    options = [*FLAGS, f"-I{FOLDER.parent / 'include'}", f"-I{FOLDER}", *extra]

    def compile_one(source: Path) -> Path:
        name = source.relative_to(FOLDER)
        target = out / f"{'_'.join(name.with_suffix('').parts)}.o"
        print(f"nvcc {name}", flush=True)
        wanted = FOLDER_ARCHITECTURES.get(name.parts[0], architectures)
        subprocess.run([nvcc, *options, *map(gencode, wanted), "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, sorted(FOLDER.rglob("*.cu"))))


def build_library(out: Path, architectures: Sequence[str] = ARCHITECTURES) -> None:
    """Links the kernels into a shared library of their own."""
    objects = compile_objects(out.parent, architectures or ARCHITECTURES)
    nvcc = find_nvcc()
    assert nvcc is not None
    subprocess.run([nvcc, "-shared", "-cudart=static", "-o", str(out), *map(str, objects)], check=True)


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as folder:
            compile_objects(Path(folder))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
