"""Sections of tools/gpu_check.py that measure single kernels: right numbers first, then speed beside torch or the memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from tools.gpu_device import Call, Device, Row, about, mean_ratio, relative

PAGE = 16
_WRONG = 2e-2  # relative error of bfloat16 results that cannot be rounding
_SAMPLE = 256  # rows of a quantized weight that are made; the others repeat them


class WrongResult(Exception):
    """A kernel does not compute what it should; the section ends."""


@dataclass
class Session:
    """What a section needs.

    Attributes:
        device: that measures.
        folder: with what tools/gpu_prepare.py wrote.
        rows: found by earlier sections, for ceilings.
    """

    device: Device
    folder: Path
    rows: list[Row]

    def kernels(self, section: str) -> Callable[..., Callable[[], None]]:
        return self.device.kernels(self.folder / "kernels" / f"{section}.zip")

    def about(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = about(self.folder / "kernels" / f"{section}.zip")
        return found

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a copy, read and written; measured at once if no section has."""
        return self._ceiling("copy", copy_bandwidth)

    @property
    def peak(self) -> float:
        """Operations per second of torch's largest bfloat16 matmul."""
        return self._ceiling("matmul", matmul_peak)

    def _ceiling(self, what: str, measure: Callable[[Device], float]) -> float:
        known = [r.value * 1e12 for r in self.rows if r.section == "ceilings" and r.what == what]
        if not known:
            value = measure(self.device)
            self.rows.append(Row("ceilings", what, value / 1e12, "T/s"))
            known = [value]
        return known[-1]


def copy_bandwidth(d: Device) -> float:
    source = torch.ones(d.sizes.copy, device=d.where, dtype=torch.uint8)
    target = torch.zeros_like(source)
    (took,) = d.times(lambda _: target.copy_(source), turns=8)
    return 2 * source.nbytes / took


def matmul_peak(d: Device) -> float:
    n = d.sizes.peak
    x, w = d.random(n, n), d.random(n, n)
    (took,) = d.times(lambda _: x @ w, turns=8)
    return 2 * n**3 / took


def ceilings(s: Session) -> Iterator[Row]:
    """The machine's limits, which everything else is a share of."""
    yield Row("ceilings", "copy", copy_bandwidth(s.device) / 1e12, "TB/s", note="read and written")
    yield Row(
        "ceilings", "matmul", matmul_peak(s.device) / 1e12, "TFLOP/s", note="torch, bfloat16, random data"
    )


# -- dense matmuls -------------------------------------------------------------------------------------------------------


