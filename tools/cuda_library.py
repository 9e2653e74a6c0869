"""The CUDA kernels through their C interface, on tensors of PyTorch: for tests and benchmarks that need no Paddle.

    python tools/cuda_library.py [--arch sm_90a ...]     builds build/libqwen1m_cuda.so and, with the attention that
                                                         cards other than Hopper run, build/libqwen1m_cuda_sm80.so

Structs and data types are read off the headers in custom_ops/include/, so that they cannot disagree with them.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "custom_ops" / "include" / "qwen1m"
FAMILIES = (
    "pages",
    "keys",
    "attention",
    "step",
    "peers",
    "mailbox",
    "weight8",
    "sampling",
    "post",
    "pieces",
)  # one may use structs of those before it
LIBRARY = ROOT / "build" / "libqwen1m_cuda.so"
REFERENCE = ROOT / "build" / "libqwen1m_cuda_sm80.so"
sys.path.insert(0, str(ROOT / "custom_ops" / "cuda"))

C_TYPES: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "qwen1m_dtype": ctypes.c_int,
}


def constant(name: str, header: str) -> int:
    """A number that a header of the C interface defines."""
    text = (HEADERS / header).read_text(encoding="utf-8")
    (defined,) = re.findall(rf"\bQWEN1M_{name} =? ?(\d+)", text)
    return int(defined)


def index_shapes(
    heads: int, row_blocks: int, columns: int, slashes: int, end: int, block: int = 64
) -> dict[str, tuple[int, ...]]:
    """Of qwen1m_index_tables, for row blocks of a piece that ends at `end`, of so many selected columns and slashes a
    head.
    """
    group = constant("COLUMN_GROUP", "keys.h")
    width = (columns + 3 * (5 + group - 1)) // group * group
    return {
        "blocks": (heads, row_blocks, min(slashes + 12, end // block + 3)),
        "counts": (heads, row_blocks, 6),
        "listed": (heads, row_blocks, width // 32),
        "columns": (heads, width),
        "column_counts": (heads, 3),
    }


STRUCTS = {"index_chains": "sparse_index", "gated_linear": "linear"}
"""Of ops that take another's."""


def read_dtypes(header: Path = HEADERS / "types.h") -> dict[str, int]:
    """The numbers that stand for data types."""
    (members,) = re.findall(r"\{([^}]*)\} qwen1m_dtype;", header.read_text(encoding="utf-8"))
    return {name.lower(): int(number) for name, number in re.findall(r"QWEN1M_(\w+) = (\d+)", members)}


def read_structs(headers: Path = HEADERS) -> dict[str, type[ctypes.Structure]]:
    """Every struct of the C interface by its name without `qwen1m_`."""
    families = ((headers / f"{family}.h").read_text(encoding="utf-8") for family in FAMILIES)
    text = re.sub(r"//[^\n]*", "", "".join(families))
    structs: dict[str, type[ctypes.Structure]] = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} qwen1m_(\w+);", text, re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for declaration in filter(None, (line.strip() for line in body.split(";"))):
            kind, names = re.match(r"(?:const )?(\w+)\s*(.*)", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
            for field in (part.strip() for part in names.split(",")):
                short = kind.replace("qwen1m_", "")
                c_type = ctypes.c_void_p if field.startswith("*") else C_TYPES.get(kind) or structs[short]
                fields.append((field.lstrip("* "), c_type))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


class CudaLibrary:
    """Calls kernels by name, the fields of their struct as keywords: tensors, numbers, dtypes, dicts for structs. The
    frame of a cache that is not int8 may be left out.
    """

    def __init__(self, path: Path = LIBRARY) -> None:
        self._library = ctypes.CDLL(str(path))
        self._structs = read_structs()
        self._dtypes = read_dtypes()

    def struct(self, name: str, fields: dict[str, Any]) -> ctypes.Structure:
        kind = self._structs[name]
        types = dict(kind._fields_)
        may_lack = {field for field, c_type in types.items() if name == "cache" and c_type in self._structs.values()}
        if unknown := (set(fields) ^ set(types)) - (may_lack - set(fields)):
            raise TypeError(f"{name}: fields that are missing or unknown: {sorted(unknown)}")
        return kind(**{field: self._value(types[field], value) for field, value in fields.items()})

    def _value(self, c_type: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return self.struct(c_type.__name__, value)
        if hasattr(value, "data_ptr"):
            assert value.is_contiguous()
            return value.data_ptr()
        if hasattr(value, "ctypes"):
            return value.ctypes.data
        name = str(value).replace("torch.", "")
        return self._dtypes.get(name, value)

    def workspace_bytes(self, op: str, **fields: Any) -> int:
        """Bytes that the op's workspace must have; 0 when it takes none."""
        function = getattr(self._library, f"qwen1m_cuda_{op}_workspace", None)
        if function is None:
            return 0
        function.restype = ctypes.c_int64
        return int(function(ctypes.byref(self.struct(op, fields))))

    def multiplies_rows8(self) -> bool:
        """See qwen1m_cuda_multiplies_rows8."""
        return bool(self._library.qwen1m_cuda_multiplies_rows8())

    def multiplies_many_rows(self, rows: int, features: int) -> bool:
        """See qwen1m_cuda_multiplies_many_rows."""
        return bool(self._library.qwen1m_cuda_multiplies_many_rows(ctypes.c_int64(rows), ctypes.c_int64(features)))

    def mailbox_bytes(self, degree: int) -> int:
        """See qwen1m_cuda_mailbox_bytes."""
        function = self._library.qwen1m_cuda_mailbox_bytes
        function.argtypes, function.restype = (ctypes.c_int32,), ctypes.c_int64
        return int(function(degree))

    def make_copier(self) -> int:
        """See qwen1m_cuda_make_copier."""
        copier = ctypes.c_int64()
        if status := self._library.qwen1m_cuda_make_copier(ctypes.byref(copier)):
            raise RuntimeError(f"make_copier: CUDA error {status}")
        return copier.value

    def make_workspace(self, size: int) -> Any:
        """Device memory of `size` bytes, poisoned."""
        import torch

        return torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")

    def stream(self) -> int:
        """The stream that launches go to: PyTorch's current one."""
        import torch

        return int(torch.cuda.current_stream().cuda_stream)

    def __call__(self, op: str, workspace: Any = None, **fields: Any) -> None:
        """Launches an op; a workspace is made where none is given."""
        arguments: list[Any] = [ctypes.byref(self.struct(STRUCTS.get(op, op), fields))]
        if hasattr(self._library, f"qwen1m_cuda_{op}_workspace"):
            if workspace is None:
                workspace = self.make_workspace(self.workspace_bytes(op, **fields))
            arguments.append(ctypes.c_void_p(workspace.data_ptr()))
        status = getattr(self._library, f"qwen1m_cuda_{op}")(*arguments, ctypes.c_void_p(self.stream()))
        if status != 0:
            raise RuntimeError(f"{op}: CUDA error {status}")


def build(archs: Iterable[str] = (), out: Path = LIBRARY, reference: Path = REFERENCE) -> Path:
    """Compiles the kernels into libraries without Paddle."""
    from build_cuda import ARCHITECTURES, build_libraries

    out.parent.mkdir(parents=True, exist_ok=True)
    build_libraries(out, reference, list(archs) or ARCHITECTURES)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=[], help="sm_80, sm_90a, compute_80 (PTX); default: all three")
    try:
        print(build(parser.parse_args().arch))
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
