"""One artifact with code for several levels of processors: one file of weights, chosen when loading, each checked."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc import host
from llmc.artifact import LIBRARY, MANIFEST, Manifest
from llmc.cli.inspect import levels_table
from llmc.errors import LlmcError
from llmc.pipeline import compile_model
from llmc.runtime.embedded import read_embedded
from llmc.runtime.levels import choose_level
from llmc.targets.backend import get, get_levels
from llmc.targets.cpu.backend import BACKEND, capabilities
from llmc.writer import check_output
from tests.e2e.conftest import llmc_command
from tests.frontend.tiny import save, tiny_model
from tests.shared import made_once

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(host.architecture() != "x86_64", reason="levels are of x86-64 processors"),
]
V3, V4 = "x86-64-v3", "x86-64-v4"
IDS = list(range(3, 40))


def runs(preset: str) -> bool:
    return not BACKEND.missing(capabilities(preset))


@pytest.fixture(scope="session")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with two levels; the lower one reads weights that lie as the higher one wants them."""

    def make(folder: Path) -> None:
        model = save(tiny_model("llama"), folder / "model")
        compile_model(model, folder / "a", target=f"cpu/{V3},{V4}", quant_rules={"down_proj": "q4g32"})

    return made_once(tmp_path_factory, "levels", make) / "a"


@pytest.fixture
def manifest(levels: Path) -> Manifest:
    return Manifest.from_text((levels / MANIFEST).read_text(), "")


def test_the_weights_are_there_once(levels: Path, manifest: Manifest) -> None:
    """Made for the best level, whose blocks hold 64 outputs."""
    libraries = [LIBRARY, f"model-{V3}.so"]
    assert sorted(p.name for p in levels.glob("*.so")) == sorted(libraries) == sorted(manifest.libraries)
    assert len(list(levels.glob("*.safetensors"))) == 1
    layouts = {p.layout.partition(",of=")[0] for p in manifest.params} - {"rows"}
    assert {layout.partition(",")[0] for layout in layouts} == {"blocked(n=64", "quant(q4g32"}
    assert all("n=64" in layout for layout in layouts)
    assert {*libraries} <= set(manifest.files)
    for level in manifest.levels:  # a library knows its own level
        own = Manifest.from_text(read_embedded(levels / level.library), "")
        assert own == manifest.without_libraries().at(level) and not own.lower_levels
    check_output(levels)  # a later compile may replace it


def test_each_level_says_whether_it_was_checked(manifest: Manifest) -> None:
    assert [level.name for level in manifest.levels] == [V4, V3]
    for level in manifest.levels:
        if runs(level.name):
            assert level.quality.mode == "sample" and level.quality.relative_error is not None
        else:
            assert level.quality.mode == "off" and "NOT CHECKED" in level.quality.note
        assert level.functions[0].kernels and level.tasks
    assert manifest.levels[0].tasks != manifest.levels[1].tasks  # layouts that are not v3's own


@pytest.mark.skipif(not runs(V4), reason="this machine has no AVX-512")
def test_levels_compute_the_same(levels: Path) -> None:
    best, lower = llmc.load(levels), llmc.load(levels, level=V3)
    assert best.manifest.target.level == V4 and lower.manifest.target.level == V3
    tokens = [model.generate(IDS, max_tokens=12, temperature=0).token_ids for model in (best, lower)]
    assert tokens[0] == tokens[1]
    a, b = (model.logits(IDS, prefill=20) for model in (best, lower))
    assert 0 < np.abs(a - b).max() < 1e-5 * np.abs(a).max()  # other code, the same numbers


