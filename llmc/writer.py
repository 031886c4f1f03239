"""Writes an artifact folder so that it is either whole or not there.

Everything is written into ``.NAME.tmp-PID`` beside the output and renamed at the end; an artifact that was
there before stays until then. On any failure, Ctrl-C or SIGTERM the temporary folder is removed.

    with ArtifactWriter(Path("dist/demo")) as writer:
        with writer.shards(tensors) as shards:
            ...
        writer.copy_tokenizer(folder)
        manifest = writer.finish(executable, manifest)     # links model.so, fills in the hashes
        verify(writer.folder)
        writer.commit()
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from llmc import knobs
from llmc.artifact import LIBRARY, MANIFEST, TOKENIZER_FILES, TUNING, Manifest, is_library, sha256_file
from llmc.errors import LlmcError
from llmc.link import embed_manifest, export_objects, link_library, link_objects, require_cxx
from llmc.shards import SHARD_BYTES, PackedTensor, ShardWriter, disk_errors

__all__ = [
    "ArtifactWriter",
    "PackedTensor",
    "ShardWriter",
    "check_output",
    "created",
    "embed_manifest",
    "link_library",
]

_SHARD_NAME = re.compile(r"weights-\d{5}\.safetensors")
_KERNELS_NAME = re.compile(r"kernels-\w+\.bin")


def created() -> str:
    """The manifest's timestamp: now, or SOURCE_DATE_EPOCH; ISO 8601, UTC, whole seconds."""
    epoch = knobs.source_date_epoch()
    moment = datetime.now(timezone.utc) if epoch is None else datetime.fromtimestamp(epoch, timezone.utc)
    return moment.replace(microsecond=0).isoformat()


def check_output(output: Path) -> None:
    """Refuse an output path that cannot be replaced without losing something. Call it before the long work.

    Raises:
        LlmcError: a file, or a folder with files in it that no compile wrote.
    """
    if output.is_dir():
        found = {p.name for p in output.iterdir()}
        foreign = sorted(n for n in found if not _is_ours(n))
        if foreign or (found and MANIFEST not in found):
            shown = ", ".join((foreign or sorted(found))[:3])
            raise LlmcError(
                "output-not-an-artifact",
                f"The output folder {output} holds files that are not part of an artifact ({shown}).",
                hint="Choose a new or empty folder; nothing was changed.",
            )
    elif output.exists() or output.is_symlink():
        raise LlmcError(
            "output-not-a-folder",
            f"The output {output} exists and is not a folder.",
            hint="Choose another path; nothing was changed.",
        )


def _is_ours(name: str) -> bool:
    known = (_SHARD_NAME, _KERNELS_NAME)
    fixed = name in (MANIFEST, TUNING, *TOKENIZER_FILES) or is_library(name)
    return fixed or any(k.fullmatch(name) for k in known)


