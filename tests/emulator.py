"""Kernels of another processor as functions of this process: a server in the emulated machine runs them.

This file is both sides: imported by tests, and run by the emulated Python. One message each way per call, pickled, over
the server's standard streams: (library, function, arguments) -> the arguments that the kernel has changed.
"""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_LENGTH = struct.Struct("<Q")


class Emulator:
    """The server, started by the first call."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-emulated-")
        self._count = 0

    def library(self, compiled: Any, triple: str) -> EmulatedLibrary:
        """Link what tvm has compiled for `triple`; index the result by a kernel's name."""
        from llmc.link import export_objects, link_objects

        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        link_objects(export_objects(compiled, folder), folder / "k.so", triple=triple)
        return EmulatedLibrary(self, folder / "k.so")

    def call(self, library: Path, name: str, arguments: list[Any]) -> dict[int, bytes]:
        """Run a kernel; arguments are ints or (bytes, shape, dtype)."""
        if self._server is None:
            from tools.run_aarch64 import command

            words = [*command(), __file__]
            self._server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._server.stdin is not None and self._server.stdout is not None
        try:
            _send(self._server.stdin, (str(library), name, arguments))
            reply = _receive(self._server.stdout)
        except OSError:
            reply = None
        if reply is None:
            code, self._server = self._server.wait(), None
            raise RuntimeError(f"the emulated machine died in {name} (exit code {code})")
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return dict(reply)

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()
            self._server = None
        self._folder.cleanup()


class EmulatedLibrary:
    def __init__(self, emulator: Emulator, path: Path) -> None:
        self._emulator, self._path = emulator, path

    def __getitem__(self, name: str) -> Any:
        def kernel(*arguments: Any) -> None:
            packed = [a if isinstance(a, int) else _packed(a) for a in arguments]
            for i, raw in self._emulator.call(self._path, name, packed).items():
                old = arguments[i].numpy()
                arguments[i].copyfrom(np.frombuffer(raw, old.dtype).reshape(old.shape))

        return kernel


def _packed(tensor: Any) -> tuple[bytes, tuple[int, ...], str]:
    array = np.ascontiguousarray(tensor.numpy())
    return array.tobytes(), tuple(array.shape), str(tensor.dtype)


def _send(stream: BinaryIO, message: Any) -> None:
    raw = pickle.dumps(message)
    stream.write(_LENGTH.pack(len(raw)) + raw)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    """The next message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    return pickle.loads(stream.read(_LENGTH.unpack(head)[0])) if len(head) == _LENGTH.size else None


def _serve() -> None:
    from llmc.runtime.library import ffi, tensor_view, use_threads
    from llmc.runtime.memory import huge_zeros

    use_threads(2)
    libraries: dict[str, Any] = {}
    replies, sys.stdout = sys.stdout.buffer, sys.stderr
    while (message := _receive(sys.stdin.buffer)) is not None:
        path, name, arguments = message
        if path not in libraries:
            libraries[path] = ffi().load_module(path)
        held: list[Any] = []
        given: list[Any] = []
        for a in arguments:
            if isinstance(a, int):
                held.append(None)
                given.append(a)
                continue
            raw, shape, dtype = a
            memory = huge_zeros(len(raw))
            memory[:] = np.frombuffer(raw, np.uint8)
            held.append(memory)
            given.append(tensor_view(memory, shape, dtype))
        try:
            libraries[path][name](*given)
        except Exception as e:
            _send(replies, f"{type(e).__name__}: {e}")
            continue
        changed = {
            i: memory.tobytes()
            for i, memory in enumerate(held)
            if memory is not None and memory.tobytes() != arguments[i][0]
        }
        _send(replies, changed)


if __name__ == "__main__":
    _serve()
