"""TVM's runtime without TVM's compiler: only the small runtime library is loaded, never `import tvm`.

`import tvm` takes seconds and maps a 250 MB compiler library; the Relax virtual machine needs neither.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from llmc import host, knobs
from llmc.errors import LlmcError

# how TVM numbers devices (DLDeviceType) that artifacts may be built for
_DEVICES = {"cpu": 1, "cuda": 2}
_POOLED_ALLOCATOR = 2
_threads: int | None = None  # TVM's pool of workers is made once per process


def tvm_version() -> str:
    """Version of the installed TVM, without importing it.

    Raises:
        LlmcError: TVM is not installed.
    """
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        raise _no_tvm("the package apache-tvm is not installed") from None


def use_threads(threads: int | None) -> int:
    """Fix the number of worker threads of this process; the first call wins. Returns the number in use."""
    global _threads
    if threads is not None and threads < 1:
        raise LlmcError("threads", f"threads must be at least 1, found {threads}.")
    if _threads is None:
        _threads = threads or knobs.threads() or host.default_threads()
        knobs.set_threads(_threads)
    elif threads is not None and threads != _threads:
        warnings.warn(
            f"this process already runs kernels with {_threads} threads; threads={threads} has no effect",
            RuntimeWarning,
            stacklevel=3,
        )
    return _threads


def ffi() -> Any:
    """The module tvm_ffi, with TVM's runtime library loaded."""
    try:
        import tvm_ffi
        from tvm_ffi.libinfo import load_lib_ctypes
    except (ImportError, OSError, RuntimeError) as e:
        raise _no_tvm(str(e)) from None
    if tvm_ffi.get_global_func("runtime.TVMTensorCreateView", allow_missing=True) is None:
        spec = importlib.util.find_spec("tvm")
        if spec is None or not spec.submodule_search_locations:
            raise _no_tvm("the package apache-tvm is not installed")
        folder = Path(next(iter(spec.submodule_search_locations)))
        try:
            load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[folder / "lib"])
        except (OSError, RuntimeError) as e:
            raise _no_tvm(str(e)) from None
    return tvm_ffi


def _no_tvm(why: str) -> LlmcError:
    return LlmcError(
        "no-tvm", f"TVM's runtime cannot be loaded: {why}.", hint="Install it: pip install llmc-compiler."
    )


class Library:
    """A loaded model.so: its Relax functions by name.

    Args:
        device: target that it is for.
        kernels: tvm module with its kernels, of a target whose kernels are not in model.so.

    Raises:
        LlmcError: the file is no library that this machine can load.
    """

    def __init__(self, path: Path, device: str = "cpu", kernels: Any = None) -> None:
        if device not in _DEVICES:
            raise LlmcError(
                "target-not-here",
                f"The artifact is for target {device!r}; this llmc runs {', '.join(sorted(_DEVICES))}.",
                hint="Compile the model for one of these.",
            )
        tvm_ffi = ffi()
        # the loader returns an old library for a path that it has seen before, even if the file is another one now;
        # a fresh name for the same file makes it look at the file itself
        with tempfile.TemporaryDirectory(prefix="llmc-load-") as work:
            link = Path(work) / "model.so"
            try:
                if kernels is None:
                    link.symlink_to(path.resolve())
                else:
                    # host code keeps the kernels that it has found in variables of the library; two models of one
                    # artifact must not share them, since one's kernels go with it
                    shutil.copyfile(path, link)
                module = tvm_ffi.load_module(str(link), keep_module_alive=False)
                if kernels is not None:
                    _code_of(module).import_module(kernels)
                self._vm = module["vm_load_executable"]()
                devices = [_DEVICES[device], 0, _POOLED_ALLOCATOR]
                if device != "cpu":  # shapes are computed on the host
                    devices += [_DEVICES["cpu"], 0, _POOLED_ALLOCATOR]
                self._vm["vm_initialization"](*devices)
            except (OSError, RuntimeError, AttributeError) as e:
                reason = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
                raise LlmcError(
                    "library-unloadable",
                    f"{path} cannot be loaded: {reason}.",
                    hint="Compile the model again on or for this machine.",
                ) from None
        self._module = module

    def function(self, name: str) -> Callable[..., Any]:
        """A compiled function; takes tvm tensors, numpy arrays and packed tuples."""
        try:
            found: Callable[..., Any] = self._vm[name]
        except AttributeError:
            raise LlmcError(
                "function-missing", f"model.so has no function {name!r}.", hint="Compile the model again."
            ) from None
        return found

    def kernel(self, name: str) -> Callable[..., Any]:
        """A function of the library that is called without the virtual machine.

        Raises:
            LlmcError: there is none of this name.
        """
        try:
            found: Callable[..., Any] = _code_of(self._module)[name]
        except AttributeError:
            raise LlmcError(
                "function-missing", f"model.so has no function {name!r}.", hint="Compile the model again."
            ) from None
        return found

    def instrument(self, function: Any | None) -> None:
        """Call `function` before and after every call that the virtual machine makes; None = nothing any more.

        Its arguments: the called function, its name, whether it is before the call, the result, the arguments;
        it returns 0.
        """
        self._vm["set_instrument"](function)


def _code_of(module: Any) -> Any:
    """The module among a library's imports that holds the host's code, which looks kernels up in its own imports."""
    found = module
    while found.imports and str(found.kind) != "library":
        found = found.imports[0]
    return found


def tensor_view(raw: npt.NDArray[Any], shape: Sequence[int], dtype: str) -> Any:
    """A tvm tensor over the bytes of `raw` (uint8, 64-byte aligned); no copy. numpy's DLPack knows no bfloat16.

    Raises:
        ValueError: the size or the alignment does not fit.
    """
    tvm_ffi = ffi()
    if raw.ctypes.data % 64:
        raise ValueError(
            f"tensor of shape {tuple(shape)} at address {raw.ctypes.data:#x}: not 64-byte aligned"
        )
    kind = tvm_ffi.dtype(dtype)
    count = 1
    for extent in shape:
        count *= extent
    if raw.nbytes != count * kind.itemsize:
        raise ValueError(f"{dtype}{tuple(shape)} takes {count * kind.itemsize} bytes, found {raw.nbytes}")
    view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
    # through a tensor of its own: compiled kernels refuse a byte offset
    return view(tvm_ffi.from_dlpack(raw), tvm_ffi.Shape(list(shape)), kind, 0)


def pack(tensors: Sequence[Any]) -> Any:
    """A Relax tuple of tensors, converted once instead of on every call."""
    return ffi().convert(tuple(tensors))
