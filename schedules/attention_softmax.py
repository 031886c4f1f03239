"""The running softmax of an attention tile: scores of a block of keys to weights."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.vmath import exp2_nonpositive, exp_nonpositive, tanh

LOWEST = -1e30  # score of a key that is not seen; finite: the difference of two of them is no NaN
# what rows without any key count as their maximum: far above LOWEST, so that what they do not see weighs nothing
_LOWEST_MAXIMUM = -1e28


class RunningSoftmax:
    """The part of a Tile (attention_tile.py) between its two products; Tile sets the attributes."""

    cfg: AttentionConfig
    args: Any  # Operands
    lanes: int
    dot: bool  # weights are rounded to bf16
    direct: bool  # a block may hold few keys
    block: int  # keys per block
    group: int
    value_width: int
    kv_head: Any
    row: Any  # the head's first one in `largest`, `total` and `out`; scores and weights are of one head at a time
    used: Any  # rows
    scores: Any
    weights: Any
    out: Any
    largest: Any
    total: Any

    @property
    def _raw(self) -> bool:
        """True if scores are kept as the product gave them: the scale is then part of the exponent."""
        return not self.cfg.softcap and self.args.alibi is None and self.cfg.scale > 0

    def _softmax(self, first_key: Any, first_position: Any, keys: Any) -> None:
        """Scores of one block to weights; rescales what has been accumulated when a row's maximum grows."""
        lanes = self.lanes
        with e.loop(self.used) as r:
            position = e.let(first_position + r // self.group)
            low = e.let(tirx.Cast("int32", first_visible(self.cfg, position) - first_key))
            own = e.let(tirx.Cast("int32", position - first_key))
            high = e.let(T.min(own + 1, tirx.Cast("int32", keys)))
            top = e.scratch(lanes)
            e.store(top, 0, e.splat(LOWEST, lanes), lanes)
            pairs: Any = self.block // (2 * lanes)
            if self.direct:
                pairs = e.let(e.ceildiv(keys, 2 * lanes))
            if self._raw:
                whole = high >= 2 * lanes * tirx.Cast("int32", pairs) if self.direct else high >= self.block
                if self.cfg.window or self.cfg.chunk:
                    whole = tirx.And(whole, low <= 0)
                with T.If(whole):
                    with T.Then(), e.loop(2 * pairs) as v:
                        s = e.load(self.scores, r * self.block + v * lanes, lanes)
                        e.store(top, 0, T.max(e.load(top, 0, lanes), s), lanes)
                    with T.Else():
                        self._visible(r, 2 * pairs, low, own, high, top)
            else:
                self._visible(r, 2 * pairs, low, own, high, top)
            row = e.let(self.row + r)
            before = e.let(self.largest[row])
            highest = e.fold(e.load(top, 0, lanes), lanes, T.max)
            if self._raw:
                highest = highest * e.f32(self.cfg.scale)
            after = e.let(T.max(before, highest))
            with T.If(after > before), T.Then():
                shrink = e.let(exp_nonpositive(e.splat(before - after, lanes), lanes))
                e.store(self.largest, row, after, 1)
                total = e.load(self.total, row * lanes, lanes) * shrink
                e.store(self.total, row * lanes, total, lanes)
                self._shrink(row, shrink)
            self._exponentials(r, after, pairs)

    def _shrink(self, row: Any, factor: Any) -> None:
        """Multiply what a row has accumulated by the lanes of `factor`, which are equal."""
        lanes = self.lanes
        for v in range(self.value_width // lanes):
            at = row * self.value_width + v * lanes
            e.store(self.out, at, e.load(self.out, at, lanes) * factor, lanes)

    def _weight_of(self, p: Any, v: Any) -> Any:
        """What vector v of a row's values is multiplied with."""
        return p

    def _visible(self, r: Any, vectors: Any, low: Any, own: Any, high: Any, top: Any) -> None:
        """The scores of a row with those outside of [low, high) replaced; `top` gets their maximum."""
        cfg, lanes = self.cfg, self.lanes
        slope = None
        if self.args.alibi is not None:
            slope = e.let(self.args.alibi[self.kv_head * self.group + r % self.group])
        with e.loop(vectors) as v:
            at = e.let(r * self.block + v * lanes)
            column = e.let(T.ramp(tirx.Cast("int32", v * lanes), tirx.IntImm("int32", 1), lanes))
            s = e.load(self.scores, at, lanes)
            if not self._raw:
                s = s * e.splat(float(cfg.scale), lanes)
            if cfg.softcap > 0:
                s = tanh(e.let(s * e.splat(1.0 / cfg.softcap, lanes)), lanes)
                s = s * e.splat(float(cfg.softcap), lanes)
                if slope is not None:  # TVM's analyzer fails on the sum of the two
                    held = e.scratch(lanes)
                    e.store(held, 0, s, lanes)
                    s = e.load(held, 0, lanes)
            if slope is not None:
                distance = tirx.Cast(e.vec("float32", lanes), column - e.splat(own, lanes))
                s = s + e.splat(slope, lanes) * distance
            seen = column < e.splat(high, lanes)
            if cfg.window or cfg.chunk:
                seen = tirx.And(seen, column >= e.splat(low, lanes))
            hidden = max(LOWEST / cfg.scale, -3e38) if self._raw else LOWEST
            s = e.let(tirx.Select(seen, s, e.splat(hidden, lanes)))
            e.store(self.scores, at, s, lanes)
            e.store(top, 0, T.max(e.load(top, 0, lanes), s), lanes)

    def _exponentials(self, r: Any, largest: Any, pairs: Any) -> None:
        """Weights e^(score - largest) of a row, and their sum."""
        lanes = self.lanes
        total = e.scratch(lanes)
        row = e.let(self.row + r)
        e.store(total, 0, e.load(self.total, row * lanes, lanes), lanes)
        to_exponent = math.log2(math.e)
        zero = e.let(T.max(largest, e.f32(_LOWEST_MAXIMUM)) * e.f32(to_exponent))
        if self._raw:
            to_exponent *= self.cfg.scale

        def weight(v: Any) -> Any:
            s = e.load(self.scores, r * self.block + v * lanes, lanes)
            exponent = e.let(s * e.splat(to_exponent, lanes) - e.splat(zero, lanes))
            p = e.let(exp2_nonpositive(exponent, lanes, coarse=self.dot))
            e.store(total, 0, e.load(total, 0, lanes) + p, lanes)
            return self._weight_of(p, v)

        if self.dot:
            with e.loop(pairs) as v:
                pairs = e.narrow_pairs(weight(2 * v), weight(2 * v + 1))
                e.store(self.weights, r * (self.block // 2) + v * lanes, pairs, lanes)
        else:
            with e.loop(2 * pairs) as v:
                e.store(self.weights, r * self.block + v * lanes, weight(v), lanes)
        e.store(self.total, row * lanes, e.load(total, 0, lanes), lanes)


def first_visible(cfg: AttentionConfig, position: Any) -> Any:
    """First key that a query at `position` sees."""
    low = e.i64(0)
    if cfg.window:
        low = T.max(low, position - (cfg.window - 1))
    if cfg.chunk:
        low = T.max(low, position // cfg.chunk * cfg.chunk)
    return low
