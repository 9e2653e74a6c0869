"""Compiles custom_ops/cuda with nvcc: for setup.py, CI, and tools that use the kernels without Paddle.

python custom_ops/cuda/build_cuda.py     compiles every kernel and keeps nothing
"""

from __future__ import annotations

import os
import re
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


SLOW = re.compile(r"\(C75(0[4-9]|1\d|20)\)|[1-9]\d* bytes spill")
"""What ptxas says of Hopper kernels whose products it serialised, and of any whose registers it spilled."""
MEANT_FOR = {"sm80": ("sm_80",), **FOLDER_ARCHITECTURES}
"""Where the kernels of a folder run; others on all. Hopper runs those of sm80/ with heads of 64 alone."""
KERNEL = re.compile(r"(?=Compiling entry function '\w+' for '(\w+)')")


def is_slow(messages: str, architectures: Sequence[str]) -> bool:
    """Whether ptxas said so of a kernel for one of the architectures, or of no kernel in particular."""
    general, *kernels = KERNEL.split(messages)
    said = [text for name, text in zip(kernels[::2], kernels[1::2]) if name in architectures]
    return any(map(SLOW.search, (general, *said)))


def compile_source(source: Path, target: Path, architectures: Sequence[str], extra: Sequence[str] = ()) -> None:
    """One object file for `architectures` or those of the source's folder.

    Raises CalledProcessError, also for a kernel that would be slow where it is meant to run; nvcc's messages are on
    stderr.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    name = source.relative_to(FOLDER)
    only = FOLDER_ARCHITECTURES.get(name.parts[0])
    print(f"nvcc {name}", flush=True)
    command = [nvcc, *FLAGS, f"-I{FOLDER.parent / 'include'}", f"-I{FOLDER}", *extra]
    command += [*map(gencode, only or architectures), "-c", str(source), "-o", str(target)]
    done = subprocess.run([*command, "-Xptxas=-v"], stderr=subprocess.PIPE, text=True)
    fails = done.returncode != 0 or is_slow(done.stderr, MEANT_FOR.get(name.parts[0], ARCHITECTURES))
    said = done.stderr if fails else "\n".join(line for line in done.stderr.splitlines() if "warning" in line)
    if said:
        print(said, file=sys.stderr)
    if fails:
        raise subprocess.CalledProcessError(done.returncode or 1, command)


def compile_objects(out: Path, architectures: Sequence[str] = ARCHITECTURES, extra: Sequence[str] = ()) -> list[Path]:
    """An object file in `out` for every .cu, compiled on all cores; for the rest see compile_source."""

    def compile_one(source: Path) -> Path:
        target = out / f"{'_'.join(source.relative_to(FOLDER).with_suffix('').parts)}.o"
        compile_source(source, target, architectures, extra)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, sorted(FOLDER.rglob("*.cu"))))


def link_library(out: Path, objects: Sequence[Path]) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    subprocess.run([nvcc, "-shared", "-cudart=static", "-o", str(out), *map(str, objects)], check=True)


def build_libraries(out: Path, reference: Path, architectures: Sequence[str] = ARCHITECTURES) -> None:
    """Links the kernels into shared libraries of their own: `reference` attends as cards other than Hopper do."""
    objects = compile_objects(out.parent, architectures)
    link_library(out, objects)
    dispatch = out.parent / "dispatch_sm80.o"
    compile_source(FOLDER / "dispatch.cu", dispatch, architectures, ["-DQWEN1M_SM80_ATTENTION"])
    link_library(reference, [dispatch, *(item for item in objects if item.name != "dispatch.o")])


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as folder:
            compile_objects(Path(folder))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