class ArtifactWriter:
    """A temporary folder that becomes the artifact when commit() is called inside the `with`.

    Attributes:
        output: where the artifact will be.
        folder: where it is written; valid inside the `with`.
        files: name -> sha256 of the shards written so far.

    Raises:
        LlmcError: see check_output and shards.disk_errors.
    """

    def __init__(self, output: Path) -> None:
        # a symbolic link to a folder stays; what it points to is replaced
        self.output = output.expanduser().resolve()
        self.folder = self.output.parent / f".{self.output.name}.tmp-{os.getpid()}"
        self.files: dict[str, str] = {}
        self._shards: list[ShardWriter] = []
        self._made: list[Path] = []
        self._committed = False
        self._old_handler: Any = None
        self._work: tempfile.TemporaryDirectory[str] | None = None
        self._exported: dict[str, tuple[Any, list[Path]]] = {}

    def __enter__(self) -> ArtifactWriter:
        check_output(self.output)
        self._catch_sigterm()
        try:
            with disk_errors(self.output):
                self._make_parents()
                _remove_stale(self.output)
                self.folder.mkdir()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up()

    def shards(
        self,
        tensors: Sequence[PackedTensor],
        *,
        shard_bytes: int = SHARD_BYTES,
        kind: type[ShardWriter] = ShardWriter,
    ) -> ShardWriter:
        """A ShardWriter (of a `kind`) into the folder, whose hashes finish() will use."""
        writer = kind(self.folder, tensors, shard_bytes=shard_bytes)
        self._shards.append(writer)
        return writer

    def copy_tokenizer(self, source: Path | str | None) -> tuple[str, ...]:
        """Copy those of llmc.artifact.TOKENIZER_FILES that `source` has; returns their names."""
        if source is None:
            return ()
        copied = []
        for name in TOKENIZER_FILES:
            path = Path(source) / name
            if path.is_file():
                with disk_errors(self.folder / name):
                    # contents only: a hub cache holds read-only files and symbolic links
                    shutil.copyfile(path, self.folder / name)
                copied.append(name)
        return tuple(copied)

    def add_files(self, files: Mapping[str, bytes]) -> None:
        """Write further files of the artifact, e.g. device code."""
        for name, data in files.items():
            with disk_errors(self.folder / name):
                (self.folder / name).write_bytes(data)

    def add_library(self, name: str, executable: Any) -> None:
        """Code of a lower level, which finish() links; the executable is not needed any more."""
        with disk_errors(self.folder):
            self._export(name, executable)
        self._exported[name] = (None, self._exported[name][1])

    def finish(self, executable: Any, manifest: Manifest) -> Manifest:
        """Link the libraries with the manifest inside, write manifest.json, and return what that holds.

        The manifest inside a library lists the hashes of all files but libraries and manifest.json; manifest.json also
        those of libraries. May be called again, e.g. once the quality report is known.

        Args:
            executable: tvm's compiled module for model.so; those of lower levels were given to add_library.
            manifest: complete but for `files`; quality.seconds is left out of the artifact.
        """
        known = {name: digest for shards in self._shards for name, digest in shards.files.items()}
        with disk_errors(self.folder):
            ours = (*manifest.libraries, MANIFEST)
            names = sorted(p.name for p in self.folder.iterdir() if p.name not in ours)
            self.files = {name: known.get(name) or sha256_file(self.folder / name) for name in names}
            # a measured time would make two compiles of one spec differ
            quality = dataclasses.replace(manifest.quality, seconds=None)
            inner = dataclasses.replace(manifest, files=dict(self.files), quality=quality)
            triple = manifest.target.triple
            require_cxx(triple)
            self._export(LIBRARY, executable)
            hashes = dict(self.files)
            for level in inner.levels:
                library = self.folder / level.library
                library.unlink(missing_ok=True)
                objects = self._exported[level.library][1]
                embedded = embed_manifest(inner.at(level).as_text(), objects[0].parent, triple=triple)
                link_objects([embedded, *objects], library, triple=triple)
                hashes[level.library] = sha256_file(library)
            outer = dataclasses.replace(inner, files=hashes)
            (self.folder / MANIFEST).write_text(outer.as_text() + "\n", encoding="utf-8")
        return outer

    def _export(self, name: str, executable: Any) -> None:
        """Object files of a library, made once: LLVM's code generation is the expensive part of finish()."""
        if name in self._exported and self._exported[name][0] is executable:
            return
        if self._work is None:
            self._work = tempfile.TemporaryDirectory(prefix="llmc-link-")
        # a folder with the same name in every compile would do; one that is new keeps no file of an earlier executable
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._work.name))
        self._exported[name] = (executable, export_objects(executable, folder))

    def commit(self) -> None:
        """Put the folder in place of the output; what was there before is removed only after that."""
        check_output(self.output)
        old = self.output.parent / f".{self.output.name}.old-{os.getpid()}"
        with disk_errors(self.output):
            replaces = self.output.exists()
            if replaces:
                self.output.rename(old)
            try:
                self.folder.rename(self.output)
            except BaseException:
                if replaces:
                    old.rename(self.output)
                raise
            self._committed = True
            shutil.rmtree(old, ignore_errors=True)

    def _make_parents(self) -> None:
        missing = [p for p in (self.output.parent, *self.output.parent.parents) if not p.exists()]
        for path in reversed(missing):
            path.mkdir()
            self._made.append(path)

    def _clean_up(self) -> None:
        try:
            if not self._committed:
                shutil.rmtree(self.folder, ignore_errors=True)
                for path in reversed(self._made):
                    try:
                        path.rmdir()
                    except OSError:  # somebody else has put a file there meanwhile
                        break
            if self._work is not None:
                self._work.cleanup()
        finally:
            if self._old_handler is not None:
                signal.signal(signal.SIGTERM, self._old_handler)
                self._old_handler = None

    def _catch_sigterm(self) -> None:
        """Let SIGTERM unwind the stack like Ctrl-C does, unless the application handles it itself."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._old_handler = signal.signal(signal.SIGTERM, _exit_on_sigterm)


def _exit_on_sigterm(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _remove_stale(output: Path) -> None:
    """Clear up after killed compiles of the same output; put back an artifact lost between two renames."""
    for path in sorted(output.parent.glob(f".{output.name}.*-*")):
        match = re.fullmatch(rf"\.{re.escape(output.name)}\.(tmp|old)-(\d+)", path.name)
        if match is None or _alive(int(match[2])):
            continue
        if match[1] == "old" and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
