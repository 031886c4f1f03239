"""Loading a real compiled artifact: mapped bfloat16 weights, pools updated in place, nothing but the runtime needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llmc.artifact import Limits
from llmc.errors import LlmcError
from llmc.runtime import memory
from llmc.runtime.library import Library, tensor_view
from llmc.runtime.model import load
from llmc.runtime.weights import Weights
from tests.runtime.compiled import build_artifact
from tests.runtime.conftest import group, toy_logits, toy_table

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 300
IDS = [int(i) for i in np.random.default_rng(2).integers(0, VOCAB, 40)]


def want(ids: list[int], scale: int = 1) -> np.ndarray:
    return scale * toy_logits(ids, [group()], VOCAB)


def test_compiled_steps_match_the_reference(artifact: Path) -> None:
    model = load(artifact)
    assert np.array_equal(model.logits(IDS), want(IDS))  # in chunks of max_step_tokens
    batch = [IDS[:20], IDS[5:6], IDS[10:40]]
    for ids, got in zip(batch, model.logits_batch(batch, prefill=[7, 1, 12]), strict=True):
        assert np.array_equal(got, want(ids))
    result = model.generate(IDS[:9], max_tokens=12, ignore_eos=True)
    for at, token in enumerate(result.token_ids):
        assert token == int(want([*IDS[:9], *result.token_ids[:at]])[-1].argmax())
    assert model.memory().kv_in_use == 0


def test_results_outlive_the_next_step(artifact: Path) -> None:
    model = load(artifact)
    with model.new_sequence() as seq:
        first = model.step([(seq, IDS[:5])])
        kept = first.copy()
        for token in IDS[5:15]:
            model.step([(seq, [token])])
    assert np.array_equal(first, kept)
    del model
    assert np.array_equal(first, kept)


def test_weights_are_mapped_not_copied(artifact: Path) -> None:
    from llmc.artifact import MANIFEST, Manifest

    manifest = Manifest.from_text((artifact / MANIFEST).read_text(), "")
    weights = Weights(artifact, manifest.params)
    (table,) = weights.tensors
    assert (str(table.dtype), tuple(table.shape)) == ("bfloat16", (VOCAB, VOCAB))
    entry = manifest.params[0]
    assert entry.offset > 64
    shard = weights._shards[entry.shard]
    bits = shard[entry.offset : entry.offset + entry.nbytes].view(np.uint16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32).reshape(VOCAB, VOCAB)
    assert np.array_equal(exact, toy_table(VOCAB))
    assert weights.nbytes == (artifact / entry.shard).stat().st_size
    assert 0 < weights.resident() <= weights.nbytes


def test_a_misplaced_parameter_is_refused(artifact: Path) -> None:
    import dataclasses

    from llmc.artifact import MANIFEST, Manifest

    entry = Manifest.from_text((artifact / MANIFEST).read_text(), "").params[0]
    for change, message in (
        ({"offset": entry.offset - 2}, "not 64-byte aligned"),
        ({"shape": (VOCAB, VOCAB + 1)}, f"takes {VOCAB * (VOCAB + 1) * 2} bytes, found {VOCAB * VOCAB * 2}"),
    ):
        with pytest.raises(LlmcError, match=rf"'table' is misplaced: .*{message}.*\[manifest-corrupt\]"):
            Weights(artifact, [dataclasses.replace(entry, **change)])


def test_the_same_path_after_a_recompile_is_the_new_code(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    build_artifact(folder, vocab=VOCAB)
    old = load(folder)
    build_artifact(folder, vocab=VOCAB, scale=3)
    new = load(folder)
    assert np.array_equal(new.logits(IDS[:5]), want(IDS[:5], 3))
    assert np.array_equal(old.logits(IDS[:5]), want(IDS[:5]))


def test_an_artifact_moves(artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a folder with spaces – ü" / "demo"
    shutil.copytree(artifact, moved)
    model = load(moved)
    shutil.rmtree(moved)  # mapped files stay while they are in use
    assert np.array_equal(model.logits(IDS[:5]), want(IDS[:5]))


def test_memory_options(artifact: Path) -> None:
    model = load(artifact, kv_pages=2)
    with pytest.raises(LlmcError, match=r"needs 3 more pages of 16 tokens, 2 of 2 are free"):
        model.logits(IDS[:33])
    weights = model.memory().weights
    page = 2 * 16 * 4
    model = load(artifact, max_memory=weights + 4 * page)
    assert model.memory().kv_reserved == 4 * page
    with pytest.raises(LlmcError, match="kv_pages or max_memory, not both"):
        load(artifact, kv_pages=2, max_memory="1GB")
    with pytest.raises(LlmcError, match=rf"takes {2 * page} bytes; 0 are left.*\[max-memory\]"):
        load(artifact, max_memory=f"{weights - 5}")
    assert load(artifact).memory().kv_reserved == 17 * page  # four sequences of 64 tokens, and page 0


def test_memory_figures(artifact: Path) -> None:
    model = load(artifact)
    with model.new_sequence() as seq:
        model.step([(seq, IDS[:17])])
        figures = model.memory()
    assert figures.kv_in_use == 2 * 2 * 16 * 4
    assert 10 << 20 < figures.process <= figures.process_peak < 1 << 36
    assert 0 < figures.weights_resident <= figures.weights


def test_untouched_cache_takes_no_memory() -> None:
    array = memory.huge_zeros(512 << 20)
    assert array.ctypes.data % memory.HUGE_PAGE == 0 and array.nbytes == 512 << 20
    assert memory.resident_bytes(array) < 4 << 20
    array[: 8 << 20] = 1
    assert 8 << 20 <= memory.resident_bytes(array) <= 14 << 20
    assert not array[8 << 20 : 9 << 20].any()
    for size in (0, 1, 100, 4097):
        small = memory.huge_zeros(size)
        assert small.nbytes == size and not small.any()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not list mappings")
def test_large_memory_is_private_and_may_lie_on_huge_pages() -> None:
    # shared anonymous memory, Python's default, gets no huge pages: pages of keys and values read at half the speed
    array = memory.huge_zeros(64 << 20)
    array[::4096] = 1
    address, flags = array.ctypes.data, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
            if inside:
                assert line.split()[1] == "rw-p"
        elif inside and first == "VmFlags:":
            flags = line
    assert " hg" in flags


def test_tensors_need_alignment() -> None:
    raw = memory.huge_zeros(4096)
    with pytest.raises(ValueError, match="not 64-byte aligned"):
        tensor_view(raw[4:68], (16,), "float32")


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "model.so").write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(LlmcError, match=r"model.so cannot be loaded: .*\[library-unloadable\]"):
        Library(tmp_path / "model.so")
    with pytest.raises(
        LlmcError, match=r"is for target 'vulkan'; this llmc runs cpu, cuda.*\[target-not-here\]"
    ):
        Library(tmp_path / "model.so", "vulkan")


ALONE = """
import importlib.abc, sys
BANNED = ("torch", "transformers", "onnx", "llmc.frontend", "llmc.passes", "llmc.schedules", "llmc.targets",
          "llmc.pipeline", "llmc.spec", "llmc.cli")
