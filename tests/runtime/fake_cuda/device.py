"""The fake GPU of this process: kernels of an artifact run in the simulator, called by TVM's own CUDA runtime.

A process that has installed it sees a GPU from then on, so tests install it in a process of their own (`scenario`).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
KERNELS = "kernels.json"  # TIR of the device's kernels, beside the artifact
_NAMES = "allocations launches graph_launches captures waits copies_in copies_out bytes_out kernels pageable".split()


def build(folder: Path) -> None:
    """Compile both libraries into a folder (needs a C compiler)."""
    common = ["cc", "-O1", "-shared", "-fPIC", str(HERE / "fake_cuda.c")]
    driver = [*common, "-DDRIVER", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    runtime = [
        *common,
        "-Wl,-soname,libcudart.so.13",
        f"-Wl,--version-script={HERE / 'runtime.map'}",
        *("-o", str(folder / "libcudart.so.13")),
        *(f"-L{folder}", "-l:libcuda.so.1", "-Wl,-rpath,$ORIGIN"),
    ]
    for command in (driver, runtime):
        subprocess.run(command, check=True)


def scenario(function: str, libraries: Path, *args: Path | str) -> None:
    """Run `function` of a module (``package.module:name``) in a process with the fake GPU; it gets `args` as texts.

    Raises:
        AssertionError: the process fails; with its output.
    """
    command = [sys.executable, "-m", __name__, str(libraries), function, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[2], check=False)
    assert done.returncode == 0, f"{function} ends with {done.returncode}:\n{done.stdout}{done.stderr}"


class FakeGpu:
    """The libraries in this process, and the kernels that they may be asked for.

    Args:
        libraries: folder of build().
        kernels: file with the device's kernels (IRModule as JSON); None = there are none to run.
        races: whether to look for races in every launch.
    """

    def __init__(self, libraries: Path, kernels: Path | None, *, races: bool = False) -> None:
        # by their names, as TVM's library asks for them
        self._driver = ctypes.CDLL(str(libraries / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(libraries / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
        self._driver.fake_block.restype = ctypes.c_size_t
        self._races = races
        self._functions: dict[str, Any] = {}
        self._compiled: dict[int, Any] = {}
        self.names: list[str] = []
        self.images: list[bytes] = []
        self.ran: list[str] = []
        self.fails = False  # whether kernels do
        kinds = (
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int)),
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint64)
            ),
        )
        self._callbacks = [
            kind(f) for kind, f in zip(kinds, (self._load, self._find, self._launch), strict=True)
        ]
        self._driver.fake_callbacks(*self._callbacks)
        if kernels is not None:
            self.read(kernels)

    def read(self, kernels: Path) -> None:
        """Know the kernels of a file from now on."""
        import tvm

        module = tvm.ir.load_json(kernels.read_text())
        self._functions = {str(f.attrs["global_symbol"]): f for f in module.functions.values()}

    def counts(self) -> dict[str, int]:
        """How often what was asked for so far."""
        return dict(
            zip(_NAMES, (ctypes.c_long * len(_NAMES)).in_dll(self._driver, "fake_counts"), strict=True)
        )

    def taken(self) -> int:
        """Allocated bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._driver.fake_memory(ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    @contextmanager
    def having(self, **settings: int) -> Iterator[None]:
        """What the GPU is for a while: limit (bytes of its memory), arch, driver (version); errors: init, load, capture.

        idle = 1: kernels do not run, and device memory is not protected, for measuring the host.
        """
        kinds = {"limit": ctypes.c_size_t}
        places = {k: kinds.get(k, ctypes.c_int).in_dll(self._driver, f"fake_{k}") for k in settings}
        before = {k: place.value for k, place in places.items()}
        for k, place in places.items():
            place.value = settings[k]
        try:
            yield
        finally:
            for k, place in places.items():
                place.value = before[k]

    def _load(self, image: int) -> int:
        head = ctypes.string_at(image, 4)
        if head == b"\x7fELF":  # its section headers lie at its end
            offset = ctypes.c_uint64.from_address(image + 40).value
            size, count = (ctypes.c_uint16.from_address(image + at).value for at in (58, 60))
            self.images.append(ctypes.string_at(image, offset + size * count))
        else:
            self.images.append(ctypes.string_at(image))
        return 0

    def _find(self, name: bytes, sizes: Any) -> int:
        text = name.decode()
        if text not in self._functions or not any(name in image for image in self.images):
            return -1
        for i, param in enumerate(self._functions[text].params):
            sizes[i] = _size(param)
        self.names.append(text)
        return len(self.names) - 1

    def _launch(self, number: int, dims: Any, arguments: Any) -> int:
        if self.fails:
            return 1
        try:
            name = self.names[number]
            self.ran.append(name)
            if number not in self._compiled:
                from llmc.simulate import Kernel

                self._compiled[number] = Kernel(self._functions[name], races=self._races)
            params = self._functions[name].params
            values = [self._value(p, arguments[i]) for i, p in enumerate(params)]
            (launch,) = self._compiled[number].run(values)
            grid, block = dims[0] * dims[1] * dims[2], dims[3] * dims[4] * dims[5]
            assert (launch.blocks, launch.threads) == (grid, block), name
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def _value(self, param: Any, word: int) -> Any:
        import tvm

        if not isinstance(param.ty, tvm.ir.PointerType):
            dtype = np.dtype(str(param.ty.dtype))
            return np.array([word], np.uint64).view(dtype)[0]
        base = ctypes.c_void_p()
        size = self._driver.fake_block(ctypes.c_void_p(word), ctypes.byref(base))
        assert size, f"{param.name} points to no device memory"
        rest = size - (word - int(base.value or 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * rest).from_address(word))


def _size(param: Any) -> int:
    import tvm

    return 8 if isinstance(param.ty, tvm.ir.PointerType) else np.dtype(str(param.ty.dtype)).itemsize


def _main() -> None:
    import importlib

    libraries, function, *args = sys.argv[1:]
    module, _, name = function.partition(":")
    kernels = next((Path(a) / KERNELS for a in args if (Path(a) / KERNELS).is_file()), None)
    gpu = FakeGpu(Path(libraries), kernels)
    getattr(importlib.import_module(module), name)(gpu, *args)


if __name__ == "__main__":
    _main()
