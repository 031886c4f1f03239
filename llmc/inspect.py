"""Reads an artifact's manifest for people and tools, without tvm and without loading the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.artifact import LIBRARY, MANIFEST, FunctionEntry, KernelEntry, Manifest, sha256_file
from llmc.errors import LlmcError
from llmc.kernel_work import Formula, Workload
from llmc.runtime.embedded import read_embedded


@dataclass(frozen=True)
class ArtifactReport:
    """An artifact as it lies on the disk.

    Attributes:
        folder: where.
        manifest: what it says.
        sizes: file name -> bytes, of the files that the manifest lists, manifest.json, and tokenizer files.
        problems: sentences about files that are missing or changed; empty = intact.
    """

    folder: Path
    manifest: Manifest
    sizes: dict[str, int]
    problems: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight shards."""
        return sum(size for name, size in self.sizes.items() if name.endswith(".safetensors"))


@dataclass(frozen=True)
class KernelFigures:
    """A kernel in a step of known sizes: bytes moved and operations of one call.

    `moved` and `operations` are the formulas that the numbers come from.
    """

    entry: KernelEntry
    moved: Formula
    operations: Formula
    moved_at: float
    operations_at: float


def kernel_figures(function: FunctionEntry, work: Workload) -> list[KernelFigures]:
    """The kernels of a function for a step of these sizes, in the order of their first call.

    Raises:
        LlmcError: a formula that cannot be read.
    """
    found = []
    for entry in function.kernels:
        try:
            moved = Formula.parse(entry.read) + Formula.parse(entry.written)
            operations = Formula.parse(entry.operations)
            found.append(KernelFigures(entry, moved, operations, moved.at(work), operations.at(work)))
        except (ValueError, KeyError):
            raise LlmcError(
                "manifest-corrupt",
                f"The manifest's bytes or operations of the kernel {entry.name} are no formula that this llmc knows.",
                hint="Compile the model again.",
            ) from None
    return found


def inspect(path: Path, *, check_hashes: bool = False) -> ArtifactReport:
    """Read the manifest of an artifact folder or of a ``model.so``.

    Args:
        path: the folder, or the library alone (its weights should lie beside it).
        check_hashes: also compare every file's sha256 (reads all weights).

    Raises:
        LlmcError: nothing there, not an artifact, a damaged manifest, another schema version.
    """
    if path.is_dir():
        folder, manifest = path, _manifest_of_folder(path)
    elif path.is_file():
        folder, manifest = path.parent, Manifest.from_text(read_embedded(path), str(path))
    else:
        raise LlmcError(
            "no-artifact", f"{path} does not exist.", hint="Give the folder that llmc compile wrote."
        )
    sizes, problems = {}, []
    for name in sorted({*manifest.files, MANIFEST, LIBRARY}):
        file = folder / name
        if not file.is_file():
            if name in manifest.files:
                problems.append(f"{name} is missing")
            continue
        sizes[name] = file.stat().st_size
        if check_hashes and name in manifest.files and sha256_file(file) != manifest.files[name]:
            problems.append(f"{name} has changed since the artifact was written")
    return ArtifactReport(folder, manifest, sizes, tuple(problems))


def _manifest_of_folder(folder: Path) -> Manifest:
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LlmcError(
            "no-artifact", f"{folder} holds no {MANIFEST}.", hint="Give the folder that llmc compile wrote."
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise LlmcError(
            "manifest-corrupt", f"{file} cannot be read: {e}.", hint="Compile the model again."
        ) from None
    return Manifest.from_text(text, str(file))
