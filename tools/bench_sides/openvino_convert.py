"""Convert a checkpoint with optimum-intel's exporter; runs in the OpenVINO environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WEIGHT_OPTIONS = {
    "int4": ["--weight-format", "int4", "--group-size", "32", "--sym", "--ratio", "1.0"],
    "int8": ["--weight-format", "int8"],
    "fp16": ["--weight-format", "fp16"],
}


def convert(checkpoint: Path, kind: str, output: Path) -> None:
    """Write openvino_model.xml and .bin into `output`."""
    tool = Path(sys.executable).parent / "optimum-cli"
    command = [str(tool), "export", "openvino", "--model", str(checkpoint)]
    command += ["--task", "text-generation-with-past", "--disable-convert-tokenizer", *WEIGHT_OPTIONS[kind]]
    subprocess.run([*command, str(output)], check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