def test_a_level_is_asked_for(levels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_LEVEL", V3)
    assert llmc.load(levels).manifest.target.level == V3
    monkeypatch.setenv("LLMC_LEVEL", "sse9")
    with pytest.raises(LlmcError, match=rf"has code for {V4}, {V3}; the level that is asked for is 'sse9'"):
        llmc.load(levels)
    monkeypatch.delenv("LLMC_LEVEL")
    # a library is one level, with its weights beside it
    assert llmc.load(levels / f"model-{V3}.so").manifest.target.level == V3


@pytest.mark.parametrize(
    ("lacking", "taken"), [((), V4), (("avx512bw",), V3), (("avx512bw", "fma", "bmi2"), "")]
)
def test_what_a_machine_has_decides(
    manifest: Manifest, lacking: tuple[str, ...], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = frozenset(manifest.levels[0].target.features)
    monkeypatch.setattr(host, "features", lambda: everything - {*lacking})
    if taken:
        assert choose_level(manifest).name == taken
        assert f"{taken}" in str(levels_table(manifest).columns[0]._cells[0 if taken == V4 else 1])
        return
    with pytest.raises(LlmcError) as refused:
        choose_level(manifest)
    assert refused.value.ref == "cpu-features"
    assert refused.value.message == (
        f"This processor runs none of the artifact's 2 levels: it lacks for {V4} avx512bw, bmi2, fma; for {V3} bmi2, fma."
    )
    with pytest.raises(LlmcError, match=r"needs the processor features .*; this processor lacks bmi2, fma"):
        choose_level(manifest, V3)


def test_what_cannot_be_checked_is_not_assumed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "features", lambda: None)
    assert choose_level(manifest).name == V3


def test_a_library_that_was_exchanged_is_refused(levels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(levels, folder)
    shutil.copy(folder / LIBRARY, folder / f"model-{V3}.so")
    with pytest.raises(LlmcError, match=rf"model-{V3}.so is damaged"):
        llmc.load(folder, level=V3)
    with pytest.raises(LlmcError, match=r"differ: one of them was changed"):
        llmc.load(folder, level=V3, check_hashes=False)
    (folder / "model-other.so").write_bytes(b"")
    with pytest.raises(LlmcError, match=r"not among the libraries"):
        llmc.load(folder / "model-other.so")


def test_inspect_shows_the_levels(levels: Path) -> None:
    shown = llmc_command("inspect", levels).stdout
    for level in (V3, V4):
        assert level in shown
    assert "taken" in shown and f"model-{V3}.so" in shown


@pytest.mark.parametrize("spelling", [f"cpu/{V3},{V4}", f"cpu/{V4},cpu/{V3},{V3}"])
def test_spellings(spelling: str) -> None:
    """Any order; the best comes first."""
    assert [caps.preset for caps in get_levels(spelling)[1]] == [f"cpu/{V4}", f"cpu/{V3}"]
    assert get(spelling)[1].preset == (f"cpu/{V4}" if runs(V4) else f"cpu/{V3}")


def test_all_levels_have_a_name() -> None:
    found = [caps.preset.partition("/")[2] for caps in get_levels("cpu/x86-64")[1]]
    assert found == [name for name in BACKEND.presets if name.startswith("x86-64")]
    assert found[-1] == V3 and found.index("x86-64-v4-bf16") < found.index("x86-64-v4-vnni") < found.index(V4)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"cpu/{V3},", r"presets .*x86-64-v4.*; found 'x86-64-v3,'"),
        (f"cpu/{V3},sm_80", "found 'x86-64-v3,sm_80'"),
        (f"cpu/{V3},cuda/sm_80", "found 'x86-64-v3,cuda/sm_80'"),
        (f"cpu/{V3},aarch64", r"must be of one processor architecture; .* names aarch64 and x86_64"),
    ],
)
def test_bad_spellings(target: str, message: str) -> None:
    with pytest.raises(LlmcError, match=message):
        get_levels(target)


def test_no_level_that_runs_here_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable = dataclasses.replace(BACKEND, missing=lambda caps: ("everything",))
    monkeypatch.setattr("llmc.targets.cpu.backend.BACKEND", unreachable)
    with pytest.raises(LlmcError, match=rf"cannot run cpu/{V3}: it lacks everything"):
        compile_model(tmp_path / "nowhere", tmp_path / "a", target=f"cpu/{V3},{V4}")
