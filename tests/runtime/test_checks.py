"""No code of an artifact runs before everything about it has been checked."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import host
from llmc.artifact import LIBRARY, MANIFEST, Limits, Manifest
from llmc.errors import LlmcError
from llmc.runtime.checks import open_artifact
from llmc.runtime.embedded import read_embedded
from llmc.runtime.levels import choose_level
from llmc.runtime.library import tvm_version
from llmc.runtime.model import load, parse_bytes
from tests.runtime.compiled import copy_artifact, rewrite_manifest

SHARD = "weights-00001.safetensors"


def check(path: Path, **options: Any) -> Manifest:
    return open_artifact(path, tvm_version=tvm_version(), **options).manifest


def test_the_embedded_manifest_is_the_written_one_but_for_its_own_hash(artifact: Path) -> None:
    written = check(artifact)
    embedded = Manifest.from_text(read_embedded(artifact / LIBRARY), "")
    assert set(written.files) - set(embedded.files) == {LIBRARY}
    assert dataclasses.replace(written, files=embedded.files) == embedded
    library = ctypes.CDLL(str(artifact / LIBRARY))  # the loader sees the same symbols
    size = ctypes.c_uint64.in_dll(library, "llmc_manifest_size").value
    text = bytes((ctypes.c_char * (size + 1)).in_dll(library, "llmc_manifest"))
    assert text == read_embedded(artifact / LIBRARY).encode() + b"\0"


def test_every_flipped_byte_is_refused(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    rng = np.random.default_rng(5)
    check(folder)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        if path.name == MANIFEST:
            places = range(0, len(good), 5)
        else:
            places = sorted(
                {0, len(good) // 2, len(good) - 1, *(int(i) for i in rng.integers(0, len(good), 5))}
            )
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            with pytest.raises(LlmcError):
                check(folder)
        path.write_bytes(good)
    check(folder)


def test_damaged_weights_are_named(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    raw = bytearray((folder / SHARD).read_bytes())
    raw[-1] ^= 1
    (folder / SHARD).write_bytes(raw)
    with pytest.raises(
        LlmcError, match=rf"{SHARD} is damaged: its sha256 .* the manifest says.*\[hash-mismatch\]"
    ):
        load(folder)
    load(folder, check_hashes=False)
    (folder / SHARD).write_bytes(raw[: len(raw) // 2])
    for hashes in (True, False):
        with pytest.raises(
            LlmcError, match=rf"has {len(raw) // 2} bytes; its parameters need .*file-truncated"
        ):
            load(folder, check_hashes=hashes)
    (folder / SHARD).unlink()
    with pytest.raises(LlmcError, match=rf"{SHARD} is missing in .*\[file-missing\]"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", LIBRARY])
def test_missing_files_are_named(artifact: Path, tmp_path: Path, name: str) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(LlmcError, match=rf"{name} is missing"):
        load(folder)


def test_a_library_alone_carries_its_manifest(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "a", manifest=False)
    assert check(folder / LIBRARY) == check(folder)
    (folder / LIBRARY).rename(folder / "renamed.so")
    assert load(folder / "renamed.so").has_tokenizer
    raw = bytearray((folder / "tokenizer.json").read_bytes())
    raw[100] ^= 1
    (folder / "tokenizer.json").write_bytes(raw)
    with pytest.raises(LlmcError, match="hash-mismatch"):
        check(folder / "renamed.so")


def test_manifests_that_disagree_are_refused(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    rewrite_manifest(folder, limits=Limits(10**6, 4, 32))
    with pytest.raises(LlmcError, match=r"differ: one of them was changed.*\[manifest-mismatch\]"):
        check(folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(json.dumps(json.loads(text)))
    with pytest.raises(LlmcError, match=r"not as the compiler wrote it.*\[manifest-corrupt\]"):
        check(folder)
    (folder / MANIFEST).write_text(json.dumps({**json.loads(text), "schema": 99}))
    with pytest.raises(LlmcError, match=r"schema 99; this llmc reads schemas.*\[manifest-version\]"):
        check(folder)
    (folder / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(LlmcError, match="manifest-corrupt"):
        check(folder)


def test_another_tvm_version_is_refused(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    rewrite_manifest(folder, tvm_version="0.99.0")
    with pytest.raises(
        LlmcError, match=rf"needs TVM 0\.99\.0; TVM {tvm_version()} is installed.*\[tvm-version\]"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"triple": "riscv64-unknown-linux-gnu"},
            r"is for riscv64 \(cpu/test\); this machine is .*wrong-architecture",
        ),
        (
            {"triple": f"{host.architecture()}-pc-windows-msvc"},
            r"is for windows .*this machine runs .*wrong-system",
        ),
        (
            {"features": ("fpu9", "amx_fp64")},
            r"needs the processor features fpu9, amx_fp64; this processor lacks amx_fp64, fpu9.*\[cpu-features\]",
        ),
    ],
)
def test_another_machine_is_refused(
    artifact: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    target = dataclasses.replace(check(folder).target, **changes)
    rewrite_manifest(folder, target=target)
    with pytest.raises(LlmcError, match=message):
        load(folder)


def test_tile_registers_need_the_systems_permission(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    manifest = check(folder)
    target = dataclasses.replace(manifest.target, features=("amx_tile",))
    rewrite_manifest(folder, target=target)
    here = host.features() or frozenset()
    monkeypatch.setattr(host, "features", lambda: here | {"amx_tile"})
    answers = [0, 1]
    monkeypatch.setattr(host, "_request_tiles", lambda: answers.pop(0))
    choose_level(dataclasses.replace(manifest, target=target))
    assert answers == [1]  # it was asked for, and granted
    with pytest.raises(LlmcError, match=r"tile registers of amx_tile; .*not permitted\..*\[tiles-refused\]"):
        load(folder)


def test_features_of_this_machine_are_accepted(artifact: Path, tmp_path: Path) -> None:
    here = host.features()
    assert here is not None and len(here) > 5
    folder = copy_artifact(artifact, tmp_path / "a")
    rewrite_manifest(folder, target=dataclasses.replace(check(folder).target, features=tuple(sorted(here))))
    with pytest.raises(LlmcError, match="manifest-mismatch"):  # and nothing else
        load(folder)


@pytest.mark.parametrize("cut", [0, 3, 20, 64, 700, 5000])
def test_libraries_that_are_none(artifact: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.so"
    path.write_bytes((artifact / LIBRARY).read_bytes()[:cut])
    with pytest.raises(LlmcError, match=r"carries no readable llmc manifest.*\[library-corrupt\]"):
        load(path)


def test_damaged_symbol_tables_do_not_crash(artifact: Path, tmp_path: Path) -> None:
    good = (artifact / LIBRARY).read_bytes()
    path = tmp_path / "model.so"
    rng = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(good)
        head = int(rng.integers(2))  # the file header, or the section headers at the end
        for place in rng.integers(0, 64, 3) if head else len(good) - rng.integers(1, 2000, 20):
            bad[int(place)] = int(rng.integers(256))
        path.write_bytes(bad)
        try:
            read_embedded(path)
        except LlmcError as e:
            assert e.ref == "library-corrupt"


def test_a_library_without_a_manifest(tmp_path: Path) -> None:
    import tvm_ffi

    path = next(Path(tvm_ffi.__file__).parent.rglob("libtvm_ffi.*so*"), None)
    assert path is not None
    with pytest.raises(LlmcError, match="it has no symbol llmc_manifest"):
        read_embedded(path)


def test_paths_that_are_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"There is no artifact at .*nowhere.*\[artifact-missing\]"):
        load(tmp_path / "nowhere")
    with pytest.raises(LlmcError, match=r"has neither manifest.json nor model.so.*\[artifact-missing\]"):
        load(tmp_path)


def test_files_outside_of_the_folder_are_refused(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "a")
    rewrite_manifest(folder, files={**check(folder).files, "../secret": "0" * 64})
    with pytest.raises(LlmcError, match=r"outside of the folder: '\.\./secret'"):
        check(folder)


def test_functions_with_other_arguments_are_refused(artifact: Path, tmp_path: Path) -> None:
    from llmc.runtime.model import _check_functions

    manifest = check(artifact)
    step = manifest.functions[0]
    with pytest.raises(
        LlmcError, match=r"must take \(input_ids, positions.*found \(positions.*function-signature"
    ):
        _check_functions(
            dataclasses.replace(manifest, functions=(dataclasses.replace(step, inputs=step.inputs[1:]),))
        )
    with pytest.raises(LlmcError, match="function-signature"):
        _check_functions(dataclasses.replace(manifest, functions=()))
    with pytest.raises(LlmcError, match="no-weights"):
        _check_functions(dataclasses.replace(manifest, params=()))


def test_host_facts() -> None:
    assert host.system_of("aarch64-apple-darwin23") == "darwin"
    assert host.system_of("aarch64-linux-android31") == "android"
    assert host.system_of("x86_64-unknown-linux-gnu") == "linux"
    assert host.architecture("arm64") == "aarch64" and host.architecture("AMD64") == "x86_64"
    assert 1 <= host.default_threads() <= 4096
    assert 1 << 20 < host.available_memory() < 1 << 50


def test_features_are_those_that_all_cores_have(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor: 1\nflags\t\t: fpu avx2\n")
    assert host._linux_features(cpuinfo) == {"fpu", "avx2"}
    cpuinfo.write_text("Features\t: fp asimd bf16\n")
    assert host._linux_features(cpuinfo) == {"fp", "asimd", "bf16"}
    assert host._linux_features(tmp_path / "none") is None


def test_aarch64_features_are_those_that_the_kernel_tells(tmp_path: Path) -> None:
    """HWCAP words of a Cortex-A72, a Neoverse N1 and a Neoverse V2, and what compiles for them ask for."""
    assert host._arm_features(0xFF, 0) == {"fp", "asimd"}
    n1 = host._arm_features(0x119FFF, 0)
    assert n1 is not None and n1 >= {"asimd", "asimdhp", "asimddp"} and not n1 & {"i8mm", "bf16"}
    v2 = host._arm_features(0xEFFFFFFB, 0x0000000000107F8F | 1 << 13 | 1 << 14)
    assert v2 is not None and v2 >= {"asimdhp", "asimddp", "asimdfhm", "i8mm", "bf16"}
    assert host._arm_features(0, 0) is None  # the C library does not tell: /proc/cpuinfo is asked
    assert len(host._auxiliary(16, 26)) == 2
    # cores of two kinds: big ones have i8mm, little ones do not
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "Features\t: fp asimd asimddp asimdhp\n\nFeatures\t: fp asimd asimddp asimdhp i8mm bf16\n"
    )
    assert host._linux_features(cpuinfo) == {"fp", "asimd", "asimddp", "asimdhp"}


@pytest.mark.parametrize(
    ("found", "preset"),
    [
        ({"asimd", "asimddp", "asimdhp", "asimdfhm", "i8mm", "bf16"}, "aarch64-i8mm"),
        ({"asimd", "asimddp", "asimdhp", "i8mm"}, "aarch64-dotprod"),
        ({"asimd", "asimddp"}, "aarch64"),
        ({"asimd"}, "aarch64"),
    ],
)
def test_aarch64_machine_gets_its_preset(
    monkeypatch: pytest.MonkeyPatch, found: set[str], preset: str
) -> None:
    from llmc.targets.cpu import backend

    monkeypatch.setattr(backend, "architecture", lambda: "aarch64")
    monkeypatch.setattr(backend, "features", lambda: frozenset(found))
    assert backend.detect() == preset
    lacks = {"i8mm", "bf16", "asimddp", "asimdhp", "asimdfhm"} - found
    assert set(backend.missing(backend.capabilities("aarch64-i8mm"))) == lacks


def test_container_limits(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert host._cgroup_cpus(tmp_path / "cpu.max") == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host._cgroup_cpus(tmp_path / "cpu.max") > 10**6
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert host._cgroup_memory(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert host._cgroup_memory(tmp_path) > 1 << 60


@pytest.mark.parametrize(
    ("text", "size"), [("6GB", 6 << 30), ("512 MiB", 512 << 20), ("1.5g", 3 << 29), ("4096", 4096), (77, 77)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "six", "1e999", "5 parsecs", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(LlmcError, match=r"is not a size in bytes.*\[memory-size\]"):
        parse_bytes(text)
