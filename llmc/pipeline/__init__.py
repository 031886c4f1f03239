"""The compile pipeline: `compile.py` is the ordered list of stages, the other files hold what they do."""

from llmc.pipeline.compile import CompileResult, compile_model
from llmc.pipeline.lower import lower_model
from llmc.pipeline.quality import run_taps

__all__ = ["CompileResult", "compile_model", "lower_model", "run_taps"]
