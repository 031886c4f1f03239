"""Sections of tools/gpu_check.py that run whole artifacts: tokens and logits against references, then steps per second.

An 8B model's weights cannot travel. They are a function of their names and a seed: the artifact is compiled without them
(tools/gpu_prepare.py), and here they are made on the device, packed by the compiler's own code and put into its files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.gpu_device import Device, Row, Sizes
from tools.gpu_kernels import Session, WrongResult

_WORKERS = min(16, os.cpu_count() or 1)
_RUNS = 3


# -- weights that follow from their names ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedParam:
    """A PackedParam (llmc/passes/step_module.py) as the plan of a prepared model holds it."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    transposed: bool
    more: tuple[str, ...]
    gated: bool
    scheme: str
    layout_text: str
    expression: None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source, *self.more)

    @staticmethod
    def from_json(values: dict[str, Any]) -> SavedParam:
        return SavedParam(**{**values, "shape": tuple(values["shape"]), "more": tuple(values["more"])})


class NamedWeights:
    """Random weights in bfloat16, the same for the same names on the same kind of device; unit gain for matrices.

    Args:
        shapes: name -> shape.
        where: torch's device on which they are made.
    """

    def __init__(self, shapes: dict[str, list[int]], where: str) -> None:
        self._shapes, self._where = shapes, where

    def on_device(self, name: str) -> torch.Tensor:
        """A weight where it is made."""
        shape = self._shapes[name]
        generator = torch.Generator(device=self._where).manual_seed(zlib.crc32(name.encode()))
        made = torch.randn(*shape, device=self._where, dtype=torch.float32, generator=generator)
        if len(shape) < 2:
            made = 1 + 0.1 * made
        elif "embed" not in name:
            made *= shape[-1] ** -0.5
        return made.to(torch.bfloat16)

    def load(self, name: str) -> torch.Tensor:
        """A weight on the host, as packing asks for it."""
        return self.on_device(name).cpu()


def fill(folder: Path, out: Path, where: str) -> float:
    """A prepared artifact with its weights; returns the seconds that it took.

    Args:
        folder: of the artifact without weights, with plan.json.
        out: new folder.
    """
    from llmc.packing import packed_tensors
    from llmc.shards import PackedTensor, ShardWriter

    begin = time.perf_counter()
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name != "plan.json":
            shutil.copy(path, out / path.name)
    plan = json.loads((folder / "plan.json").read_text())
    params = [SavedParam.from_json(values) for values in plan["params"]]
    source: Any = NamedWeights(plan["shapes"], where)
    tensors = [PackedTensor(p.name, p.shape, p.dtype, p.layout_text, p.sources) for p in params]

    def pack(param: Any) -> np.ndarray:
        return next(packed_tensors((param,), source))[1]

    with ShardWriter(out, tensors) as shards, ThreadPoolExecutor(_WORKERS) as pool:
        waiting: list[Future[np.ndarray]] = []
        ahead = iter(params)
        for param in params:
            while len(waiting) < _WORKERS and (following := next(ahead, None)) is not None:
                waiting.append(pool.submit(pack, following))
            shards.write(param.name, waiting.pop(0).result())
    return time.perf_counter() - begin


@contextmanager
def filled(s: Session, name: str) -> Iterator[tuple[Path, float]]:
    """A prepared artifact with weights in a temporary folder, in memory if there is room; (folder, seconds)."""
    folder = s.folder / "models" / name
    size = 1.1 * json.loads((folder / "plan.json").read_text())["bytes"]
    roots = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    root = next((r for r in roots if r.is_dir() and shutil.disk_usage(r).free > size), None)
    if root is None:
        raise OSError(
            f"{size / 1e9:.0f} GB are needed for the weights of {name} below {' or '.join(map(str, roots))}"
        )
    with tempfile.TemporaryDirectory(prefix="llmc-gpu-check-", dir=root) as work:
        took = fill(folder, Path(work) / "artifact", s.device.where)
        yield Path(work) / "artifact", took


# -- small models: numbers -------------------------------------------------------------------------------------------------


