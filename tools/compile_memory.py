"""Peak memory of `llmc compile` for random Llama models that differ in their number of layers only.

    python tools/compile_memory.py --layers 4 8 16 --quant none q4g32

Prints a markdown table. "Resident" is the kernel's own peak (VmHWM); it counts pages of mapped files too (the checkpoint, the
artifact, libraries), which are taken back when memory is short. "Private" is what the process itself allocated, looked at every
20 ms: on a busy machine a short peak goes unseen. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_FIELDS = ("RssAnon", "VmHWM")


@dataclass(frozen=True)
class Peak:
    """Peaks of one compile in MiB, and its processor time."""

    private: int
    resident: int
    seconds: float


def write_llama(folder: Path, layers: int, hidden: int) -> int:
    """A random bfloat16 checkpoint; returns its number of weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def compile_peak(model: Path, output: Path, *options: str) -> Peak:
    """Run `llmc compile` in a process of its own and watch it."""
    command = [sys.executable, "-m", "llmc", "compile", str(model), "-o", str(output), "-q", *options]
    process = subprocess.Popen(command, cwd=_ROOT)
    peaks = dict.fromkeys(_FIELDS, 0)

    def watch() -> None:
        while True:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) // 1024)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    # not usage.ru_maxrss: that begins with what this process held when it started the other
    return Peak(peaks["RssAnon"], peaks["VmHWM"], usage.ru_utime + usage.ru_stime)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024, help="width, a multiple of 256")
    parser.add_argument("--quant", nargs="+", default=["none", "q4g32"])
    options = parser.parse_args(argv)
    print("| quant | layers | weights | private | resident | processor time |\n|---|---|---|---|---|---|")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            count = write_llama(Path(scratch) / "model", layers, options.hidden)
            for quant in options.quant:
                peak = compile_peak(Path(scratch) / "model", Path(scratch) / quant, "--quant", quant)
                print(
                    f"| {quant} | {layers} | {count / 1e6:.0f} M | {peak.private} MiB | {peak.resident} MiB | "
                    f"{peak.seconds:.0f} s |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
