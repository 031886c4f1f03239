"""Sections of tools/gpu_check.py that run other programs' decode of the same 8B shape, where they are installed.

Weights are the program's own random ones: the time of a step does not depend on them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.gpu_device import Row
from tools.gpu_kernels import Session

_RUNS = 3
# (token ids of a prompt, tokens to generate) -> None
Generate = Callable[[list[int], int], None]


def vllm(s: Session) -> Iterator[Row]:
    """Decode, batch 1, by vLLM with CUDA graphs."""
    yield from _decode(s, "vllm", "vllm", _vllm)


def trtllm(s: Session) -> Iterator[Row]:
    """Decode, batch 1, by TensorRT-LLM with CUDA graphs."""
    yield from _decode(s, "trtllm", "tensorrt_llm", _trtllm)


def _decode(s: Session, section: str, package: str, load: Callable[[Path, int], Generate]) -> Iterator[Row]:
    """A row with tokens per second; without the program, a row that says how to get it."""
    if importlib.util.find_spec(package) is None:
        yield Row(section, "decode, batch 1", 0.0, "tokens/s", note=f"not installed: pip install {package}")
        return
    sizes = s.device.sizes
    prompt = [3 + i % (sizes.model[6] - 3) for i in range(min(128, sizes.prompt))]
    with tempfile.TemporaryDirectory(prefix="llmc-gpu-check-") as work:
        folder = _source(s.folder / "models" / "bf16" / "source", Path(work))
        begin = time.perf_counter()
        try:
            generate = load(folder, len(prompt) + sizes.tokens + 1)
            generate(prompt, 4)
        # what another program cannot do here is no failure of ours: whatever it raises becomes a line of the table
        except (Exception, SystemExit) as e:
            lines = f"{type(e).__name__}: {e}".splitlines()
            yield Row(section, "decode, batch 1", 0.0, "tokens/s", note=f"did not run: {lines[0][:160]}")
            return
        ready = time.perf_counter() - begin
        # the difference of two lengths: neither the prompt nor what a call costs
        few = max(1, sizes.tokens // 8)
        rate = (sizes.tokens - few) / (
            _seconds(generate, prompt, sizes.tokens) - _seconds(generate, prompt, few)
        )
    note = f"{importlib.import_module(package).__version__}, {ready:.0f} s to load"
    yield Row(section, "decode, batch 1", rate, "tokens/s", note=note)


def _seconds(generate: Generate, prompt: list[int], tokens: int) -> float:
    times = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        generate(prompt, tokens)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _source(config: Path, work: Path) -> Path:
    """A folder with the model's config.json and nothing else."""
    folder = work / "source"
    shutil.copytree(config, folder)
    json.loads((folder / "config.json").read_text())
    return folder


def _vllm(folder: Path, tokens: int) -> Generate:
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=tokens + 64,
        max_num_seqs=1, gpu_memory_utilization=0.5, enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompt: list[int], count: int) -> None:
        asked = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        model.generate({"prompt_token_ids": prompt}, asked, use_tqdm=False)

    return generate


def _trtllm(folder: Path, tokens: int) -> Generate:
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

    model: Any = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, max_seq_len=tokens + 64, max_batch_size=1,
        cuda_graph_config=CudaGraphConfig(max_batch_size=1),
        kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=0.2, enable_block_reuse=False),
    )  # fmt: skip

    def generate(prompt: list[int], count: int) -> None:
        asked = SamplingParams(
            temperature=0.0, max_tokens=count, ignore_eos=True, end_id=-1, detokenize=False
        )
        model.generate(prompt, asked, use_tqdm=False)

    return generate


__all__ = ["trtllm", "vllm"]