class Ban(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        # TVM's folder may be looked up, its code (which begins by importing tvm.libinfo) may not run
        if name.startswith("tvm.") or any(name == b or name.startswith(b + ".") for b in BANNED):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Ban())
import llmc
model = llmc.load(sys.argv[1], threads=1)
assert model.has_tokenizer
result = model.generate([int(i) for i in sys.argv[2].split(",")], max_tokens=6, temperature=0, ignore_eos=True)
loaded = [m for m in sys.modules if m.split(".")[0] in ("torch", "transformers", "tvm") and sys.modules[m]]
assert not loaded, loaded
assert "libtvm_compiler" not in open("/proc/self/maps").read() if sys.platform == "linux" else True
print(list(result.token_ids))
"""


def test_the_runtime_needs_no_compiler(artifact: Path) -> None:
    """In a process where torch, transformers, TVM's Python code and the compiler's cannot be imported."""
    expected = load(artifact).generate(IDS[:9], max_tokens=6, ignore_eos=True).token_ids
    text = ",".join(map(str, IDS[:9]))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(artifact), text],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list(expected))


def test_the_compiler_can_be_imported_after_the_runtime(artifact: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None  # tvm_ffi would import it\n"
        "import llmc\nmodel = llmc.load(sys.argv[1], threads=1)\n"
        "first = model.logits([1, 2, 3])\nassert 'tvm' not in sys.modules\n"
        "import tvm, numpy as np\nfrom tvm import relax\n"
        "assert np.array_equal(first, llmc.load(sys.argv[1]).logits([1, 2, 3]))\n"
        "assert np.array_equal(first, model.logits([1, 2, 3]))\n"
        "print(relax.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "tvm.relax"), done.stderr


def test_threads_are_fixed_by_the_first_load(artifact: Path) -> None:
    code = (
        "import sys, warnings\nsys.modules['torch'] = None  # tvm_ffi would import it\n"
        "import llmc\nllmc.load(sys.argv[1], threads=2)\n"
        "import os\nassert os.environ['TVM_NUM_THREADS'] == '2'\n"
        "warnings.simplefilter('error')\nllmc.load(sys.argv[1], threads=2)\nllmc.load(sys.argv[1])\n"
        "try:\n    llmc.load(sys.argv[1], threads=1)\nexcept RuntimeWarning as e:\n    print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert "already runs kernels with 2 threads; threads=1 has no effect" in done.stdout, done.stderr
    with pytest.raises(LlmcError, match=r"threads must be at least 1, found 0"):
        load(artifact, threads=0)


def test_many_models_in_one_process_leave_nothing(artifact: Path) -> None:
    for _ in range(3):
        load(artifact).generate(IDS[:3], max_tokens=2)
    before = memory.process_rss()
    for _ in range(20):
        load(artifact).generate(IDS[:3], max_tokens=2)
    assert memory.process_rss() - before < 4 << 20


def test_limits_of_the_artifact_hold(tmp_path: Path) -> None:
    build_artifact(tmp_path / "a", vocab=VOCAB, limits=Limits(20, 1, 8), tokenizer=False)
    model = load(tmp_path / "a")
    with pytest.raises(LlmcError, match="prompt-too-long"):
        model.generate(IDS[:21])
    with pytest.raises(LlmcError, match="no-tokenizer"):
        model.tokenize("x")
    assert np.array_equal(model.logits(IDS[:20]), want(IDS[:20]))


def test_threads_and_streams_share_a_model(artifact: Path) -> None:
    model = load(artifact)
    prompts = [IDS[i : i + 5] for i in range(4)]
    expected = [model.generate(p, max_tokens=30, ignore_eos=True).token_ids for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda p: model.generate(p, max_tokens=30, ignore_eos=True).token_ids, prompts)
        assert list(results) == expected
    streams = [model.generate(p, max_tokens=30, ignore_eos=True, stream=True) for p in prompts]
    for _ in zip(*streams, strict=True):
        pass
    assert [s.result.token_ids for s in streams] == expected
    assert model.memory().kv_in_use == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_this_programs_own() -> None:
    """getrusage's figure survives exec: a shell or test runner that holds much would be counted."""
    held = np.ones(60_000_000)  # 480 MB
    code = "from llmc.runtime.memory import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held[0] == 1 and int(done.stdout) < 200 << 20
