"""What happens on the fake GPU; each function runs in a process of its own (device.scenario)."""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc.errors import LlmcError
from tests.runtime.fake_cuda.device import FakeGpu

_NUMBERS = r"\d+ bytes for the weights, \d+ of \d+ bytes are free, \d+ are taken.*max_memory"


@contextmanager
def refused(ref: str, words: str) -> Iterator[None]:
    """The body fails with an error of this name, whose sentence matches."""
    try:
        yield
    except LlmcError as e:
        assert e.ref == ref and re.search(words, str(e)), str(e)
    else:
        raise AssertionError(f"no error {ref}")


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


class Counted:
    """How much each count grew in a `with`."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self._before = gpu, {}

    def __enter__(self) -> Counted:
        self._before = self._gpu.counts()
        return self

    def __exit__(self, *_: object) -> None:
        self.grew = {k: v - self._before[k] for k, v in self._gpu.counts().items()}


def runs(gpu: FakeGpu, folder: str) -> None:
    """Load, prefill, graphs of one and of several sequences, sampling, two models at a time."""
    refusals(gpu, Path(folder) / "artifact")
    del gpu.images[:]
    expected = np.load(Path(folder) / "expected.npz")
    ids, logits, greedy = expected["ids"].tolist(), expected["logits"], expected["greedy"].tolist()
    model = llmc.load(Path(folder) / "artifact", kv_pages=40)
    assert gpu.images == [gpu.images[0]] and gpu.images[0].startswith(b"kernels for sm_90:")
    close(model.logits(ids, prefill=5), logits)

    model.generate(ids, max_tokens=2, ignore_eos=True)  # memory for both kinds of step is taken
    with Counted(gpu) as c:
        found = model.generate(ids, max_tokens=len(greedy), ignore_eos=True)
    assert list(found.token_ids) == greedy
    steps = len(greedy)
    # one graph per decode step, four bytes back, one wait each; no memory, and none that is not pinned
    assert c.grew["graph_launches"] == steps - 1 and c.grew["captures"] == 0, c.grew
    assert c.grew["bytes_out"] == 4 * steps and c.grew["waits"] == steps, c.grew
    assert c.grew["allocations"] == 0 and c.grew["pageable"] == 0, c.grew

    _batches(gpu, model, ids)
    for options in (
        {"temperature": 1.1, "seed": 3},
        {"temperature": 0.8, "seed": 4, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
    ):
        with Counted(gpu) as c:
            here = model.generate(ids, max_tokens=5, ignore_eos=True, **options)
        assert c.grew["bytes_out"] == 4 * 5
        # with log-probabilities the logits come to the host, which then chooses
        there = model.generate(ids, max_tokens=5, ignore_eos=True, logprobs=0, **options)
        assert here.token_ids == there.token_ids, options


def _batches(gpu: FakeGpu, model: Any, ids: list[int]) -> None:
    """Three sequences go through the graph of four, with a prefill between; each as if it were alone."""
    prompts = [ids[:4], ids[:2], ids[3:9]]
    alone = [model.logits([*p, 7, 8, 9], prefill=len(p))[len(p) :] for p in prompts]
    sequences = [model.new_sequence() for _ in prompts]
    model.step(list(zip(sequences, prompts, strict=True)))
    with Counted(gpu) as c:
        for turn, token in enumerate((7, 8, 9)):
            rows = model.step([(s, [token]) for s in sequences])
            close(rows, [a[turn] for a in alone])
            with model.new_sequence() as other:
                model.step([(other, ids)])
    assert c.grew["captures"] == 1 and c.grew["graph_launches"] == 3, c.grew
    for s in sequences:
        s.free()
    assert model.memory().kv_in_use == 0


def several(gpu: FakeGpu, folder: str) -> None:
    """A second model beside the first one, which takes new graphs; without graphs; and where a capture fails."""
    expected = np.load(Path(folder) / "expected.npz")
    ids, greedy = expected["ids"].tolist(), expected["greedy"].tolist()
    model = llmc.load(Path(folder) / "artifact", kv_pages=4)
    model.generate(ids, max_tokens=4, ignore_eos=True)
    os.environ["LLMC_CUDA_GRAPHS"] = "0"
    plain = llmc.load(Path(folder) / "artifact", kv_pages=4)
    del os.environ["LLMC_CUDA_GRAPHS"]
    with Counted(gpu) as c:
        assert list(plain.generate(ids, max_tokens=4, ignore_eos=True).token_ids) == greedy[:4]
    assert c.grew["graph_launches"] == 0
    with Counted(gpu) as c:
        assert list(model.generate(ids, max_tokens=4, ignore_eos=True).token_ids) == greedy[:4]
    assert c.grew["captures"] == 1 and c.grew["graph_launches"] == 3
    with ThreadPoolExecutor(2) as pool:  # steps of two models take turns, scratch memory is shared
        both = [pool.submit(m.generate, ids, max_tokens=4, ignore_eos=True) for m in (model, plain)]
    assert all(list(found.result().token_ids) == greedy[:4] for found in both)
    third = llmc.load(Path(folder) / "artifact", kv_pages=4)
    with gpu.having(capture=900), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert list(third.generate(ids, max_tokens=4, ignore_eos=True).token_ids) == greedy[:4]
    assert len(said) == 1 and "without CUDA graphs" in str(said[0].message), [str(s.message) for s in said]
    assert "not permitted when stream is capturing" in str(said[0].message)


def agrees(gpu: FakeGpu, folder: str) -> None:
    """Logits of prefill and decode, alone and in a graph for four of which one is not used, are those of the cpu target."""
    expected = np.load(Path(folder) / "expected.npz")
    error = float(expected["error"])
    model = llmc.load(Path(folder) / "artifact", kv_pages=40)
    prompts = [p[p >= 0].tolist() for p in expected["prompts"]]
    sequences = [model.new_sequence() for _ in prompts]
    model.step(list(zip(sequences, [p[:-2] for p in prompts], strict=True)))
    for at in (-2, -1):
        with Counted(gpu) as c:
            rows = model.step([(s, [p[at]]) for s, p in zip(sequences, prompts, strict=True)])
        assert c.grew["graph_launches"] == 1
        np.testing.assert_allclose(rows, expected["rows"][at], rtol=error, atol=error)
    if expected["assembled"]:
        assert gpu.images[0].startswith(b"\x7fELF")


def refusals(gpu: FakeGpu, artifact: Path) -> None:
    """What the machine lacks: one sentence each."""
    with gpu.having(init=100), refused("no-cuda-device", r"finds no usable GPU \(cuInit gives error 100\)"):
        llmc.load(artifact)
    with gpu.having(driver=12080), refused("cuda-driver-too-old", r"implements CUDA 12\.8"):
        llmc.load(artifact)
    with (
        gpu.having(arch=80),
        refused("wrong-gpu", r"code for sm_90, compute_90; this machine's Fake GPU is sm_80"),
    ):
        llmc.load(artifact)
    with (
        gpu.having(load=222),
        refused("kernels-unloadable", r"unsupported toolchain.*Update the NVIDIA driver"),
    ):
        llmc.load(artifact)
    gc.collect()  # what the loads above have left
    with gpu.having(limit=gpu.taken() + 50_000), refused("out-of-device-memory", _NUMBERS):
        llmc.load(artifact)


def newer(gpu: FakeGpu, folder: str) -> None:
    """A GPU that there is no machine code for."""
    artifact = Path(folder) / "artifact"
    with gpu.having(arch=100):  # no machine code for it: its driver translates
        found = llmc.load(artifact, kv_pages=4).logits([1, 2, 3])
    assert gpu.images[-1].startswith(b"kernels for compute_90:"), gpu.images[-1][:30]
    np.testing.assert_array_equal(found, llmc.load(artifact, kv_pages=4).logits([1, 2, 3]))


def memory(gpu: FakeGpu, folder: str) -> None:
    """Too little memory at load and at run; the model goes on when there is more."""
    artifact = Path(folder) / "artifact"
    gc.collect()
    start = gpu.taken()
    with (
        gpu.having(limit=start + 290_000),
        refused("out-of-device-memory", r"not suffice: .* bytes are free"),
    ):
        llmc.load(artifact)
    with gpu.having(limit=start + 2_000_000), refused("out-of-device-memory", "the smallest KV cache and"):
        llmc.load(artifact)
    model = llmc.load(artifact, kv_pages=8)
    ids = [5, 6, 7, 8, 9, 10]
    before = model.logits(ids, prefill=3)
    gc.collect()
    with (
        gpu.having(limit=start + 200_000),
        refused("out-of-device-memory", r"results of step \(\d+ rows of logits\)"),
    ):
        model.logits(list(range(40)))
    assert model.memory().kv_in_use == 0
    # what TVM has freed for the attempt is taken anew, graphs included
    with Counted(gpu) as c:
        np.testing.assert_array_equal(model.logits(ids, prefill=3), before)
    assert c.grew["captures"] == 1, c.grew
    # what a kernel breaks shows where the host waits
    gpu.fails = True
    with refused("device-failed", "cudaStreamSynchronize fails with error 719: unspecified launch failure"):
        model.generate(ids, max_tokens=2)
    # weights and cache go with a model
    del model
    gc.collect()
    assert gpu.taken() < start + 250_000, (start, gpu.taken())


def compiles(gpu: FakeGpu, folder: str) -> None:
    """`--target cuda` on a machine with a GPU: for that GPU, and checked on it."""
    from tests.runtime.fake_cuda.artifact import compile_for_fake
    from tools.tiny_configs import tiny_model

    model = tiny_model("llama", num_hidden_layers=1)
    with gpu.having(arch=89):
        made = compile_for_fake(model, Path(folder), here=gpu, target="cuda", dtype="f32", max_seq_len=64)
    quality = made.manifest.quality
    assert made.manifest.target.preset == "cuda/sm_89" and quality.mode == "sample", quality
    assert "NOT CHECKED" not in quality.note and gpu.counts()["graph_launches"] > 0
