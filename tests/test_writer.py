"""The artifact writer: whole or not there; shards that safetensors reads; reproducible libraries."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tvm
from tvm.script import ir as I
from tvm.script import tirx as T

from llmc import artifact
from llmc.artifact import LIBRARY, MANIFEST, Manifest, sha256_file
from llmc.errors import LlmcError
from llmc.host import architecture
from llmc.kv_plan import KVPlan
from llmc.runtime.embedded import SIZE_SYMBOL, SYMBOL
from llmc.shards import ShardWriter, disk_errors
from llmc.writer import ArtifactWriter, PackedTensor, check_output, created, embed_manifest, link_library

ROOT = Path(__file__).resolve().parent.parent


def data_for(tensor: PackedTensor) -> np.ndarray:
    rng = np.random.default_rng(len(tensor.name))
    kind = ml_dtypes.bfloat16 if tensor.dtype == "bfloat16" else tensor.dtype
    return (rng.standard_normal(tensor.shape) * 9).astype(kind)


TENSORS = [
    PackedTensor("embed", (10, 3), "float32", sources=("model.embed_tokens.weight",)),
    PackedTensor("empty", (0, 4), "float16"),
    PackedTensor("scalar", (), "float32"),
    PackedTensor("layers.0.qkv", (7, 5), "bfloat16", "blocked(n=7)", ("q", "k", "v")),
    PackedTensor("codes", (64, 2), "uint8"),
    PackedTensor("norm", (33,), "float16"),
]


def write_shards(folder: Path, shard_bytes: int = 1 << 20) -> ShardWriter:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, TENSORS, shard_bytes=shard_bytes) as shards:
        for tensor in TENSORS:
            shards.write(tensor.name, data_for(tensor))
    return shards


def executable() -> object:
    @I.ir_module
    class Module:
        @T.prim_func(s_tir=True)
        def add_one(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
            T.func_attr({"global_symbol": "add_one"})
            for i in range(4):
                with T.sblock("y"):
                    vi = T.axis.spatial(4, i)
                    y[vi] = x[vi] + T.float32(1)

    return tvm.compile(Module, target="llvm")


def manifest() -> Manifest:
    return Manifest(
        schema=artifact.SCHEMA,
        llmc_version="0",
        tvm_version="0",
        created=created(),
        spec={"model": 'ü "quoted" \\ ?? \n'},
        model=artifact.ModelInfo("m", "M", "m", 1, 1, 1, "float32"),
        target=artifact.TargetInfo("cpu", "cpu", f"{architecture()}-unknown-linux-gnu", "x", ()),
        limits=artifact.Limits(1, 1, 1),
        kv_plan=KVPlan(16, ()),
        functions=(),
        params=(),
        quality=artifact.QualityReport("off", seconds=1.25),
    )


@pytest.mark.parametrize("shard_bytes", [1 << 20, 100])
def test_shards_are_safetensors_with_aligned_offsets(tmp_path: Path, shard_bytes: int) -> None:
    shards = write_shards(tmp_path, shard_bytes)
    assert [(e.name, e.shape, e.dtype, e.layout, e.sources) for e in shards.entries] == [
        (t.name, t.shape, t.dtype, t.layout, t.sources) for t in TENSORS
    ]
    assert len(shards.files) == (1 if shard_bytes > 100 else 4)
    assert {p.name: sha256_file(p) for p in tmp_path.iterdir()} == shards.files
    for tensor, entry in zip(TENSORS, shards.entries, strict=True):
        want = data_for(tensor)
        with safetensors.safe_open(tmp_path / entry.shard, "np") as f:
            assert np.array_equal(f.get_tensor(tensor.name).view(want.dtype), want)
        assert entry.offset % 64 == 0 and entry.nbytes == want.nbytes
        assert (tmp_path / entry.shard).read_bytes()[entry.offset :][: entry.nbytes] == want.tobytes()


def test_shards_are_deterministic(tmp_path: Path) -> None:
    assert write_shards(tmp_path / "a", 100).files == write_shards(tmp_path / "b", 100).files


def test_shard_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected tensor 'embed' of 120 bytes, found 'norm' of 66"):
        ShardWriter(tmp_path, TENSORS).write("norm", data_for(TENSORS[-1]))
    with pytest.raises(ValueError, match="'embed' was announced and not written"):
        ShardWriter(tmp_path, TENSORS).close()
    with pytest.raises(ValueError, match="announced twice: embed"):
        ShardWriter(tmp_path, [TENSORS[0], TENSORS[0]])


def test_two_links_give_the_same_bytes_and_carry_the_manifest(tmp_path: Path) -> None:
    text = manifest().as_text()
    paths = []
    for name in ("a", "b"):
        work = tmp_path / name
        work.mkdir()
        link_library(executable(), work / LIBRARY, [embed_manifest(text, work)])
        paths.append(work / LIBRARY)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # whoever ran the compile must not be readable from the file
    assert str(tmp_path).encode() not in paths[0].read_bytes()
    library = ctypes.CDLL(str(paths[0]))
    size = ctypes.c_uint64.in_dll(library, SIZE_SYMBOL).value
    carried = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, SYMBOL)))
    assert carried.decode() == text and size == len(text.encode())
    x, y = tvm.runtime.tensor(np.arange(4, dtype="float32")), tvm.runtime.tensor(np.zeros(4, "float32"))
    tvm.runtime.load_module(str(paths[1]))["add_one"](x, y)
    assert y.numpy().tolist() == [1, 2, 3, 4]


def test_a_missing_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlmcError, match=r"needs a C\+\+ compiler driver.*apt install g\+\+.*\[no-cxx\]"):
        embed_manifest("{}", tmp_path)


def test_a_failing_linker_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "bad.o").write_text("no object")
    with pytest.raises(LlmcError, match="link-failed") as e:
        link_library(executable(), tmp_path / "x.so", [tmp_path / "bad.o"])
    assert "bad.o" in str(e.value.context["output"])


def test_commit_puts_the_whole_artifact_in_place(tmp_path: Path) -> None:
    tokenizer = tmp_path / "checkpoint"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "config.json").write_text("{}")
    output = tmp_path / "new" / "demo"
    with ArtifactWriter(output) as writer:
        assert not output.exists()
        with writer.shards(TENSORS) as shards:
            for tensor in TENSORS:
                shards.write(tensor.name, data_for(tensor))
        assert writer.copy_tokenizer(tokenizer) == ("tokenizer.json",)
        outer = writer.finish(executable(), manifest())
        writer.commit()
    assert sorted(os.listdir(tmp_path / "new")) == ["demo"]
    names = {MANIFEST, LIBRARY, "tokenizer.json", "weights-00001.safetensors"}
    assert {p.name for p in output.iterdir()} == names
    read = Manifest.from_text((output / MANIFEST).read_text(), "x")
    assert read == outer and read.quality.seconds is None
    assert read.files == {n: sha256_file(output / n) for n in names - {MANIFEST}}
    library = ctypes.CDLL(str(output / LIBRARY))
    carried = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, SYMBOL))).decode()
    inner = Manifest.from_text(carried, "model.so")
    assert inner.files == {n: d for n, d in read.files.items() if n != LIBRARY}


def old_artifact(output: Path) -> None:
    output.mkdir()
    (output / MANIFEST).write_text("old")
    (output / "weights-00001.safetensors").write_text("old")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_failure_leaves_the_previous_artifact_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    output = tmp_path / "demo"
    old_artifact(output)
    with pytest.raises(error), ArtifactWriter(output) as writer:
        (writer.folder / LIBRARY).write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["demo"]
    assert (output / MANIFEST).read_text() == "old"
    with ArtifactWriter(output) as writer:
        (writer.folder / MANIFEST).write_text("new")
        writer.commit()
    assert os.listdir(tmp_path) == ["demo"] and os.listdir(output) == [MANIFEST]
    assert (output / MANIFEST).read_text() == "new"


def test_a_failing_rename_puts_the_previous_artifact_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "demo"
    old_artifact(output)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(LlmcError, match="write-failed"), ArtifactWriter(output) as writer:
        writer.commit()
    assert os.listdir(tmp_path) == ["demo"] and (output / MANIFEST).read_text() == "old"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llmc.writer import ArtifactWriter\n"
        "with ArtifactWriter(Path(sys.argv[1])) as w:\n"
        "    (w.folder / 'model.so').write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "made" / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert [p.name for p in (tmp_path / "made").iterdir()] == [f".demo.tmp-{process.pid}"]
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    process.stdout.close()
    assert os.listdir(tmp_path) == []


def test_left_overs_of_killed_compiles_are_cleared(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".demo.tmp-{dead.pid}").mkdir()
    lost = tmp_path / f".demo.old-{dead.pid}"
    old_artifact(lost)
    running = tmp_path / f".demo.tmp-{os.getppid()}"
    running.mkdir()
    with ArtifactWriter(tmp_path / "demo"):
        pass
    assert sorted(os.listdir(tmp_path)) == [running.name, "demo"]
    assert (tmp_path / "demo" / MANIFEST).read_text() == "old"


def test_outputs_that_would_lose_files_are_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    old_artifact(mine)
    check_output(mine)
    (mine / "thesis.txt").write_text("")
    with pytest.raises(LlmcError, match=r"\(thesis.txt\).*output-not-an-artifact"), ArtifactWriter(mine):
        pass
    half = tmp_path / "half"
    half.mkdir()
    check_output(half)
    (half / "tokenizer.json").write_text("")
    with pytest.raises(LlmcError, match="output-not-an-artifact"):
        check_output(half)
    with pytest.raises(LlmcError, match="output-not-a-folder"):
        check_output(half / "tokenizer.json")
    with pytest.raises(LlmcError, match="write-failed"), ArtifactWriter(half / "tokenizer.json" / "x"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["half", "mine"]


def test_disk_full_while_packing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FAULT", "disk-full")
    with (
        pytest.raises(LlmcError, match=r"disk is full.*\[disk-full\]"),
        ArtifactWriter(tmp_path / "demo") as writer,
        writer.shards(TENSORS) as shards,
    ):
        shards.write("embed", data_for(TENSORS[0]))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "ref"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EACCES, "no-write-permission"),
        (errno.EROFS, "no-write-permission"),
    ],
)
def test_os_errors_become_sentences(
    number: int, ref: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(LlmcError, match=rf"{tmp_path}/a/demo.*\[{ref}\]"),
        ArtifactWriter(tmp_path / "a" / "demo"),
    ):
        pass
    with pytest.raises(LlmcError, match=ref), disk_errors(tmp_path):
        raise OSError(number, "x")


def test_created_honours_source_date_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert created() == "1970-01-02T00:00:00+00:00"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert created() > "2026"
