"""What must hold before any code of an artifact runs: manifest, files, versions, machine."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmc.artifact import LIBRARY, MANIFEST, DeviceImage, Manifest, is_library, sha256_file
from llmc.errors import LlmcError
from llmc.runtime.cuda import choose_image
from llmc.runtime.embedded import read_embedded
from llmc.runtime.levels import choose_level

AGAIN = "Copy the artifact again or compile the model again."


@dataclass(frozen=True)
class ArtifactFiles:
    """A checked artifact: where its files are, the library and device code that fit this machine, and their manifest."""

    folder: Path
    library: Path
    manifest: Manifest
    image: DeviceImage | None = None

    def optional(self, name: str) -> Path | None:
        """Path of a file that the artifact may have, e.g. tokenizer.json; only files that the manifest lists."""
        return self.folder / name if name in self.manifest.files else None


def open_artifact(
    path: Path, *, tvm_version: str, check_hashes: bool = True, level: str = ""
) -> ArtifactFiles:
    """Read the manifest of a folder or a library and check everything that can be checked without running code.

    With manifest.json present it and the copy inside the library must agree, so that no byte of it goes unchecked.

    Args:
        path: artifact folder; or one of its libraries, which is one level only.
        tvm_version: of the installed TVM.
        check_hashes: compare the sha256 of every file (reads all weights once).
        level: which level of a folder to take; "" = the best one that this machine runs.

    Raises:
        LlmcError: see the functions below.
    """
    path = path.expanduser()
    if not path.exists():
        raise LlmcError(
            "artifact-missing",
            f"There is no artifact at {path}.",
            hint="Give a folder that llmc compile wrote.",
        )
    folder, library = (path, path / LIBRARY) if path.is_dir() else (path.parent, path)
    # a library by another name counts alone
    written = _written_manifest(folder) if is_library(library.name) else None
    if written is None and path.is_dir() and not library.exists():
        raise LlmcError(
            "artifact-missing",
            f"{path} is not an artifact: it has neither {MANIFEST} nor {LIBRARY}.",
            hint="Give a folder that llmc compile wrote.",
        )
    manifest = written or Manifest.from_text(read_embedded(library), str(library))
    check_versions(manifest, tvm_version)
    if written is not None and not path.is_dir():
        manifest = _of_library(written, library)
    chosen = choose_level(manifest, level)
    manifest = manifest.at(chosen)
    image = choose_image(manifest)
    check_files(folder, manifest, check_hashes=check_hashes)
    if written is not None:
        library = folder / chosen.library if path.is_dir() else library
        embedded = Manifest.from_text(read_embedded(library), str(library))
        if embedded != written.without_libraries().at(chosen):
            raise LlmcError(
                "manifest-mismatch",
                f"{folder / MANIFEST} and the manifest inside {library.name} differ: one of them was changed.",
                hint=AGAIN,
            )
    return ArtifactFiles(folder, library, manifest, image)


def _of_library(written: Manifest, library: Path) -> Manifest:
    """The manifest of the level that a library is."""
    for level in written.levels:
        if level.library == library.name:
            return written.at(level)
    raise LlmcError(
        "manifest-mismatch",
        f"{library} is not among the libraries of the artifact beside it ({', '.join(written.libraries)}).",
        hint=AGAIN,
    )


def _written_manifest(folder: Path) -> Manifest | None:
    """manifest.json, or None if the folder has none.

    Raises:
        LlmcError: not a manifest, or not byte for byte what the compiler writes.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as e:
        raise LlmcError("manifest-corrupt", f"{path} is damaged: {e}.", hint=AGAIN) from None
    except OSError as e:
        raise LlmcError("file-unreadable", f"{path} cannot be read: {e.strerror}.") from None
    manifest = Manifest.from_text(text, str(path))
    if text != manifest.as_text() + "\n":  # e.g. a damaged name of a field that may be absent
        raise LlmcError("manifest-corrupt", f"{path} is not as the compiler wrote it.", hint=AGAIN)
    return manifest


def check_versions(manifest: Manifest, tvm_version: str) -> None:
    """The compiled code calls into TVM's runtime, whose interface may change with any release.

    Raises:
        LlmcError: compiled with another version of TVM.
    """
    if manifest.tvm_version != tvm_version:
        raise LlmcError(
            "tvm-version",
            f"The artifact needs TVM {manifest.tvm_version}; TVM {tvm_version} is installed.",
            hint=f"Compile the model again, or pip install apache-tvm=={manifest.tvm_version}.",
        )


def check_files(folder: Path, manifest: Manifest, *, check_hashes: bool) -> None:
    """Every file is there, holds the parameters that the manifest places in it, and (if asked) has its sha256.

    Raises:
        LlmcError: names the first bad file, what was expected and what was found.
    """
    ends: dict[str, int] = {}
    for entry in manifest.params:
        ends[entry.shard] = max(ends.get(entry.shard, 0), entry.offset + entry.nbytes)
    for name in sorted({*manifest.files, *ends}):
        path = folder / name
        if Path(name).name != name:
            raise LlmcError("manifest-corrupt", f"The manifest names a file outside of the folder: {name!r}.")
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise LlmcError(
                "file-missing", f"The artifact's file {name} is missing in {folder}.", hint=AGAIN
            ) from None
        except OSError as e:
            raise LlmcError("file-unreadable", f"{path} cannot be read: {e.strerror}.") from None
        if size < ends.get(name, 0):
            raise LlmcError(
                "file-truncated",
                f"{path} has {size} bytes; its parameters need {ends[name]}.",
                hint=AGAIN,
            )
    if not check_hashes:
        return
    names = sorted(manifest.files)
    # hashing releases the interpreter's lock
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _digest(folder / name), names)
        for name, digest in zip(names, digests, strict=True):
            if digest != manifest.files[name]:
                raise LlmcError(
                    "hash-mismatch",
                    f"{folder / name} is damaged: its sha256 is {digest[:16]}…, the manifest says "
                    f"{manifest.files[name][:16]}….",
                    hint=AGAIN,
                )


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as e:
        raise LlmcError("file-unreadable", f"{path} cannot be read: {e.strerror}.") from None
