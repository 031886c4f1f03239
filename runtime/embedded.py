"""The manifest inside model.so, read from the file: a library is not loaded before its manifest has been checked."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from llmc.errors import LlmcError

SYMBOL = "llmc_manifest"
SIZE_SYMBOL = "llmc_manifest_size"
_PT_LOAD, _SHT_DYNSYM = 1, 11
_LIMIT = 1 << 28  # no manifest is larger: what claims to be is damage


def read_embedded(path: Path) -> str:
    """Text of the manifest that a library carries (symbols llmc_manifest and llmc_manifest_size).

    Raises:
        LlmcError: not a library, damaged, or one without a manifest.
    """
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            if raw[:4] == b"\x7fELF":
                return _from_elf(raw)
            if raw[:4] in (b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"):
                return _by_loading(path)
            raise ValueError("it is no shared library")
    except FileNotFoundError:
        raise LlmcError(
            "file-missing", f"{path} does not exist.", hint="Give the artifact's folder or its model.so."
        ) from None
    except (OSError, ValueError, IndexError, OverflowError, AttributeError, struct.error) as e:
        raise LlmcError(
            "library-corrupt",
            f"{path} carries no readable llmc manifest: {e}.",
            hint="Compile the model again.",
        ) from None


def _from_elf(raw: mmap.mmap) -> str:
    """Look the symbols up in the dynamic symbol table of a 64-bit ELF file.

    Source: System V ABI, ELF-64 object file format.
    """
    if raw[4] != 2 or raw[5] != 1:
        raise ValueError("it is no 64-bit little-endian library")
    program, section = struct.unpack_from("<QQ", raw, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", raw, 54)
    loads = []
    for i in range(programs):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", raw, program + i * program_size)
        if kind == _PT_LOAD:
            loads.append((address, offset, size))
    headers = [
        # type, file offset, size, number of the linked section
        struct.unpack_from("<4xI16xQQI", raw, section + i * section_size)
        for i in range(sections)
    ]
    found: dict[str, int] = {}
    for kind, offset, size, link in headers:
        if kind == _SHT_DYNSYM:
            found.update(_symbols(raw, offset, size, headers[link][1]))
    if SYMBOL not in found or SIZE_SYMBOL not in found:
        raise ValueError(f"it has no symbol {SYMBOL}")
    (size,) = struct.unpack_from("<Q", raw, _file_offset(loads, found[SIZE_SYMBOL]))
    start = _file_offset(loads, found[SYMBOL])
    if size > min(_LIMIT, len(raw) - start):
        raise ValueError(f"its manifest of {size} bytes does not fit into the file")
    return raw[start : start + size].decode()


def _symbols(raw: mmap.mmap, offset: int, size: int, names: int) -> Iterator[tuple[str, int]]:
    """(name, address) of our symbols in a symbol table whose strings are at `names`."""
    wanted = {name.encode(): name for name in (SYMBOL, SIZE_SYMBOL)}
    longest = max(map(len, wanted))
    for at in range(offset, offset + size - 23, 24):
        name, value = struct.unpack_from("<I4xQ", raw, at)
        text = raw[names + name : names + name + longest + 1].partition(b"\0")[0]
        if text in wanted:
            yield wanted[text], value


def _file_offset(loads: list[tuple[int, int, int]], address: int) -> int:
    for start, offset, size in loads:
        if start <= address < start + size:
            return offset + address - start
    raise ValueError(f"its symbol table points outside of the file ({address:#x})")


def _by_loading(path: Path) -> str:
    """macOS: let the loader find the symbols."""
    library = ctypes.CDLL(str(path))
    size = ctypes.c_uint64.in_dll(library, SIZE_SYMBOL).value
    if size > _LIMIT:
        raise ValueError(f"its manifest claims {size} bytes")
    return bytes((ctypes.c_char * size).in_dll(library, SYMBOL)).decode()
