"""The programs that llmc is measured against: what to install, how weights are converted, which formats they have."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench_sides.protocol import ROOT

# llama.cpp's own detection ("native") also turns AMX on, with which 0.3.36 crashes in ggml_backend_amx_mul_mat;
# so its best build that runs everywhere is asked for by name, from what the processor has
_GGML_FLAGS = {
    "GGML_SSE42": "sse4_2",
    "GGML_AVX": "avx",
    "GGML_AVX2": "avx2",
    "GGML_FMA": "fma",
    "GGML_F16C": "f16c",
    "GGML_BMI2": "bmi2",
    "GGML_AVX512": "avx512f",
    "GGML_AVX512_VBMI": "avx512vbmi",
    "GGML_AVX512_VNNI": "avx512_vnni",
    "GGML_AVX512_BF16": "avx512_bf16",
}


@dataclass(frozen=True)
class Peer:
    """A program to compare with.

    Attributes:
        name: as given to --against.
        side: dotted name of the module with its Side.
        requirements: pinned packages for its environment; none = it runs in this one.
        source_only: packages that are built from source.
        unwanted: packages that are removed again: nothing here needs them, and a build that does not fit breaks others.
        formats: bits of llmc's weights -> the peer's name for the nearest format of its own.
        convert: dotted name of the module that converts a checkpoint, run in the peer's environment as
            `python -m MODULE CHECKPOINT FORMAT OUTPUT`; "" = it reads the checkpoint itself.
        conversion: version of that module's results; older ones in the cache are not used.
    """

    name: str
    side: str
    requirements: tuple[str, ...] = ()
    source_only: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    formats: dict[int, str] = field(default_factory=dict)
    convert: str = ""
    conversion: int = 1


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama.cpp",
            "tools.bench_sides.llama_cpp_side",
            ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
            ("llama-cpp-python",),
            (),
            {4: "Q4_0", 8: "Q8_0", 16: "BF16"},
            "tools.bench_sides.llama_cpp_convert",
        ),
        Peer(
            "openvino",
            "tools.bench_sides.openvino_side",
            (
                "openvino==2026.4.1",
                "optimum==2.3.0",
                "optimum-intel==2.2.0",
                "nncf==3.4.0",
                "transformers==5.5.4",
                "torch==2.13.0",
            ),
            (),
            # optimum-intel asks for it; made for another build of torch it stops transformers from importing
            ("torchvision",),
            {4: "int4", 8: "int8", 16: "fp16"},
            "tools.bench_sides.openvino_convert",
        ),
        # it has no 4-bit kernels for the CPU: whatever llmc's format, it runs the checkpoint's own 16 bits
        Peer("transformers", "tools.bench_sides.transformers_side", formats={4: "16", 8: "16", 16: "16"}),
    )
}


class PeerUnavailable(Exception):
    """A peer cannot be installed, or cannot convert the weights; the message is a sentence for the user."""


def interpreter(peer: Peer, cache: Path) -> Path:
    """The Python of a peer's environment, installed if it is not there yet.

    Raises:
        PeerUnavailable: pip failed; its output is in the file that the message names.
    """
    if not peer.requirements:
        return Path(sys.executable)
    folder = cache / "envs" / peer.name
    python, done = folder / "bin" / "python", folder / "llmc-bench-installed.txt"
    wanted = "\n".join((*peer.requirements, *sorted(_build_settings(peer).values()))) + "\n"
    if python.exists() and done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"bench: installing {peer.name} into {folder}: {' '.join(peer.requirements)}", file=sys.stderr)
    if peer.source_only:
        print("bench: it is built from source, which takes several minutes", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = cache / "envs" / f"{peer.name}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        commands = [
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", *_pip_arguments(peer)],
        ]
        if peer.unwanted:
            commands.append([str(python), "-m", "pip", "uninstall", "--yes", *peer.unwanted])
        for command in commands:
            code = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_build_settings(peer)},
            ).returncode
            if code:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                errors = [line for line in lines if line.lstrip().lower().startswith("error")] or lines[-1:]
                raise PeerUnavailable(
                    f"{peer.name} cannot be installed: {' '.join(errors[:1]) or 'no output'} (all of it: {log})"
                )
    done.write_text(wanted, encoding="utf-8")
    print(f"bench: {peer.name} installed in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return python


def converted(peer: Peer, python: Path, model: Path, kind: str) -> Path:
    """What the peer loads: the checkpoint, or its conversion to the peer's format `kind`, made if it is not there.

    Raises:
        PeerUnavailable: the conversion failed.
    """
    if not peer.convert:
        return model
    output = model.parent / f"{model.name}.{peer.name}-{kind}-{_digest(peer, model)}"
    if output.exists():
        return output
    print(f"bench: converting {model.name} to {peer.name}'s {kind}", file=sys.stderr)
    partial = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    log = model.parent / f"{output.name}.log"
    command = [str(python), "-m", peer.convert, str(model), kind, str(partial)]
    try:
        with log.open("w", encoding="utf-8") as out:
            code = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            ).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise PeerUnavailable(
                f"{peer.name} cannot convert {model.name} to {kind}: {lines[-1] if lines else f'code {code}'} "
                f"(all of it: {log})"
            )
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def peer_weight_bytes(peer: Peer, model: Path) -> int:
    """Bytes of the weights in the peer's own format (tied weights once, as the files hold them)."""
    suffixes = (".gguf", ".bin", ".safetensors")
    return sum(f.stat().st_size for f in model.iterdir() if f.suffix in suffixes)


def _pip_arguments(peer: Peer) -> list[str]:
    return [*(f"--no-binary={name}" for name in peer.source_only), *peer.requirements]


def _build_settings(peer: Peer) -> dict[str, str]:
    """Environment variables of a build from source."""
    if "llama-cpp-python" not in peer.source_only:
        return {}
    from llmc import host

    features = host.features() or frozenset()
    flags = [f"-D{flag}={'ON' if name in features else 'OFF'}" for flag, name in _GGML_FLAGS.items()]
    return {"CMAKE_ARGS": " ".join(("-DGGML_NATIVE=OFF", *flags))} if host.architecture() == "x86_64" else {}


def _digest(peer: Peer, model: Path) -> str:
    """Changes with the checkpoint and with the converting program: no stale conversion is used."""
    what = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(model.glob("*.safetensors"))]
    return hashlib.sha256(repr((peer.requirements, peer.conversion, what)).encode()).hexdigest()[:8]
