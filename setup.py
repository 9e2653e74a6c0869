"""Builds the package and its custom ops, against the Paddle that is installed: `pip install . --no-build-isolation`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU_SOURCES = ROOT / "custom_ops" / "cpu"
BINDINGS = ROOT / "custom_ops" / "paddle" / "bindings.cc"
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


def stop(reason: str) -> None:
    sys.exit(f"paddle-qwen1m: {reason}")


class BuildOps(build_ext):
    """Compiles paddle_qwen1m/_ops.so: one object file a kernel source, each with its instruction set's flags."""

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
        kernels = sorted(CPU_SOURCES.glob("*.cpp"))
        if platform.machine() != "x86_64":
            kernels = [source for source in kernels if source.name not in ISA_FLAGS]
        include = [str(ROOT / "custom_ops" / "include"), str(CPU_SOURCES), scipy_openblas32.get_include_dir()]
        jobs = [(source, include, ["-fvisibility=hidden", *ISA_FLAGS.get(source.name, [])]) for source in kernels]
        jobs.append(
            (
                BINDINGS,
                [include[0], paddle.sysconfig.get_include(), paddle.sysconfig.get_include() + "/third_party"],
                ["-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_NO_PYTHON", "-w"],
            )
        )

        def compile_one(job: tuple[Path, list[str], list[str]]) -> str:
            source, folders, flags = job
            return self.compiler.compile(
                [str(source.relative_to(ROOT))],
                output_dir=self.build_temp,
                include_dirs=folders,
                extra_postargs=common + flags,
            )[0]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, jobs))

        openblas = scipy_openblas32.get_lib_dir()
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            extra_postargs=[
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


if sys.version_info >= (3, 13):
    stop(
        f"Python {platform.python_version()} is not supported: use Python 3.9 to 3.12 (PaddlePaddle 3.3.1 has no wheel)"
    )

setup(
    ext_modules=[Extension("paddle_qwen1m._ops", sources=[])],
    cmdclass={"build_ext": BuildOps},
)
