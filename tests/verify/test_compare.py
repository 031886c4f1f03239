"""The comparison of logits and of layers, without models."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.verify_compare import compare_logits, first_divergence, layer_errors


def fake_layers(n: int, noise: float, seed: int) -> dict[str, np.ndarray]:
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    out = {}
    for i in range(n):
        x = base.standard_normal((20, 32)).astype(np.float32)
        out[f"layers.{i}"] = x + noise * (i + 1) * own.standard_normal(x.shape).astype(np.float32)
    return out


@pytest.mark.parametrize("bad", (0, 3, 5))
def test_first_divergence(bad: int) -> None:
    exact, rounded, artifact = fake_layers(6, 0, 1), fake_layers(6, 4e-3, 1), fake_layers(6, 4e-3, 2)
    paths = tuple(exact)
    assert first_divergence(layer_errors(paths, artifact, exact, rounded, dtype="bfloat16")) is None
    for path in paths[bad:]:
        artifact[path] = artifact[path] + 0.1
    first = first_divergence(layer_errors(paths, artifact, exact, rounded, dtype="bfloat16"))
    assert first is not None and first.path == f"layers.{bad}"


def test_divergence_by_nan() -> None:
    exact, artifact = fake_layers(3, 0, 1), fake_layers(3, 0, 1)
    artifact["layers.1"][4, 4] = np.nan
    first = first_divergence(layer_errors(tuple(exact), artifact, exact, None, dtype="float32"))
    assert first is not None and first.path == "layers.1"


def test_layers_may_differ_in_the_last_bits() -> None:
    exact, artifact = fake_layers(3, 0, 1), fake_layers(3, 1e-6, 2)
    assert first_divergence(layer_errors(tuple(exact), artifact, exact, None, dtype="float32")) is None


def test_a_router_may_flip_a_few_rows_but_not_half() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((40, 64)).astype(np.float32)
    rounded = exact + 4e-3 * rng.standard_normal(exact.shape).astype(np.float32)
    artifact = exact + 4e-3 * rng.standard_normal(exact.shape).astype(np.float32)
    groups = {"prefill": np.arange(30), "decode": np.arange(30, 40)}

    def findings(routed: bool) -> list[str]:
        got = compare_logits(artifact, exact, rounded, groups, dtype="bfloat16", routed=routed)
        return [f.rows for f in got.findings]

    assert findings(False) == findings(True) == []
    artifact[[3, 17, 33]] += 0.3 * rng.standard_normal((3, 64)).astype(np.float32)
    assert findings(True) == [] and set(findings(False)) == {"prefill", "decode"}
    artifact[30:36] += 0.3 * rng.standard_normal((6, 64)).astype(np.float32)
    assert findings(True) == ["decode"]


def test_one_wrong_row_is_found() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((256, 64)).astype(np.float32)
    rounded = exact + 4e-3 * rng.standard_normal(exact.shape).astype(np.float32)
    artifact = exact + 4e-3 * rng.standard_normal(exact.shape).astype(np.float32)
    artifact[100] += 0.05 * rng.standard_normal(64).astype(np.float32)
    got = compare_logits(artifact, exact, rounded, {"prefill": np.arange(256)}, dtype="bfloat16")
    assert [f.what for f in got.findings] == ["the worst row's relative error"]