def tokens(s: Session) -> Iterator[Row]:
    """Greedy tokens of float32 models against those of the cpu artifact of the same model."""
    import llmc

    for folder in sorted((s.folder / "tokens").iterdir()):
        expected = json.loads((folder / "expected.json").read_text())
        model = llmc.load(folder / "artifact", max_memory="2GB")
        found = model.generate(
            expected["prompt"], max_tokens=len(expected["tokens"]), temperature=0.0, ignore_eos=True
        )
        pairs = zip(found.token_ids, expected["tokens"], strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected["tokens"]))
        yield Row("tokens", folder.name, float(same), "tokens equal cpu's", float(len(expected["tokens"])))


def schemes(s: Session) -> Iterator[Row]:
    """Logits of a tiny model in every scheme, prefill and decode, against the cpu artifact with the same codes."""
    import llmc

    for folder in sorted((s.folder / "schemes").iterdir()):
        told = json.loads((folder / "expected.json").read_text())
        expected = np.load(folder / "logits.npy")
        model = llmc.load(folder / "artifact", max_memory="2GB")
        found = model.logits(told["ids"], prefill=told["prefill"])
        error = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
        if not math.isfinite(error):
            error = float("inf")
        yield Row("schemes", folder.name, error, "relative error", told["allowed"], at_most=True)


# -- the 8B shape ----------------------------------------------------------------------------------------------------------


def model_bf16(s: Session) -> Iterator[Row]:
    """bfloat16: logits, decode, prefill."""
    yield from _model(s, "bf16", 0.85, check=True)


def model_q4(s: Session) -> Iterator[Row]:
    """q4g128: decode, prefill."""
    yield from _model(s, "q4g128", 0.70, check=False)


def _model(s: Session, name: str, decode_target: float, check: bool) -> Iterator[Row]:
    import llmc

    sizes, section = s.device.sizes, f"model-{name}"
    with filled(s, name) as (folder, took):
        begin = time.perf_counter()
        # the files were written a moment ago, and their hashes in the manifest are of files without weights
        model = llmc.load(folder, max_memory=f"{_memory(sizes)}GB", check_hashes=False)
        loading = time.perf_counter() - begin
        yield Row(
            section, "set-up", took + loading, "s", note=f"weights {took:.0f} s, loading {loading:.0f} s"
        )
        if check:
            yield from _logits(s, model, name)
        read = step_bytes(model.manifest)
        ids = [int(i) for i in np.random.default_rng(0).integers(3, sizes.model[6], sizes.prompt)]
        short = ids[: min(128, sizes.prompt)]
        model.generate(short, max_tokens=4, temperature=0.0, ignore_eos=True)
        runs = [
            model.generate(short, max_tokens=sizes.tokens, temperature=0.0, ignore_eos=True).timings
            for _ in range(_RUNS)
        ]
        rate = max(t.decode_tokens_per_second for t in runs)
        context = len(short) + sizes.tokens // 2
        share = rate * (read + context * kv_bytes(model.manifest)) / s.bandwidth
        note = f"{rate:.1f} tokens/s, {read / 1e9:.2f} GB of weights per step"
        facts = {"tokens_per_second": rate}
        yield Row(section, "decode, batch 1", share, "of copy", decode_target, False, note, facts)
        prefills = [
            model.generate(ids, max_tokens=1, temperature=0.0, ignore_eos=True).timings.prefill_seconds
            for _ in range(_RUNS)
        ]
        seconds, operations = min(prefills), prefill_operations(sizes)
        target = 0.60 if name == "bf16" else None
        note = f"{1e3 * seconds:.1f} ms, {operations / seconds / 1e12:.0f} TFLOP/s"
        what = f"prefill, {sizes.prompt} tokens"
        yield Row(
            section,
            what,
            operations / seconds / s.peak,
            "of matmul",
            target,
            False,
            note,
            {"seconds": seconds},
        )


def _memory(sizes: Sizes) -> int:
    """GB for weights and cache."""
    return 40 if sizes.model[0] > 1000 else 2


def step_bytes(manifest: Any) -> int:
    """Weights that a decode step reads: all but the embedding, of which it reads a row."""
    return sum(p.nbytes for p in manifest.params if "embed_tokens" not in p.name)


