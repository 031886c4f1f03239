"""Settings for every test process."""

from __future__ import annotations

import os

# two test processes on two cores: more threads in each would only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
