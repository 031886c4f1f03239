"""`llmc inspect`: tables hold the facts of the manifest, and damage is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llmc.artifact import (
    LIBRARY,
    MANIFEST,
    SCHEMA,
    KernelEntry,
    Manifest,
)
from llmc.cli.format import human_bytes, human_count
from llmc.inspect import inspect
from llmc.link import embed_manifest, run_cxx
from tests.cli.conftest import MANIFEST_OF_TEST, llmc


def test_inspect_shows_everything(artifact: Path) -> None:
    done = llmc("inspect", artifact)
    assert done.exit_code == 0, done.output
    for text in (
        "some/checkpoint: LlamaForCausalLM (llama), 6 layers, 8.03 B parameters, vocabulary 1000",
        "cpu/x86-64-v3 (x86_64-unknown-linux-gnu, x86-64-v3)",
        "avx2 fma",
        "4096 tokens per sequence, 16 sequences and 512 tokens per step",
        "pages of 32 tokens, 5.0 KiB per token",
        "sliding_window 1024",
        "3 (0, 2-3)",
        "layer 5 reads layer 3's",
        "20 tensors, 5.0 KiB (bfloat16 5.0 KiB)",
        "8 more; --params lists all",
        "2.13.0",
    ):
        assert text in done.stdout, text
    assert "-> logits" in done.stdout and "Rx1000" in done.stdout
    assert "w19" not in done.stdout and "w19" in llmc("inspect", artifact, "--params").stdout
    assert "problem" not in done.stdout


def test_inspect_json_is_the_manifest(artifact: Path) -> None:
    done = llmc("inspect", artifact, "--json")
    assert Manifest.from_text(done.stdout, "stdout").model == MANIFEST_OF_TEST.model
    assert json.loads(done.stdout)["schema"] == SCHEMA


def test_inspect_names_missing_and_changed_files(artifact: Path) -> None:
    assert inspect(artifact, check_hashes=True).problems == ()
    weights = artifact / "weights-00001.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[77] ^= 1
    weights.write_bytes(raw)
    assert inspect(artifact, check_hashes=True).problems == (
        "weights-00001.safetensors has changed since the artifact was written",
    )
    weights.unlink()
    assert "weights-00001.safetensors is missing" in llmc("inspect", artifact).stdout


def test_inspect_a_library_alone(artifact: Path, tmp_path: Path) -> None:
    run_cxx(
        ["-shared", "-o", str(artifact / LIBRARY), str(embed_manifest(MANIFEST_OF_TEST.as_text(), tmp_path))]
    )
    assert inspect(artifact / LIBRARY).manifest == MANIFEST_OF_TEST


@pytest.mark.parametrize("text", ["", "{", "[]", "\x80", '{"schema": 99}', f'{{"schema": {SCHEMA}}}'])
def test_inspect_refuses_a_damaged_manifest(artifact: Path, text: str) -> None:
    (artifact / MANIFEST).write_bytes(text.encode("latin1"))
    done = llmc("inspect", artifact)
    assert done.exit_code == 2
    assert done.stderr.endswith(("[manifest-corrupt]\n", "[manifest-version]\n"))


KERNELS = (
    KernelEntry("embedding", "embedding", 1, 0.0, "4*T", "100*T", "0"),
    KernelEntry("linear_512_256", "linear", 6, 1.0, "262144 + 512*T", "1024*T", "262144*T"),
    KernelEntry("attention_0", "attention", 4, 0.5, "512*C1024", "512*T", "1024*P1024"),
)


def with_kernels(folder: Path, *kernels: KernelEntry) -> Path:
    function = MANIFEST_OF_TEST.functions[0]
    both = tuple(dataclasses.replace(function, name=n, kernels=kernels) for n in ("step", "decode"))
    manifest = dataclasses.replace(MANIFEST_OF_TEST, functions=both)
    (folder / MANIFEST).write_text(manifest.as_text())
    assert Manifest.from_text(manifest.as_text(), "") == manifest
    return folder


def test_inspect_kernels(artifact: Path) -> None:
    done = llmc("inspect", with_kernels(artifact, *KERNELS), "--kernels", "--context", "2000")
    assert done.exit_code == 0, done.output
    decode, step = done.stdout.split("step: ")
    assert "decode: 11 kernels per step, 1.5 per block, for 1 sequence of 2000 tokens" in decode
    rows = {line.split()[0]: line for line in decode.splitlines() if line.strip()}
    assert rows["linear_512_256"].split()[1:8] == ["linear", "6", "1", "257.5", "KiB", "262.14", "K"]
    assert "262.14K + 1.54K T" in rows["linear_512_256"] and "262.14K T" in rows["linear_512_256"]
    # the window bounds what is read: 1024 of 2000 tokens
    assert rows["attention_0"].split()[1:8] == ["attention", "4", "0.5", "512.5", "KiB", "1.05", "M"]
    total = 104 + 6 * (262144 + 1536) + 4 * (512 * 1024 + 512)
    assert human_bytes(total) in rows["all"]
    assert "a prompt of 512 tokens" in step


def test_inspect_kernels_mistakes(artifact: Path) -> None:
    def refused(*arguments: str, ref: str) -> str:
        done = llmc("inspect", artifact, *arguments)
        assert done.exit_code == 2 and done.stderr.endswith(f"[{ref}]\n")
        return str(done.stderr)

    refused("--kernels", ref="no-kernels")
    refused("--context", "5", ref="context")
    with_kernels(artifact, *KERNELS)
    assert "1 to 4096" in refused("--kernels", "--context", "5000", ref="context")
    with_kernels(artifact, dataclasses.replace(KERNELS[1], read="all of it"))
    assert "linear_512_256" in refused("--kernels", ref="manifest-corrupt")


def test_numbers() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [human_count(n) for n in (7, 5_000, 8_030_261_248)] == ["7", "5.00 K", "8.03 B"]
