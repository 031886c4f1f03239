"""Settings for every test process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.shared import REPEATABLE, TINY, made_once

# two test processes on two cores: more threads in each would only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# a shell starts background jobs with Ctrl-C ignored, and their children inherit that; the tests of Ctrl-C need it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of tiny_model("llama") compiled with TINY, and verified; copy it before a change.

    The folder checkpoint/ beside it holds the model.
    """

    def make(folder: Path) -> None:
        from llmc.pipeline import compile_model
        from tools.tiny_configs import tiny_model

        tiny_model("llama").save_pretrained(folder / "checkpoint")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in REPEATABLE.items():
                patch.setenv(name, value)
            compile_model(folder / "checkpoint", folder / "artifact", **{**TINY, "verify": "sample"})

    return made_once(tmp_path_factory, "tiny-llama", make) / "artifact"
