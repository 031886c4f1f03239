"""From CUDA source to machine code of one architecture: NVRTC from pip (no toolkit), or a toolkit's nvcc."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmc import knobs
from llmc.errors import LlmcError

INSTALL = "Install NVRTC with pip install 'llmc-compiler[cuda]', or put a CUDA 13 toolkit's nvcc on PATH."
_LIBRARY = "libnvrtc.so.13"
_OPTIONS = ("-default-device", "--device-int128", "--std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True)
class Assembled:
    """Code for one architecture.

    Attributes:
        code: as the driver loads it: machine code, or PTX as text.
        log: what the assembler reported (ptxas -v).
    """

    code: bytes
    log: str


def assemble(source: str, arch: str) -> Assembled:
    """Compile CUDA source for an architecture such as ``sm_90``, or to PTX for ``compute_90`` and all newer ones.

    Raises:
        LlmcError: no compiler is installed, or it refuses the source.
    """
    return _COMPILERS[which()](source, arch)


def which() -> str:
    """The compiler that is used: LLMC_CUDA_COMPILER, else nvrtc if it is installed, else nvcc.

    Raises:
        LlmcError: none is there.
    """
    wanted = knobs.cuda_compiler()
    if wanted and wanted not in _COMPILERS:
        raise LlmcError(
            "cuda-compiler", f"LLMC_CUDA_COMPILER must be one of {', '.join(_COMPILERS)}, found {wanted!r}."
        )
    found = {"nvrtc": _nvrtc_library() is not None, "nvcc": shutil.which("nvcc") is not None}
    for name in (wanted,) if wanted else tuple(_COMPILERS):
        if found[name]:
            return name
    raise LlmcError(
        "no-cuda-compiler",
        f"Compiling for cuda needs {wanted or 'NVRTC or nvcc'}, which is not installed.",
        hint=INSTALL,
    )


def is_ptx(arch: str) -> bool:
    """Whether an architecture is a virtual one, whose code the driver translates."""
    return arch.startswith("compute_")


def version() -> str:
    """The compiler and its version, e.g. ``nvrtc 13.0``, for the manifest."""
    name = which()
    if name == "nvrtc":
        library = ctypes.CDLL(str(_nvrtc_library()))
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    release = done.stdout.partition("release ")[2].partition(",")[0]
    return f"nvcc {release or 'of unknown version'}"


def _roots() -> list[Path]:
    """Folders with lib/ and include/ of CUDA 13 that pip has installed."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(p) / "cu13" for p in places or () if (Path(p) / "cu13").is_dir()]


def _nvrtc_library() -> Path | None:
    for root in _roots():
        if (root / "lib" / _LIBRARY).is_file():
            return root / "lib" / _LIBRARY
    return None


def _nvrtc(source: str, arch: str) -> Assembled:
    path = _nvrtc_library()
    assert path is not None
    # NVRTC opens it by name only; loaded already, it is found
    for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    includes = [f"-I{root / 'include'}{part}" for root in _roots() for part in ("", "/cccl")]
    options = [o.encode() for o in (f"--gpu-architecture={arch}", *_OPTIONS, *includes)]
    program = ctypes.c_void_p()
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"llmc_kernels.cu", 0, None, None
    )
    if status != 0:
        raise _refused("nvrtc", arch, library.nvrtcGetErrorString(status).decode())
    try:
        status = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        log = _nvrtc_bytes(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
        text = log.rstrip(b"\0").decode(errors="replace")
        if status != 0:
            raise _refused("nvrtc", arch, text or library.nvrtcGetErrorString(status).decode())
        size, get = (
            (library.nvrtcGetPTXSize, library.nvrtcGetPTX)
            if is_ptx(arch)
            else (library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
        )
        return Assembled(_nvrtc_bytes(size, get, program).rstrip(b"\0" if is_ptx(arch) else b""), text)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_bytes(size_of: Callable[..., int], get: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw[: size.value]


def _nvcc(source: str, arch: str) -> Assembled:
    with tempfile.TemporaryDirectory(prefix="llmc-nvcc-") as work:
        file, out = Path(work) / "llmc_kernels.cu", Path(work) / "llmc_kernels.cubin"
        file.write_text(source, encoding="utf-8")
        command = [
            "nvcc",
            "-ptx" if is_ptx(arch) else "-cubin",
            f"-arch={arch}",
            "--std=c++17",
            "-Xptxas",
            "-v",
            "-o",
            str(out),
            str(file),
        ]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            raise _refused("nvcc", arch, done.stdout + done.stderr)
        return Assembled(out.read_bytes(), done.stdout + done.stderr)


def _refused(name: str, arch: str, output: str) -> LlmcError:
    errors = [line.strip() for line in output.splitlines() if "error" in line or "fatal" in line]
    said = (errors or output.strip().splitlines() or ["no message"])[0]
    return LlmcError(
        "cuda-refused",
        f"{name} refuses the generated source for {arch}: {said.rstrip('.')}.",
        hint="This is a bug of llmc; LLMC_DEBUG=1 shows the whole output.",
        context={"output": output},
    )


_COMPILERS: dict[str, Callable[[str, str], Assembled]] = {"nvrtc": _nvrtc, "nvcc": _nvcc}