def blocked(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A weight [..., n, k] in blocks of so many rows and columns: [..., n / rows, k / columns, rows, columns]."""
    *lead, n, k = weight.shape
    cut = weight.reshape(*lead, n // rows, rows, k // columns, columns)
    return cut.transpose(-3, -2).contiguous()


def _dense(
    s: Session, section: str, name: str, shape: tuple[int, int, bool], rows: int
) -> tuple[Call, Call, float]:
    """(our call, torch's call, relative error)."""
    d, (n, k, gated) = s.device, shape
    weight, x = d.random(2 * n if gated else n, k, scale=k**-0.5), d.random(rows, k)
    nb, kp = s.about(section)[name]["block"]
    if gated:  # half a block of each in turns
        packed = torch.cat([blocked(half, nb // 2, kp) for half in weight.chunk(2)], dim=-2)
    else:
        packed = blocked(weight, nb, kp)
    y = d.empty(rows, n)
    kernels = s.kernels(section)
    ours = [kernels(name, x, w, y) for w in d.copies(packed)]
    plain = d.copies(weight)

    def theirs(turn: int) -> torch.Tensor:
        sums = x @ plain[turn % len(plain)].T
        return silu(sums[:, :n]) * sums[:, n:] if gated else sums

    ours[0]()
    error = _checked(section, f"{name}, {rows} rows", y, theirs(0))
    return (lambda turn: ours[turn % len(ours)]()), theirs, error


def _checked(
    section: str, what: str, found: torch.Tensor, expected: torch.Tensor, most: float = _WRONG
) -> float:
    error = relative(found, expected)
    if not error <= most:
        raise WrongResult(f"{section}, {what}: relative error {error:.3g}, at most {most:g} allowed")
    return error


def _facts(ours: float, theirs: float, error: float) -> dict[str, float]:
    return {"ours_us": 1e6 * ours, "torch_us": 1e6 * theirs, "error": error}


def gemm(s: Session) -> Iterator[Row]:
    """Square matmuls against torch's in the same run."""
    for n in s.device.sizes.squares:
        ours_call, theirs_call, error = _dense(s, "gemm", f"square_{n}", (n, n, False), n)
        ours, theirs = s.device.times(ours_call, theirs_call, turns=8)
        rate = f"{2 * n**3 / ours / 1e12:.0f} TFLOP/s"
        yield Row(
            "gemm", f"{n}^3", theirs / ours, "x torch", 0.85, note=rate, facts=_facts(ours, theirs, error)
        )


def flat(s: Session) -> Iterator[Row]:
    """Few rows, against torch's; the target is for their mean."""
    for rows in s.device.sizes.few:
        ratios = []
        for name, shape in s.device.sizes.shapes.items():
            calls = _dense(s, "linear", name, shape, rows)
            ours, theirs = s.device.times(*calls[:2])
            ratios.append(theirs / ours)
            facts = _facts(ours, theirs, calls[2])
            yield Row("flat", f"{rows} rows, {name}", theirs / ours, "x torch", facts=facts)
        yield Row("flat", f"{rows} rows, mean", mean_ratio(ratios), "x torch", 1.3)


def gemv(s: Session) -> Iterator[Row]:
    """One row, bfloat16 weights: share of the bandwidth."""
    for name, shape in s.device.sizes.shapes.items():
        n, k, gated = shape
        calls = _dense(s, "linear", name, shape, 1)
        ours, theirs = s.device.times(*calls[:2])
        share = 2 * n * k * (2 if gated else 1) / ours / s.bandwidth
        yield Row("gemv", f"bf16, {name}", share, "of copy", facts=_facts(ours, theirs, calls[2]))


# -- quantized matmuls ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # several numbers of rows, one after the other
def quantized_weight(scheme: str, n: int, k: int, layout: str) -> tuple[Any, Any]:
    """(packed uint8 of n rows, the dequantized float32 rows that repeat in it), in numpy."""
    import numpy as np

    from llmc.quant.rtn import quantize
    from llmc.quant.schemes import by_name
    from llmc.schedules.qlayout import QuantLayout

    whole = QuantLayout.parse(layout)
    some = min(n, _SAMPLE)
    weight = np.random.default_rng(0).standard_normal((some, k), np.float32) * np.float32(k**-0.5)
    made = quantize(weight, by_name(scheme), name=scheme)
    if whole.n != n or n % some:
        raise ValueError(f"{layout} is not of {n} rows, or these are no multiple of {some}")
    repeated = made.map(lambda a: np.concatenate([a] * (n // some)))
    return whole.pack(repeated), made.dequantize()


def _quantized(s: Session, section: str, name: str, rows: int) -> tuple[Call, Call, float, int]:
    """(our call, torch's call with bfloat16 weights, relative error, bytes of the weight)."""
    d, told = s.device, s.about(section)[name]
    n, k = told["n"], told["k"]
    packed, sample = quantized_weight(told["scheme"], n, k, told["layout"])
    stored = torch.from_numpy(packed).to(d.where)
    some = torch.from_numpy(sample).to(d.where)
    x, y = d.random(rows, k), d.empty(rows, n)
    kernels = s.kernels(section)
    ours = [kernels(name, x, w, y) for w in d.copies(stored)]
    ours[0]()
    expected = (x.float() @ some.T).repeat(1, n // some.shape[0])
    # activations are rounded to 8 bits too, of which 4 are an exponent
    most = 6e-2 if "fp8a8" in told["scheme"] else 3e-2 if told["integers"] else _WRONG
    error = _checked(section, f"{name}, {rows} rows", y, expected, most)
    plain = d.copies(d.random(n, k))
    theirs = lambda turn: x @ plain[turn % len(plain)].T  # noqa: E731
    return (lambda turn: ours[turn % len(ours)]()), theirs, error, packed.nbytes


def quant(s: Session) -> Iterator[Row]:
    """One row, quantized weights: share of the bandwidth over the bytes that they take."""
    for name, told in s.about("quant").items():
        ours_call, theirs_call, error, size = _quantized(s, "quant", name, 1)
        ours, theirs = s.device.times(ours_call, theirs_call)
        note = f"{theirs / ours:.2f} x torch bf16"
        target = 0.85 if told["scheme"].startswith("q4") else None
        share = size / ours / s.bandwidth
        yield Row(
            "quant",
            ", ".join(name.split("_", 1)),
            share,
            "of copy",
            target,
            False,
            note,
            _facts(ours, theirs, error),
        )


def integers(s: Session) -> Iterator[Row]:
    """Weights and activations of 8 bits: share of the bandwidth for one row, against torch's bfloat16 for many; e4m3 against
    torch's product of e4m3 too, whose operands are rounded before."""
    for name in s.about("integers"):
        for rows in (1, s.device.sizes.many):
            ours_call, theirs_call, error, size = _quantized(s, "integers", name, rows)
            ours, theirs = s.device.times(ours_call, theirs_call, turns=8)
            what, facts = f"{', '.join(name.split('_', 1))}, {rows} rows", _facts(ours, theirs, error)
            if rows == 1:
                yield Row("integers", what, size / ours / s.bandwidth, "of copy", facts=facts)
            else:
                yield Row("integers", what, theirs / ours, "x torch", facts=facts)
                told = s.about("integers")[name]
                fp8 = _scaled_mm(s.device, told, rows) if "fp8a8" in told["scheme"] else None
                if fp8 is not None:
                    ours, theirs = s.device.times(ours_call, fp8, turns=8)
                    facts = _facts(ours, theirs, error)
                    yield Row("integers", what, theirs / ours, "x torch fp8", facts=facts)


def _scaled_mm(d: Device, told: dict[str, Any], rows: int) -> Call | None:
    """torch's product of e4m3 with a scale per row and output; None if this torch or device has none."""
    n, k = told["n"], told["k"]
    try:
        x, w = (d.random(size, k).to(torch.float8_e4m3fn) for size in (rows, n))
        scales = (torch.ones(rows, 1, device=d.where), torch.ones(1, n, device=d.where))

        def call(turn: int) -> Any:
            return torch._scaled_mm(x, w.T, *scales, out_dtype=torch.bfloat16)

        call(0)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return call


def experts(s: Session) -> Iterator[Row]:
    """Rows that go to different experts: share of the bandwidth over the weights of those that have rows, or of the peak."""
    d, (count, n, k) = s.device, s.device.sizes.experts
    weight = d.random(count, n, k, scale=k**-0.5)
    nb, kp = s.about("experts")["experts"]["block"]
    packed = blocked(weight, nb, kp)
    kernels = s.kernels("experts")
    for rows in d.sizes.expert_rows:
        x, y = d.random(rows, k), d.empty(rows, n)
        ids = torch.randint(0, count, (rows,), device=d.where)
        plan = d.empty(count + 1 + rows, dtype=torch.int32)
        sort, multiply = kernels("sort", ids, plan), kernels("experts", x, plan, packed, y)

        def theirs(_: int, x: torch.Tensor = x, ids: torch.Tensor = ids, rows: int = rows) -> torch.Tensor:
            out = torch.empty(rows, n, device=d.where, dtype=x.dtype)
            for e in range(count):
                out[ids == e] = x[ids == e] @ weight[e].T
            return out

        sort()
        if not torch.equal(plan[count + 1 :].long(), torch.argsort(ids, stable=True)):
            raise WrongResult(f"experts, {rows} rows: they are not in the order of their experts")
        multiply()
        error = _checked("experts", f"{rows} rows", y, theirs(0))
        took, sorting, other = d.times(
            lambda _, call=multiply: call(), lambda _, call=sort: call(), theirs, turns=8
        )
        used = int(torch.unique(ids).numel())
        share = 2 * used * n * k / took / s.bandwidth
        note = f"{2 * rows * n * k / took / s.peak:.0%} of the matmul peak, {other / took:.2f} x a loop over experts"
        note += f"; sorted in {1e6 * sorting:.1f} us"
        yield Row(
            "experts",
            f"{rows} rows of {count}",
            share,
            "of copy",
            None,
            False,
            note,
            _facts(took, other, error),
        )


# -- attention -----------------------------------------------------------------------------------------------------------


def _cache(d: Device, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, kv_heads, dim = d.sizes.heads
    pages = -(-context // PAGE)
    return (
        d.random(pages + 1, 1, kv_heads, dim, PAGE),
        d.random(pages + 1, 1, kv_heads, PAGE, dim),
        d.integers([list(range(1, pages + 1))]),
    )


def _plain(k_pool: torch.Tensor, v_pool: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as [1, heads, tokens, dim]."""
    heads, dim = k_pool.shape[2], k_pool.shape[3]
    k = k_pool[1:, 0].permute(1, 0, 3, 2).reshape(1, heads, -1, dim)[:, :, :context]
    v = v_pool[1:, 0].permute(1, 0, 2, 3).reshape(1, heads, -1, dim)[:, :, :context]
    return k.contiguous(), v.contiguous()


def torch_backends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Call]:
    """Name -> scaled_dot_product_attention by each backend that takes these; heads repeated where it must be."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    group = q.shape[1] // k.shape[1]
    wide = [t.repeat_interleave(group, 1).contiguous() for t in (k, v)]
    found: dict[str, Call] = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, name)
        for keys, values, grouped in ((k, v, True), (*wide, False)):

            def call(
                _: int, keys: Any = keys, values: Any = values, grouped: bool = grouped, of: Any = backend
            ) -> Any:
                with sdpa_kernel(of):
                    return scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=grouped)

            try:
                call(0)
            except RuntimeError:  # this backend does not take such heads
                continue
            found[f"{name.lower()}{'' if grouped else ', heads repeated'}"] = call
        if found and name == "EFFICIENT_ATTENTION":
            break  # the plain one is for machines that have no other
    return found


def _fastest(d: Device, ours: Call, others: dict[str, Call], turns: int) -> tuple[float, float, str]:
    """(our time, the fastest other one's, its name)."""
    took, *rest = d.times(ours, *others.values(), turns=turns)
    best = min(range(len(rest)), key=rest.__getitem__)
    return took, rest[best], list(others)[best]


def prefill_attention(s: Session) -> Iterator[Row]:
    """Causal prefill of one sequence, against the fastest backend of torch in the same run."""
    d, (heads, _, dim) = s.device, s.device.sizes.heads
    kernels = s.kernels("attention")
    for context in d.sizes.prefill:
        k_pool, v_pool, table = _cache(d, context)
        q, out = d.random(1, context, heads, dim), d.empty(1, context, heads, dim)
        start, length = d.integers([0, context]), d.integers([context])
        ours = kernels("prefill", q, k_pool, v_pool, start, length, table, 0, out)
        others = torch_backends(q.transpose(1, 2), *_plain(k_pool, v_pool, context), True)
        ours()
        error = _checked(
            "prefill", f"{context} tokens", out[0].transpose(0, 1), next(iter(others.values()))(0)[0]
        )
        took, best, name = _fastest(d, lambda _, ours=ours: ours(), others, 6)
        rate = 2 * heads * dim * context**2 / took / 1e12
        note = f"{rate:.0f} TFLOP/s; fastest: {name}"
        facts = _facts(took, best, error)
        yield Row("prefill", f"{context} tokens, d {dim}", best / took, "x torch", 0.8, False, note, facts)


def decode_attention(s: Session) -> Iterator[Row]:
    """One token at a long context: share of the bandwidth over keys and values."""
    d, (heads, kv_heads, dim) = s.device, s.device.sizes.heads
    kernels, told = s.kernels("attention"), s.about("attention")["decode"]
    for context in d.sizes.decode:
        k_pool, v_pool, table = _cache(d, context)
        pools = list(zip(d.copies(k_pool), d.copies(v_pool), strict=True))
        q, out = d.random(1, 1, heads, dim), d.empty(1, 1, heads, dim)
        partial = d.empty(1, *told["partial"], dtype=torch.float32)
        start, length = d.integers([0, 1]), d.integers([context])
        ours = [kernels("decode", q, k, v, start, length, table, 0, out, partial) for k, v in pools]
        others = torch_backends(q.transpose(1, 2), *_plain(k_pool, v_pool, context), False)
        ours[0]()
        error = _checked(
            "decode", f"{context} tokens", out[0].transpose(0, 1), next(iter(others.values()))(0)[0]
        )
        took, best, name = _fastest(d, lambda turn, ours=ours: ours[turn % len(ours)](), others, 15)
        share = 4 * context * kv_heads * dim / took / s.bandwidth
        target = 0.8 if context == max(d.sizes.decode) else None
        note = f"{best / took:.2f} x torch ({name}, warm)"
        yield Row(
            "decode", f"{context} tokens", share, "of copy", target, False, note, _facts(took, best, error)
        )
