"""Builds the package and its custom ops, against the Paddle that is installed: `pip install . --no-build-isolation`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "custom_ops" / "cuda"))
import build_cuda

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = ROOT / "custom_ops" / "cpu"
BINDINGS = ROOT / "custom_ops" / "paddle"
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


def stop(reason: str) -> NoReturn:
    sys.exit(f"paddle-qwen1m: {reason}")


def find_toolkit(paddle_has_cuda: bool) -> Path | None:
    """The CUDA toolkit to build GPU kernels with; None, saying why, where there will be none."""
    toolkit = build_cuda.find_toolkit() if paddle_has_cuda else None
    if not paddle_has_cuda:
        print("paddle-qwen1m: no GPU kernels, because the installed Paddle is built for CPUs only")
    elif toolkit is None:
        print("paddle-qwen1m: no GPU kernels, because no CUDA toolkit was found: put nvcc on the PATH or set CUDA_HOME")
    return toolkit


class BuildOps(build_ext):
    """Compiles paddle_qwen1m/_ops.so: one object file a kernel source, each with its instruction set's flags.

    CUDA kernels are in it where the installed Paddle is built with CUDA and the toolkit is there.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, extension: Extension) -> None:
        try:
            import paddle
            import scipy_openblas32
        except ImportError as error:
            stop(
                f"{error.name} is not installed; the ops are built against it: first `pip install setuptools "
                "setuptools_scm wheel scipy-openblas32 paddlepaddle==3.3.1` (or your paddlepaddle-gpu), then "
                "`pip install . --no-build-isolation`"
            )
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            stop(f"no C++ compiler ({compiler}) on the PATH: install g++ (`apt-get install g++`) or set CXX")
        self.compiler.set_executable("compiler_so", [compiler])
        self.compiler.set_executable("linker_so", [compiler, "-shared"])

        common = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wall", "-Wextra"]
        include = str(ROOT / "custom_ops" / "include")
        kernels = sorted(CPU_SOURCES.glob("*.cpp"))
        if platform.machine() != "x86_64":
            kernels = [source for source in kernels if source.name not in ISA_FLAGS]
        kernel_include = [include, str(CPU_SOURCES), scipy_openblas32.get_include_dir()]
        jobs = [
            (source, kernel_include, ["-fvisibility=hidden", *ISA_FLAGS.get(source.name, [])]) for source in kernels
        ]

        headers = paddle.sysconfig.get_include()
        flags = [f"-isystem{headers}", f"-isystem{headers}/third_party"]
        flags += ["-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_NO_PYTHON"]
        objects: list[str] = []
        cuda_link: list[str] = []
        toolkit = find_toolkit(paddle.is_compiled_with_cuda())
        if toolkit is not None:
            cuda_flags, cuda_link = build_cuda.host_options(toolkit)
            flags += ["-DPADDLE_WITH_CUDA", "-DQWEN1M_WITH_CUDA", *cuda_flags]
            objects = self._cuda_objects()
        jobs += [(source, [include], flags) for source in sorted(BINDINGS.glob("*.cc"))]

        def compile_one(job: tuple[Path, list[str], list[str]]) -> str:
            source, folders, flags = job
            return self.compiler.compile(
                [str(source.relative_to(ROOT))],
                output_dir=self.build_temp,
                include_dirs=folders,
                extra_postargs=common + flags,
            )[0]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects += pool.map(compile_one, jobs)

        openblas = scipy_openblas32.get_lib_dir()
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            extra_postargs=[
                *cuda_link,
                "-fopenmp",
                f"-L{openblas}",
                f"-l{scipy_openblas32.get_library()}",
                "-Wl,-rpath,$ORIGIN/../scipy_openblas32/lib",
                f"-Wl,-rpath,{openblas}",
                f"-L{paddle.sysconfig.get_lib()}",
                f"-L{Path(paddle.__file__).parent / 'base'}",
                "-l:libpaddle.so",
            ],
        )

    def _cuda_objects(self) -> list[str]:
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        host_compiler = ["-ccbin", os.environ["CXX"]] if "CXX" in os.environ else []
        try:
            return list(map(str, build_cuda.compile_objects(folder, extra=host_compiler)))
        except subprocess.CalledProcessError as error:
            stop(f"a CUDA kernel does not compile: nvcc's messages are above (exit status {error.returncode})")


if sys.version_info >= (3, 13):
    stop(
        f"Python {platform.python_version()} is not supported: use Python 3.9 to 3.12 (PaddlePaddle 3.3.1 has no wheel)"
    )

setup(
    ext_modules=[Extension("paddle_qwen1m._ops", sources=[])],
    cmdclass={"build_ext": BuildOps},
)
