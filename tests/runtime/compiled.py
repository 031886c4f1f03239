"""The toy model of conftest.py, compiled: a small real artifact with bfloat16 weights and float32 cache pages."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from llmc.artifact import LIBRARY, MANIFEST, Limits, Manifest
from llmc.shards import PackedTensor
from llmc.writer import ArtifactWriter
from tests.runtime.conftest import EXAMPLE, group, toy_manifest, toy_table

VOCAB = 4096
PAGE = 16


def toy_module(vocab: int, scale: int = 1) -> Any:
    """step and decode of the toy; `scale` multiplies the logits, so that two modules differ."""

    @I.ir_module
    class Toy:
        @T.prim_func(s_tir=True)
        def append(ids: T.handle, positions: T.handle, slots: T.handle, keys: T.handle, values: T.handle):
            tokens, pages, value_pages = T.int64(), T.int64(), T.int64()
            x = T.match_buffer(ids, (tokens,), "int32")
            p = T.match_buffer(positions, (tokens,), "int32")
            s = T.match_buffer(slots, (tokens,), "int32")
            k = T.match_buffer(keys, (pages, 1, 1, 1, PAGE))
            v = T.match_buffer(values, (value_pages, 1, 1, PAGE, 1))
            for i in range(tokens):
                with T.sblock("append"):
                    t = T.axis.spatial(tokens, i)
                    k[s[t] // PAGE, 0, 0, 0, s[t] % PAGE] = T.Cast("float32", x[t])
                    v[s[t] // PAGE, 0, 0, s[t] % PAGE, 0] = T.Cast("float32", p[t])

        @T.prim_func(s_tir=True)
        def attend(
            starts: T.handle,
            lengths: T.handle,
            blocks: T.handle,
            rows: T.handle,
            keys: T.handle,
            values: T.handle,
            weights: T.handle,
            out: T.handle,
        ):
            batch, width, wanted = T.int64(), T.int64(), T.int64()
            ends, pages, value_pages = T.int64(), T.int64(), T.int64()
            q = T.match_buffer(starts, (ends,), "int32")
            n = T.match_buffer(lengths, (batch,), "int32")
            b = T.match_buffer(blocks, (batch, width), "int32")
            r = T.match_buffer(rows, (wanted,), "int32")
            k = T.match_buffer(keys, (pages, 1, 1, 1, PAGE))
            v = T.match_buffer(values, (value_pages, 1, 1, PAGE, 1))
            w = T.match_buffer(weights, (vocab, vocab), "bfloat16")
            o = T.match_buffer(out, (wanted, vocab))
            for i, c in T.grid(wanted, vocab):
                with T.sblock("clear"):
                    row, column = T.axis.remap("SS", [i, c])
                    o[row, column] = T.float32(0)
            for i, s, j, c in T.grid(wanted, batch, width * PAGE, vocab):
                with T.sblock("sum"):
                    row, seq, key, column = T.axis.remap("SRRS", [i, s, j, c])
                    if (
                        q[seq] <= r[row]
                        and r[row] < q[seq + 1]
                        and key <= n[seq] - (q[seq + 1] - q[seq]) + (r[row] - q[seq])
                    ):
                        o[row, column] = o[row, column] + T.float32(scale) * (
                            T.float32(1)
                            + T.Cast(
                                "float32",
                                T.Cast("int32", v[b[seq, key // PAGE], 0, 0, key % PAGE, 0]) % 7,
                            )
                        ) * T.Cast(
                            "float32",
                            w[T.Cast("int32", k[b[seq, key // PAGE], 0, 0, 0, key % PAGE]), column],
                        )

        @R.function
        def step(
            input_ids: R.Tensor(("tokens",), "int32"),
            positions: R.Tensor(("tokens",), "int32"),
            query_start: R.Tensor(("ends",), "int32"),
            context_len: R.Tensor(("batch",), "int32"),
            block_table_0: R.Tensor(("batch", "width"), "int32"),
            slot_0: R.Tensor(("tokens",), "int32"),
            logit_rows: R.Tensor(("wanted",), "int32"),
            pools: R.Tuple(
                R.Tensor(("pages", 1, 1, 1, PAGE), "float32"),
                R.Tensor(("value_pages", 1, 1, PAGE, 1), "float32"),
            ),
            params: R.Tuple(R.Tensor((vocab, vocab), "bfloat16")),
        ) -> R.Tensor(("wanted", vocab), "float32"):
            pages, value_pages, wanted = T.int64(), T.int64(), T.int64()
            cls = Toy
            k, v, w = pools[0], pools[1], params[0]
            both = R.call_tir_inplace(
                cls.append,
                (input_ids, positions, slot_0, k, v),
                [3, 4],
                [
                    R.Tensor((pages, 1, 1, 1, PAGE), "float32"),
                    R.Tensor((value_pages, 1, 1, PAGE, 1), "float32"),
                ],
            )
            return R.call_tir(
                cls.attend,
                (query_start, context_len, block_table_0, logit_rows, both[0], both[1], w),
                R.Tensor((wanted, vocab), "float32"),
            )

    return Toy


def build_artifact(
    folder: Path,
    *,
    scale: int = 1,
    tokenizer: bool = True,
    limits: Limits = Limits(64, 4, 32),
    vocab: int = VOCAB,
) -> Manifest:
    """Write the compiled toy to `folder` the way the compiler writes artifacts."""
    module = toy_module(vocab, scale)
    decode = module["step"].without_attr("global_symbol").with_attr("global_symbol", "decode")
    module["decode"] = decode
    executable = relax.build(module, target="llvm")
    weight = PackedTensor("table", (vocab, vocab), "bfloat16", "rows", ("table.weight",))
    small = PackedTensor("unused", (3,), "float32")  # so that the offset of the other one is not the first
    manifest = toy_manifest([group()], vocab=vocab, page_size=PAGE, limits=limits, eos_token_ids=(2,))
    with ArtifactWriter(folder) as writer:
        with writer.shards([small, weight]) as shards:
            shards.write("unused", np.zeros(3, np.float32))
            shards.write("table", toy_table(vocab).astype(ml_dtypes.bfloat16))
        if tokenizer:
            writer.copy_tokenizer(EXAMPLE)
        params = tuple(p for p in shards.entries if p.name == "table")
        manifest = writer.finish(executable, dataclasses.replace(manifest, params=params))
        writer.commit()
    return manifest


def rewrite_manifest(folder: Path, **changes: Any) -> Manifest:
    """Change fields of manifest.json behind the library's back."""
    old = Manifest.from_text((folder / MANIFEST).read_text(), "")
    new = dataclasses.replace(old, **changes)
    (folder / MANIFEST).write_text(new.as_text() + "\n")
    return new


def copy_artifact(source: Path, target: Path, *, manifest: bool = True) -> Path:
    """A private copy of an artifact, with or without manifest.json."""
    shutil.copytree(source, target)
    if not manifest:
        (target / MANIFEST).unlink()
    assert (target / LIBRARY).exists()
    return target
