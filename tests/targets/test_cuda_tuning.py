"""Tuning for GPUs with no GPU: spaces, kernels of random schedules in the simulator, files of kernels, the runner's clock."""

from __future__ import annotations

import ctypes
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from llmc import cuda_driver
from llmc.artifact import DeviceKernel
from llmc.cli.app import app
from llmc.cuda_driver import CudaDevice, CudaDriver
from llmc.errors import LlmcError
from llmc.ops import NormAttrs
from llmc.quant.schemes import by_name
from llmc.runtime import cuda
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.choice import ByRows
from llmc.schedules.experts import ExpertConfig
from llmc.schedules.gpu import tune_attention
from llmc.schedules.gpu.configs import GpuLinearSchedule, GpuQuantSchedule, Way
from llmc.schedules.gpu.qlinear import quant_linear
from llmc.schedules.gpu.tune_attention import TunableGpuDecode, TunableGpuPrefill
from llmc.schedules.gpu.tune_experts import TunableGpuExperts
from llmc.schedules.gpu.tune_linear import TunableGpuLinear
from llmc.schedules.gpu.tune_norm import TunableGpuNorm
from llmc.schedules.gpu.tune_qlinear import TunableGpuIntLinear, TunableGpuQuantLinear
from llmc.schedules.linear import LinearConfig
from llmc.schedules.norm import NormConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tunable import Arguments, Tunable, bucket_of, code_of
from llmc.schedules.tune_qlinear import QuantKernel
from llmc.targets.backend import get
from llmc.targets.cuda import library, runner
from llmc.targets.cuda.clock import CLOCK_KHZ, MULTIPROCESSORS, DeviceClock, DriverError
from llmc.targets.cuda.runner import CudaRunner, peak
from llmc.tune.measuring import largest_error
from tests.simulate.gpu import SimulatedTools, gpu
from tests.targets.test_cuda import H100, needs_compiler

TOOLS = SimulatedTools()
CAPS = gpu("sm_90a")
ATTENTION = AttentionConfig(4, 2, 32, 32, "bfloat16", "bfloat16", 16, 3, 0.2, token_major=True)
# tunable, config, numbers of rows to run
TASKS: dict[str, tuple[Tunable, Any, tuple[int, ...]]] = {
    "linear": (
        TunableGpuLinear(),
        LinearConfig(72, 96, "bfloat16", "bfloat16", "bfloat16", has_residual=True, lead=1),
        (1, 3, 20, 70),
    ),
    "linear-float": (TunableGpuLinear(), LinearConfig(40, 52, "float32", "float32", "float32"), (1, 6)),
    "quant": (
        TunableGpuQuantLinear(),
        QuantLinearConfig(48, quant_layout(by_name("q4g32"), 48, 64, CAPS), "bfloat16", "bfloat16"),
        (1, 20),
    ),
    "supers": (
        TunableGpuQuantLinear(),
        QuantLinearConfig(40, quant_layout(by_name("q4k"), 40, 300, CAPS), "bfloat16", "bfloat16"),
        (1, 20),
    ),
    "int": (
        TunableGpuIntLinear(),
        QuantLinearConfig(48, quant_layout(by_name("w4a8"), 48, 64, CAPS), "bfloat16", "bfloat16"),
        (1, 20),
    ),
    "experts": (
        TunableGpuExperts(),
        ExpertConfig(3, 40, 96, "bfloat16", "bfloat16", "bfloat16"),
        (1, 20, 70),
    ),
    "norm": (
        TunableGpuNorm(),
        NormConfig((1, -1, 300), "bfloat16", "bfloat16", NormAttrs(1e-5, has_weight=True, adds=True)),
        (1, 20),
    ),
    "norm-float": (
        TunableGpuNorm(),
        NormConfig((-1, 2, 65), "float32", "float32", NormAttrs(1e-5, center=True)),
        (3,),
    ),
    "prefill": (TunableGpuPrefill(), ATTENTION, (40,)),
    "decode": (TunableGpuDecode(), ATTENTION, (3,)),
}