def kv_bytes(manifest: Any) -> int:
    """Bytes of the cache per token of context."""
    plan = manifest.kv_plan
    return int(sum(g.page_bytes(plan.page_size) for g in plan.groups) // plan.page_size)


def prefill_operations(sizes: Sizes) -> float:
    """Multiplications and additions of a causal prefill: weights by every token (the head by one), and attention."""
    hidden, layers, heads, kv_heads, dim, mlp, vocab = sizes.model
    layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * mlp
    attention = 2.0 * heads * dim * sizes.prompt**2  # half of the pairs are masked
    return layers * (2.0 * sizes.prompt * layer + attention) + 2.0 * hidden * vocab


def reference_model(s: Session, name: str, dtype: torch.dtype) -> Any:
    """The transformers model with the same weights, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = s.folder / "models" / name
    config = AutoConfig.from_pretrained(folder / "source")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(dtype).to_empty(device=s.device.where).eval()
    weights = NamedWeights(json.loads((folder / "plan.json").read_text())["shapes"], s.device.where)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights.on_device(parameter_name))
    # tables that are no weights are computed when a model is made, which the meta device does not do
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(s.device.where)
    return model


def _logits(s: Session, model: Any, name: str) -> Iterator[Row]:
    """Distance from float32 logits of torch, beside that of torch in bfloat16."""
    count = min(64, s.device.sizes.prompt)
    ids = [int(i) for i in np.random.default_rng(1).integers(3, s.device.sizes.model[6], count)]
    found = torch.from_numpy(model.logits(ids, prefill=count // 2))
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        theirs = reference_model(s, name, dtype)
        with torch.no_grad():
            logits.append(theirs(torch.tensor([ids], device=s.device.where)).logits[0].float().cpu())
        del theirs
        _free()
    exact, rounded = logits
    if not bool(torch.isfinite(found).all()):
        raise WrongResult("logits that are not finite")
    scale = exact.pow(2).mean().sqrt()
    ours, noise = (float((t - exact).pow(2).mean().sqrt() / scale) for t in (found, rounded))
    agree = float((found.argmax(-1) == exact.argmax(-1)).float().mean())
    note = f"error {ours:.2e}, torch bf16 {noise:.2e}, both from float32; best token equal at {agree:.0%}"
    facts = {"error": ours, "noise": noise}
    yield Row(f"model-{name}", "logits", ours / max(noise, 1e-9), "x torch's error", 2.0, True, note, facts)


def _free() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def torch_compiled(s: Session) -> Iterator[Row]:
    """Decode of the same bfloat16 model by transformers with a static cache and torch.compile."""
    from transformers import StaticCache

    sizes = s.device.sizes
    model = reference_model(s, "bf16", torch.bfloat16)
    where, start = s.device.where, min(128, sizes.prompt)
    modes = ("reduce-overhead", "max-autotune") if where == "cuda" else ("default",)
    for mode in modes:  # the quick one first, so that there is a number when time is short
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=start + (2 + _RUNS) * sizes.tokens)
        ids = torch.randint(3, sizes.model[6], (1, start), device=where)
        with torch.no_grad():
            out = model(ids, past_key_values=cache, use_cache=True)
        step = torch.compile(model.forward, mode=None if mode == "default" else mode, fullgraph=True)
        token = out.logits[:, -1:].argmax(-1)
        begin, warm, rates = time.perf_counter(), 0.0, []
        for run in range(2 + _RUNS):
            _wait(where)
            clock = time.perf_counter()
            for _ in range(sizes.tokens):
                with torch.no_grad():
                    out = step(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1).clone()
            _wait(where)
            if run >= 2:
                rates.append(sizes.tokens / (time.perf_counter() - clock))
            else:
                warm = time.perf_counter() - begin
        note = f"{max(rates):.1f} tokens/s; {warm:.0f} s to compile and warm up"
        yield Row("torch", f"decode, {mode}", max(rates), "tokens/s", note=note)


def _wait(where: str) -> None:
    if where == "cuda":
        torch.cuda.synchronize()


__all__ = ["Device", "fill", "model_bf16", "model_q4", "schemes", "tokens", "torch_compiled"]
