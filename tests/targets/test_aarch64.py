"""The aarch64 presets: what their inner loops consist of, whole artifacts made on x86-64, and such artifacts emulated."""

from __future__ import annotations

import functools
import json
import shlex
import struct
import subprocess
from pathlib import Path

import pytest

import llmc
from llmc import link
from llmc.errors import LlmcError
from llmc.host import architecture
from llmc.pipeline import compile_model
from llmc.quant.schemes import by_name
from llmc.runtime.embedded import read_embedded
from llmc.schedules.attention import AttentionConfig, attention_decode, attention_prefill
from llmc.schedules.ilinear import int_linear
from llmc.schedules.linear import LinearConfig, linear
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig, quant_linear
from llmc.targets.cpu.backend import capabilities
from tools.inner_loops import Loop, assembly, densest, hottest, loops
from tools.run_aarch64 import command, lacking
from tools.tiny_configs import tiny_model

pytestmark = pytest.mark.skipif(architecture() == "aarch64", reason="runs natively, as all other tests do")
emulated = [pytest.mark.slow, pytest.mark.skipif(bool(lacking()), reason=lacking() or "there is an emulator")]
EM_AARCH64 = 183
LIBM = ("expf", "tanhf", "erff", "powf", "roundevenf", "__truncsfbf2", "__extendhfsf2", "__gnu_h2f_ieee")


@functools.cache
def code(preset: str, kind: str) -> str:
    """Assembly of a linear kernel: of a dtype, or a scheme on bfloat16."""
    caps = capabilities(preset)
    if kind in ("float32", "float16", "bfloat16"):
        return assembly(caps, linear(LinearConfig(64, 256, kind, kind, kind), caps))
    layout = quant_layout(by_name(kind), 64, 512, caps)
    cfg = QuantLinearConfig(64, layout, "bfloat16", "bfloat16")
    return assembly(caps, (int_linear if layout.quads else quant_linear)(cfg, caps))


def check(text: str, instruction: str, least: float) -> None:
    """Some loop multiplies by `instruction`, at least `least` elements per instruction; no loop calls libm or spills."""
    best = max(
        (loop for loop in hottest(text) if instruction in loop.counts()),
        key=lambda loop: loop.multiplies / len(loop.lines),
        default=None,
    )
    assert best is not None, f"no loop multiplies by {instruction}"
    assert best.multiplies / len(best.lines) >= least, "\n".join(best.lines)
    for loop in loops(text):
        called = [c for c in loop.calls if c.split()[-1] in LIBM]
        assert not called, called
        if loop.multiplies >= 32:
            assert len(loop.spills) <= len(loop.lines) // 100, "\n".join(loop.lines)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("preset", "kind", "instruction", "least"),
    [
        ("aarch64-i8mm", "w4a8", "smmla", 10),
        ("aarch64-i8mm", "w4a8", "sdot", 5),
        ("aarch64-i8mm", "bfloat16", "bfmmla", 6),
        ("aarch64-i8mm", "bfloat16", "bfdot", 3.5),
        ("aarch64-i8mm", "float16", "fmlal2", 3),
        slow("aarch64-i8mm", "w8a8", "smmla", 15),
        slow("aarch64-i8mm", "w8a8", "sdot", 8),
        slow("aarch64-i8mm", "q4g32", "bfmmla", 5),
        slow("aarch64-i8mm", "q4g32", "bfdot", 1.5),
        slow("aarch64-dotprod", "w4a8", "sdot", 5),
        slow("aarch64-dotprod", "bfloat16", "fmla", 2.5),
        slow("aarch64-dotprod", "float16", "fmla", 2.5),
        slow("aarch64", "float32", "fmla", 3),
    ],
)
def test_inner_loops(preset: str, kind: str, instruction: str, least: float) -> None:
    check(code(preset, kind), instruction, least)


