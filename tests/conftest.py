"""Settings for every test process."""

from __future__ import annotations

import os
import signal

# two test processes on two cores: more threads in each would only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# a shell starts background jobs with Ctrl-C ignored, and their children inherit that; the tests of Ctrl-C need it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
