"""A toy language model with a real paged cache: in numpy for the unit tests, compiled for the loading tests.

Its logits are sums over the tokens that attention would see, read back through the block tables:

    logits[t] = sum over groups g, visible tokens j of  (g + 1) * (1 + position_j % 7) * table[token_j]

The table holds small integers, so that every order of summation gives the same float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import host
from llmc.artifact import (
    SCHEMA,
    FunctionEntry,
    Limits,
    Manifest,
    ModelInfo,
    QualityReport,
    TargetInfo,
    TensorSpec,
)
from llmc.kv_plan import KVGroup, KVKind, KVPlan
from llmc.runtime.engine import StepInputs, input_names
from llmc.runtime.library import tvm_version
from llmc.runtime.model import Model
from llmc.runtime.pages import PageAllocator

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "models" / "stdlib-llama"


def group(
    kind: KVKind = KVKind.FULL, *, window: int = 0, sinks: int = 0, name: str = "g0", dtype: str = "float32"
) -> KVGroup:
    """A group of one layer whose keys and values are single numbers."""
    return KVGroup(name, kind, (0,), 1, 1, 1, window, sinks, dtype)


def visible(of: KVGroup, query: int) -> list[int]:
    """Key positions that a query at position `query` sees, by definition."""
    keys = range(query + 1)
    if of.kind is KVKind.SLIDING_WINDOW:
        return [j for j in keys if query - j < of.window or j < of.sink_tokens]
    if of.kind is KVKind.CHUNKED:
        return [j for j in keys if j // of.window == query // of.window]
    return list(keys)


def toy_table(vocab: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-4, 5, (vocab, vocab)).astype(np.float32)


def toy_logits(ids: Sequence[int], groups: Sequence[KVGroup], vocab: int) -> np.ndarray:
    """f32[n, vocab] straight from the tokens, without any cache."""
    table = toy_table(vocab)
    out = np.zeros((len(ids), vocab), np.float32)
    for t in range(len(ids)):
        for g, of in enumerate(groups):
            for j in visible(of, t):
                out[t] += (g + 1) * (1 + j % 7) * table[ids[j]]
    return out


@dataclass
class ToyEngine:
    """The toy model on a paged cache; fails when it is led to a page that holds something else."""

    plan: KVPlan
    pages: tuple[int, ...]
    vocab: int
    calls: list[tuple[str, int, int]] = field(default_factory=list)  # function, tokens, sequences
    before: Callable[[int], None] = lambda call: None  # called with the number of the call; may raise
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        size = self.plan.page_size
        self.tokens = [np.full((n, size), -1, np.int64) for n in self.pages]
        self.positions = [np.full((n, size), -1, np.int64) for n in self.pages]
        self.table = toy_table(self.vocab)

    def run(self, function: str, inputs: StepInputs) -> np.ndarray:
        self.before(len(self.calls))
        for array in inputs.in_order():
            assert array.dtype == np.int32 and array.flags.c_contiguous and array.ctypes.data % 64 == 0
        total, size = len(inputs.input_ids), len(inputs.context_len)
        self.calls.append((function, total, size))
        assert function == "step" or total == size
        assert inputs.query_start[0] == 0 and inputs.query_start[-1] == total
        for g, slots in enumerate(inputs.slots):
            assert slots.min() >= self.plan.page_size, "page 0 is reserved"
            self.tokens[g].reshape(-1)[slots] = inputs.input_ids
            self.positions[g].reshape(-1)[slots] = inputs.positions
        rows = [self._row(inputs, int(t)) for t in inputs.logit_rows]
        return np.stack(rows)

    def _row(self, inputs: StepInputs, t: int) -> np.ndarray:
        b = int(np.searchsorted(inputs.query_start, t, side="right")) - 1
        start, end = inputs.query_start[b : b + 2]
        query = int(inputs.context_len[b] - (end - start) + (t - start))
        assert inputs.positions[t] == query
        row = np.zeros(self.vocab, np.float32) if self.bias is None else self.bias.astype(np.float32)
        for g, of in enumerate(self.plan.groups):
            for j in visible(of, query):
                entry, offset = divmod(j, self.plan.page_size)
                page = inputs.block_tables[g][b, entry]
                assert page != 0 and self.positions[g][page, offset] == j, (g, b, j)
                row += (g + 1) * (1 + j % 7) * self.table[self.tokens[g][page, offset]]
        return row

    def memory(self) -> dict[str, int]:
        return {"weights": 0, "weights_resident": 0, "kv": 0, "kv_resident": 0}


def toy_manifest(
    groups: Sequence[KVGroup], *, vocab: int, page_size: int, limits: Limits, **model: Any
) -> Manifest:
    names = input_names(len(groups))
    inputs = tuple(TensorSpec(name, "int32", ("T",)) for name in names)
    output = (TensorSpec("logits", "float32", ("R", vocab)),)
    return Manifest(
        schema=SCHEMA,
        llmc_version="0",
        tvm_version=tvm_version(),
        created="2026-01-01T00:00:00+00:00",
        spec={},
        model=ModelInfo("toy", "Toy", "toy", vocab, 1, vocab * vocab, "bfloat16", **model),
        target=TargetInfo("cpu", "cpu/test", f"{host.architecture()}-unknown-{host.system()}", "generic", ()),
        limits=limits,
        kv_plan=KVPlan(page_size, tuple(groups)),
        functions=tuple(FunctionEntry(name, inputs, output) for name in ("step", "decode")),
        params=(),
        quality=QualityReport("off"),
    )


class Toy:
    """Model, engine and allocator of a toy, for tests that look behind the model."""

    def __init__(
        self,
        groups: Sequence[KVGroup] = (group(),),
        *,
        vocab: int = 50,
        page_size: int = 16,
        pages: int = 33,
        limits: Limits = Limits(256, 4, 64),
        tokenizer: bool = False,
        **model: Any,
    ) -> None:
        from llmc.runtime.tokenizer import Tokenizer

        self.groups = tuple(groups)
        self.vocab = vocab
        self.manifest = toy_manifest(groups, vocab=vocab, page_size=page_size, limits=limits, **model)
        plan = self.manifest.kv_plan
        self.engine = ToyEngine(plan, (pages,) * len(self.groups), vocab)
        self.allocator = PageAllocator(plan, self.engine.pages, limits.max_seq_len)
        self.model = Model(self.manifest, self.engine, self.allocator)
        if tokenizer:
            self.model._tokenizer = Tokenizer(EXAMPLE / "tokenizer.json")

    def reference(self, ids: Sequence[int]) -> np.ndarray:
        return toy_logits(ids, self.groups, self.vocab)

    def assert_nothing_held(self) -> None:
        assert self.allocator.used_pages() == (0,) * len(self.groups)


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def make_group() -> Callable[..., KVGroup]:
    return group


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled toy with a small vocabulary; do not change it, copy it."""
    from tests.runtime.compiled import build_artifact

    folder: Path = tmp_path_factory.mktemp("artifact") / "toy"
    build_artifact(folder, vocab=300)
    return folder
