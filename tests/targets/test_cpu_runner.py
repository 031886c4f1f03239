"""CpuRunner: what the tuner measures with."""

from __future__ import annotations

import os
import subprocess
import sys


def test_candidates_run_on_all_cores() -> None:
    """TVM by itself would leave every second processor out, on machines without hyper-threads too."""
    code = (
        "import os\n"
        "from llmc.host import default_threads\n"
        "from llmc.targets.backend import get\n"
        "from llmc.targets.cpu.runner import CpuRunner\n"
        "backend, caps = get('cpu')\n"
        "made = CpuRunner(caps, backend.tvm_target(caps))\n"
        "assert made.threads == default_threads()\n"
        "assert os.environ['TVM_NUM_THREADS'] == str(made.threads)\n"
    )
    alone = {k: v for k, v in os.environ.items() if k != "TVM_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=alone)