@pytest.mark.slow
def test_four_bits_become_values_by_tables() -> None:
    """Never one by one: a permutation of a table in every loop that unpacks."""
    assert any(
        "tbl" in loop.counts() and "bfdot" in loop.counts() for loop in loops(code("aarch64-i8mm", "q4g32"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [attention_prefill, attention_decode])
def test_attention(kernel) -> None:
    caps = capabilities("aarch64-i8mm")
    cfg = AttentionConfig(8, 2, 64, 64, "bfloat16", "bfloat16", 32, 2, 0.125)
    check(assembly(caps, kernel(cfg, caps)), "bfmmla", 3.5)


def test_loops_are_read_from_assembly() -> None:
    text = """
k:
	mov x0, #0
.LBB0_1:
	mov x1, #0
.LBB0_2:                                // inner
	ldr q0, [x2], #16
	str q9, [sp, #32]
	sdot v1.4s, v0.16b, v2.16b
	fmla s1, s2, s3
	cmp x1, x3
	b.ne .LBB0_2
	bl expf
	cbnz x0, .LBB0_1
	ret
"""
    (loop,) = loops(text)
    assert loop == Loop("k", tuple(line.strip() for line in text.splitlines()[6:12]))
    assert loop.multiplies == 16 and loop.spills == ("str q9, [sp, #32]",) and loop.calls == ()
    assert densest(text) == loop and hottest(text, least=17) == []


def tiny():
    return tiny_model("llama", hidden_size=64, num_hidden_layers=2)


def elf_machine(path: Path) -> int:
    return int(struct.unpack_from("<H", path.read_bytes(), 18)[0])


def test_a_whole_artifact_without_such_a_machine(tmp_path: Path) -> None:
    result = compile_model(tiny(), tmp_path / "a", target="cpu/aarch64-i8mm")
    assert result.manifest is not None and "NOT CHECKED" in result.manifest.quality.note
    assert elf_machine(tmp_path / "a" / "model.so") == EM_AARCH64
    embedded = json.loads(read_embedded(tmp_path / "a" / "model.so"))
    assert embedded["target"]["features"] == ["asimddp", "asimdhp", "asimdfhm", "i8mm", "bf16"]
    with pytest.raises(LlmcError, match="is for aarch64"):
        llmc.load(tmp_path / "a")


def test_a_missing_cross_linker_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link.shutil, "which", lambda name: None)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlmcError) as caught:
        compile_model("no such folder", tmp_path / "a", target="cpu/aarch64")
    assert caught.value.ref == "no-cross-cxx"
    assert "aarch64-linux-gnu-g++" in caught.value.message and "pip install ziglang" in str(caught.value.hint)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: object())
    assert link.require_cxx("aarch64-unknown-linux-gnu")[1:3] == ["-m", "ziglang"]


SCRIPT = """
import sys, llmc
for folder in sys.argv[1:]:
    model = llmc.load(folder)
    print(*model.generate([3, 1, 4, 1, 5, 9, 2, 6], max_tokens=12, temperature=0, ignore_eos=True).token_ids)
"""


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def tokens_here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Scheme -> the greedy tokens of an artifact for this machine."""
    folder, found = tmp_path_factory.mktemp("here"), {}
    for quant in ("none", "w4a8"):
        compile_model(tiny(), folder / quant, quant=quant)
        model = llmc.load(folder / quant)
        found[quant] = list(model.generate(PROMPT, max_tokens=12, temperature=0, ignore_eos=True).token_ids)
    return found


class TestEmulated:
    pytestmark = emulated

    @pytest.mark.parametrize(
        ("preset", "quant"),
        [
            ("aarch64-i8mm", "none"),
            ("aarch64-i8mm", "w4a8"),
            ("aarch64-dotprod", "w4a8"),
            ("aarch64", "none"),
        ],
    )
    def test_generates_what_it_does_here(
        self,
        preset: str,
        quant: str,
        tokens_here: dict[str, list[int]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Float32 and 4-bit weights: verified against the source in the emulator, and the same greedy tokens."""
        monkeypatch.setenv("LLMC_EMULATOR", shlex.join(command()))
        result = compile_model(tiny(), tmp_path / "a", target=f"cpu/{preset}", quant=quant)
        assert result.manifest is not None and result.manifest.quality.mode == "sample"
        words = [*command(), "-c", SCRIPT, str(tmp_path / "a")]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert [int(i) for i in done.stdout.split()] == tokens_here[quant]

    def test_bf16_is_verified(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setenv("LLMC_EMULATOR", shlex.join(command()))
        model = tiny_model("llama", dtype=torch.bfloat16)
        for quant in ("none", "q4g32"):
            result = compile_model(
                model, tmp_path / quant, target="cpu/aarch64-i8mm", quant=quant, verify="full"
            )
            assert result.manifest is not None and result.manifest.quality.mode == "full"

    def test_a_machine_without_the_features_is_refused(self, tmp_path: Path) -> None:
        """Under qemu the auxiliary vector is the emulated processor's, while /proc/cpuinfo is that of this machine."""
        compile_model(tiny(), tmp_path / "a", target="cpu/aarch64-i8mm")
        words = [*command("cortex-a72"), "-c", SCRIPT, str(tmp_path / "a")]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode != 0
        assert "this processor lacks asimddp, asimdfhm, asimdhp, bf16, i8mm" in done.stderr

    def test_a_broken_emulator_fails_the_compile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LLMC_EMULATOR", shlex.join([*command("cortex-a72")]))
        with pytest.raises(LlmcError, match="could not be checked in the emulator"):
            compile_model(tiny(), tmp_path / "a", target="cpu/aarch64-i8mm")
        assert not (tmp_path / "a").exists()


def test_presets_are_ordered_by_what_they_need() -> None:
    names = ("aarch64-i8mm", "aarch64-dotprod", "aarch64")
    needs = [set(capabilities(name).features) for name in names]
    assert needs[0] > needs[1] > needs[2]