@pytest.mark.parametrize("preset", ["sm_75", "sm_90", "sm_90a"])
@pytest.mark.parametrize("name", TASKS)
def test_spaces_hold_what_the_machine_can_run(name: str, preset: str) -> None:
    tunable, config, _ = TASKS[name]
    caps, rng = gpu(preset), np.random.default_rng(0)
    task = tunable.task(config)
    assert tunable.from_values(json.loads(json.dumps(tunable.to_values(task)))) == task
    for bucket in tunable.buckets(task):
        space = tunable.space(task, bucket, caps)
        members = list(itertools.islice(space, 3000))
        assert space.default in members and len(set(members)) == len(members)
        assert tunable.default(task, caps) == space.default
        for member in members[:: max(1, len(members) // 20)]:
            assert member in space and space.nearest(asdict(member)) == member
            assert tunable.schedule_type(**json.loads(json.dumps(asdict(member)))) == member
            assert all(np.isfinite(v) for v in tunable.terms(task, member, bucket.low, caps).values())
        for _ in range(20):
            member = space.random(rng)
            moved = space.mutate(member, rng)
            assert {member, moved, space.cross(member, moved, rng)} <= set(members)
    if name == "experts":
        ways = lambda low: {m.way for m in tunable.space(task, bucket_of(low), caps)}  # noqa: E731
        assert ways(600) == {"sm_75": {0, 1}, "sm_90": {0, 2}, "sm_90a": {0, 2, 3}}[preset]
    if name == "prefill":
        space = tunable.space(task, tunable.buckets(task)[-1], caps)
        assert {m.groups for m in space} == ({0, 1, 2, 3} if preset == "sm_90a" else {0})
    if name == "linear":
        ways = lambda low: {m.way for m in tunable.space(task, bucket_of(low), caps)}  # noqa: E731
        few, many = {"sm_75": ({1}, {1}), "sm_90": ({1, 2, 4}, {2}), "sm_90a": ({1, 2, 4}, {2, 3})}[preset]
        assert ways(4) == {0, *few} and ways(600) == {0, *many} and ways(1) == {0, 1}


@pytest.mark.parametrize(
    ("name", "count"),
    [("linear", 1), ("quant", 1), ("experts", 1), ("norm", 2), ("prefill", 1)]
    + [pytest.param(name, 6, marks=pytest.mark.slow) for name in TASKS],
)
def test_random_schedules_compute_the_reference(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_attention, "_CONTEXT", 200)
    tunable, config, numbers = TASKS[name]
    task, rng = tunable.task(config), np.random.default_rng(count)
    for rows in numbers if count > 1 else numbers[-1 if name == "prefill" else 1 :][:1]:
        bucket = bucket_of(rows)
        space = tunable.space(task, bucket, CAPS)
        case = tunable.case(task, rows, rng)
        expected = tunable.reference(task, case)
        for schedule in dict.fromkeys([space.default, *(space.random(rng) for _ in range(count))]):
            kernel = TOOLS.build(CAPS, k=tunable.candidate(task, schedule, bucket, CAPS))["k"]
            arguments = tunable.arguments(task, schedule, case, CAPS)
            values = [v if isinstance(v, int) else TOOLS.tensor(v) for v in arguments.values]
            kernel(*values)
            found = values[arguments.out].numpy().astype(np.float32)
            assert largest_error(found, expected, tunable.tolerance(task)) < 1, schedule


def test_several_schedules_in_one_quantized_kernel() -> None:
    tunable, config, _ = TASKS["quant"]
    few, many = GpuQuantSchedule(Way.THREADS, rows=1, warps=2), GpuQuantSchedule(Way.UNITS, tiles=2, warps=1)
    kernel = QuantKernel(tunable.task(config), ByRows((few, many), (2,)))
    built = TOOLS.build(CAPS, k=quant_linear(kernel, CAPS))["k"]
    for rows in (1, 5):
        case = tunable.case(tunable.task(config), rows, np.random.default_rng(rows))
        arguments = tunable.arguments(tunable.task(config), few, case, CAPS)
        values = [TOOLS.tensor(v) for v in arguments.values]
        built(*values)
        found = values[arguments.out].numpy().astype(np.float32)
        assert largest_error(found, tunable.reference(config, case), 1.6e-2) < 1


def test_code_changes_with_the_machine_and_the_schedules_go_through_json() -> None:
    tunable = TASKS["linear"][0]
    assert len({code_of(tunable, gpu(p)) for p in ("sm_75", "sm_90", "sm_90a")}) == 3
    plain = TASKS["linear"][1]
    tuned = replace(plain, schedule=ByRows((GpuLinearSchedule(Way.THREADS, 1, 2, 4),)))
    assert LinearConfig.from_json(json.loads(json.dumps(tuned.to_json()))) == tuned
    assert LinearConfig.from_json(json.loads(json.dumps(plain.to_json()))) == plain


# -- files of kernels ------------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_kernel_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable, config, _ = TASKS["linear"]
    path, backend = tmp_path / "k.zip", get("cuda/sm_80,sm_90")[0]
    caps = get("cuda/sm_80,sm_90")[1]
    schedule = GpuLinearSchedule(Way.THREADS, 1, 2, 4)
    func = tunable.candidate(tunable.task(config), schedule, bucket_of(1), caps)
    backend.library(func, backend.tvm_target(caps), caps, path)
    kernels = library.kernels_of(path)
    assert {k.arch for k in kernels} == {"sm_80", "sm_90"} and all(k.registers > 8 for k in kernels)
    assert backend.unfit(path) == "" and library.about(path) is None
    with pytest.raises(RuntimeError, match="no code for sm_75"):
        library.load_library(path, CudaDevice(0, "T4", 75, 40, 1))
    # the newest code that the device runs is what TVM's loader gets
    given: list[bytes] = []
    monkeypatch.setattr(cuda, "module_from", lambda raw: given.append(raw))
    for arch in (86, 90):
        with pytest.raises(TypeError):  # None is no module to import
            library.load_library(path, CudaDevice(0, "x", arch, 1, 1))
    assert len(given) == 2 and given[0] != given[1]


def test_spilling_candidates_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = DeviceKernel("k_kernel", "sm_90", 255, 0, 0, 40, 24)
    monkeypatch.setattr(library, "kernels_of", lambda path: (spilling,))
    assert library.unfit(tmp_path / "x") == "registers are spilled: k_kernel 40 bytes"
    monkeypatch.setattr(library, "kernels_of", lambda path: (replace(spilling, spill_stores=8),))
    assert library.unfit(tmp_path / "x") == ""  # a few bytes may be worth it


# -- the runner ------------------------------------------------------------------------------------------------------------


class FakeDriver:
    """Entry points of libcuda that the clock calls; time goes on by what a launch takes."""

    def __init__(self, error: str = "") -> None:
        self.now, self.error, self.waits = 0.0, error, 0
        self.events: dict[int, float] = {}
        self.attributes = {MULTIPROCESSORS: 132, CLOCK_KHZ: 1_980_000, runner.CACHE_BYTES: 1 << 20}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.error:
                return 700
            known = type(self).__dict__.get(f"_{name}")
            if known is not None:
                known(self, *arguments)
            return 0

        return call

    def _cuDeviceGetAttribute(self, value: Any, number: int, _: Any) -> None:
        value._obj.value = self.attributes[number]

    def _cuEventCreate(self, event: Any, _: int) -> None:
        event._obj.value = 1 + len(self.events)
        self.events[event._obj.value] = 0.0

    def _cuEventRecord(self, event: Any, _: Any) -> None:
        self.events[event.value] = self.now

    def _cuEventElapsedTime(self, milliseconds: Any, begin: Any, end: Any) -> None:
        milliseconds._obj.value = 1e3 * (self.events[end.value] - self.events[begin.value])

    def _cuLaunchKernel(self, *_: Any) -> None:
        self.waits += 1

    def _cuMemcpyDtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:
        self.now += size.value / 2e12

    def _cuGetErrorString(self, status: int, text: Any) -> None:
        text._obj.value = b"an illegal memory access was encountered"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A GPU whose memory is the processor's."""
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(13000, (H100,)))
    monkeypatch.setattr(cuda, "load_runtime", lambda: None)
    real = cuda.DeviceMemory
    monkeypatch.setattr(cuda, "DeviceMemory", lambda: real(cuda.CPU))
    return FakeDriver()


def test_the_runner_goes_round_copies_and_repeats_short_calls(fake: FakeDriver) -> None:
    made = CudaRunner(CAPS, DeviceClock(fake))
    weight, out = np.arange(1 << 17, dtype=np.float32), np.full(4, np.nan, np.float32)
    arguments = Arguments((np.ones(4, np.float32), weight, 7, out), (1,), 3)
    placed = made.place(arguments)
    assert len(placed) == 5  # twice the cache of 1 MB, and one more
    read: list[int] = []

    def kernel(x: Any, w: Any, layer: int, y: Any) -> None:
        assert layer == 7
        read.append(id(w))
        made._memory.put(y, np.full(4, 3.0, np.float32))
        fake.now += 5e-6

    np.testing.assert_array_equal(made.result(arguments, placed[0]), out)
    assert made.seconds(kernel, placed[0]) == pytest.approx(5e-6) and len(read) == 1
    np.testing.assert_array_equal(made.result(arguments, placed[0]), np.full(4, 3.0))
    assert np.isnan(made.result(arguments, placed[0])).all()  # cleared for the next call
    assert made.seconds(kernel, placed[2]) == pytest.approx(5e-6)
    assert len(read) == 1 + 8 and len(set(read[1:])) == 5 and read[1] == id(placed[2][1])
    assert fake.waits == 2
    # weights that are there already take the place of the arguments' own
    cold = made.copies(weight)
    again = made.place(replace(arguments, values=(arguments.values[0], None, 7, out)), {1: cold})
    assert again[3][1] is cold[3]


def test_limits(fake: FakeDriver) -> None:
    limits = CudaRunner(CAPS, DeviceClock(fake)).limits()
    assert limits.read == pytest.approx(4e12)
    assert limits.peak["bfloat16"] == pytest.approx(1070e12, rel=0.01)  # 132 x 4096 x 1.98 GHz
    assert set(limits.peak) == {"float32", "float16", "bfloat16", "int8"}
    assert peak(75, 1e9)["bfloat16"] == peak(75, 1e9)["float32"] < peak(75, 1e9)["float16"]
    assert peak(103, 1e9) == peak(100, 1e9)


def test_errors_of_the_driver() -> None:
    with pytest.raises(DriverError, match="cuModuleLoadData: an illegal memory access"):
        DeviceClock(FakeDriver("cuModuleLoadData"))
    clock = DeviceClock(FakeDriver())
    clock._cuda.error = "cuEventSynchronize"
    with pytest.raises(DriverError, match="cuEventSynchronize"):
        clock.seconds(lambda: None, 0.0)
    assert CudaRunner.errors_stay  # so the measuring process is replaced
    assert isinstance(ctypes.c_float(1.0).value, float)


def test_without_a_gpu_one_sentence_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(0, (), "there is no NVIDIA driver"))
    with pytest.raises(
        LlmcError, match=r"measured on a GPU, and there is no NVIDIA driver.*--rpc.*\[no-cuda-device\]"
    ):
        CudaRunner(CAPS)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    command = [
        "tune",
        str(tmp_path),
        "--target",
        "cuda/sm_90",
        "--budget",
        "1m",
        "--records",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and not (tmp_path / "r").exists()
    assert "cannot run cuda/sm_90: there is no NVIDIA driver." in result.stderr.replace("\n", " ")
    assert get("cuda/sm_90")[0].device() == ""
