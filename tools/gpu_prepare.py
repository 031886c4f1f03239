"""Builds what tools/gpu_check.py takes to a GPU: kernels, small artifacts with references, large artifacts without weights.

    python tools/gpu_check.py --prepare DIR [--target cuda/sm_90a]

Nothing here needs a GPU. On the other machine nothing needs a compiler then: TVM's runtime libraries go along in
``wheels`` without its compiler (which is 250 MB).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.gpu_device import Sizes

SCHEMES = (
    "q8",
    "q8g32a",
    "q6g64",
    "q4g32",
    "q4g32a",
    "q4g128",
    "q3g64",
    "nf4",
    "fp8",
    "mxfp4",
    "w8a8",
    "w4a8",
    "fp8a8",
    "fp8a8g128",
)
TINY_MODELS = ("llama", "gemma2", "gpt2")
QUANT = ("q4g128", "q4g32", "q8", "fp8")
INTEGERS = ("w8a8", "w4a8", "fp8a8")
_RUNTIME = ("libtvm_runtime.so", "libtvm_runtime_cuda.so", "libtvm_runtime_extra.so")
_ALLOWED = {
    "w8a8": 6e-2,
    "w4a8": 6e-2,
    "fp8a8": 1e-1,
    "fp8a8g128": 1e-1,
}  # relative error of logits: activations are rounded anew at each layer
Told = Callable[[str], None]


def prepare(folder: Path, target: str, sizes: Sizes, sections: tuple[str, ...], told: Told) -> None:
    """Write everything that the sections need below `folder`; what an earlier call for the same target wrote stays.

    Args:
        target: with its preset; ``simulator`` builds for the stand-in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_of = json.dumps({"target": target, "code": _code()}) + "\n"
    about = folder / "about.json"
    if not about.exists() or about.read_text() != made_of:
        for name in ("kernels", "tokens", "schemes", "models"):  # of other code, or unfinished
            shutil.rmtree(folder / name, ignore_errors=True)
    stand_in = target == "simulator"
    preset = "cuda/sm_90" if stand_in else target
    artifacts = "cpu" if stand_in else target
    about.write_text(made_of)
    for name, make in _bundles(sizes).items():
        path = folder / "kernels" / f"{name}.zip"
        if name in {_BUNDLE_OF.get(section) for section in sections} and not path.exists():
            told(f"kernels: {name}")
            _write_bundle(path, preset, stand_in, make)
    for section, write in (("tokens", _tokens), ("schemes", _schemes)):
        if section in sections:
            write(folder / section, artifacts, sizes, told)
    for name in ("bf16", "q4g128"):
        wanted = {f"model-{name}", *(["torch", "vllm", "trtllm"] if name == "bf16" else [])} & set(sections)
        if wanted and not (folder / "models" / name).exists():
            told(f"model: {name}")
            _model(folder / "models" / name, artifacts, name, sizes)


def _code() -> str:
    """A hash of all that is imported from this tree."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for folder in ("llmc", "passes", "schedules", "runtime", "targets", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_BUNDLE_OF = {
    "gemm": "gemm",
    "flat": "linear",
    "gemv": "linear",
    "quant": "quant",
    "integers": "integers",
    "experts": "experts",
    "prefill": "attention",
    "decode": "attention",
}


# -- kernels ---------------------------------------------------------------------------------------------------------------

# name -> (PrimFunc, what is told about it)
Kernels = dict[str, tuple[Any, dict[str, Any]]]


def _bundles(sizes: Sizes) -> dict[str, Callable[[Any], Kernels]]:
    return {
        "gemm": lambda caps: {f"square_{n}": _linear((n, n, False), caps) for n in sizes.squares},
        "linear": lambda caps: {name: _linear(shape, caps) for name, shape in sizes.shapes.items()},
        "quant": lambda caps: _quantized(QUANT, sizes, caps),
        "integers": lambda caps: _quantized(INTEGERS, sizes, caps),
        "experts": lambda caps: _experts(sizes, caps),
        "attention": lambda caps: _attention(sizes, caps),
    }


def _linear(shape: tuple[int, int, bool], caps: Any) -> tuple[Any, dict[str, Any]]:
    from llmc.schedules.kernels import builders
    from llmc.schedules.linear import LinearConfig

    n, k, gated = shape
    kinds = ("bfloat16", "bfloat16", "bfloat16")
    config = LinearConfig(n, k, *kinds, gated=gated, activation="silu" if gated else "")
    layout = config.weight_layout(caps)
    return builders(caps).linear(config, caps), {"block": [layout.n_block, layout.k_pack]}


def _quantized(schemes: tuple[str, ...], sizes: Sizes, caps: Any) -> Kernels:
    from llmc.quant.schemes import by_name
    from llmc.schedules.kernels import builders
    from llmc.schedules.qlayout import quant_layout
    from llmc.schedules.qlinear import QuantLinearConfig

    made: Kernels = {}
    for scheme in schemes:
        for name, (outputs, k, gated) in sizes.shapes.items():
            n = 2 * outputs if gated else outputs  # without the activation: as one matmul
            layout = quant_layout(by_name(scheme), n, k, caps)
            config = QuantLinearConfig(
                n, layout, "bfloat16", "bfloat16", prefetch=0 if layout.quads else 2304
            )
            told = {
                "scheme": scheme,
                "n": n,
                "k": k,
                "layout": layout.as_text(),
                "integers": bool(layout.quads),
            }
            made[f"{scheme}_{name}"] = (builders(caps).quant_linear(config, caps), told)
    return made


def _experts(sizes: Sizes, caps: Any) -> Kernels:
    from llmc.schedules.experts import ExpertConfig, SortConfig
    from llmc.schedules.gpu.experts import expert_linear, layout_of
    from llmc.schedules.gpu.sort_experts import sort_experts

    count, n, k = sizes.experts
    config = ExpertConfig(count, n, k, "bfloat16", "bfloat16", "bfloat16")
    layout = layout_of("bfloat16")
    told = {"block": [layout.n_block, layout.k_pack]}
    return {
        "sort": (sort_experts(SortConfig(count), caps), {}),
        "experts": (expert_linear(config, caps), told),
    }


def _attention(sizes: Sizes, caps: Any) -> Kernels:
    from llmc.schedules.attention import partial_shape
    from llmc.schedules.attention_config import AttentionConfig
    from llmc.schedules.kernels import builders, with_defaults

    heads, kv_heads, dim = sizes.heads
    kinds = ("bfloat16", "bfloat16")
    config = AttentionConfig(heads, kv_heads, dim, dim, *kinds, 16, 1, dim**-0.5, token_major=True)
    config, make = with_defaults(config, caps), builders(caps)
    return {
        "prefill": (make.attention_prefill(config, caps), {}),
        "decode": (make.attention_decode(config, caps, None), {"partial": list(partial_shape(config))}),
    }


def _write_bundle(path: Path, preset: str, stand_in: bool, make: Callable[[Any], Kernels]) -> None:
    from llmc.targets.backend import get
    from llmc.targets.cuda.library import write_kernels

    backend, caps = get(preset)
    kernels = make(caps)
    funcs, told = ({name: pair[i] for name, pair in kernels.items()} for i in range(2))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    if not stand_in:
        write_kernels(funcs, backend.tvm_target(caps), caps, part, told)
        part.rename(path)
        return
    import tvm

    from llmc.targets import simt

    named = {name: func.with_attr("global_symbol", name) for name, func in funcs.items()}
    lowered = simt.lower(tvm.IRModule(named), backend.tvm_target(caps))
    plain = tvm.IRModule({gvar.name_hint: func for gvar, func in lowered.functions.items()})
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as held:
        held.writestr("tir.json", tvm.ir.save_json(plain))
        held.writestr("about.json", json.dumps(told))
    part.rename(path)


# -- small models ----------------------------------------------------------------------------------------------------------


def _compiled(model: Any, out: Path, target: str, **spec: Any) -> Any:
    """Compile without the check against torch (a device may be elsewhere); the loaded model if it runs here."""
    import llmc
    from llmc.pipeline import compile_model

    compile_model(model, out, target=target, verify="off", **spec)
    return llmc.load(out, max_memory="2GB") if target == "cpu" else None


def _tokens(folder: Path, target: str, sizes: Sizes, told: Told) -> None:
    """float32 artifacts of the target, and the greedy tokens of the cpu's."""
    from tools.tiny_configs import tiny_model

    for name in TINY_MODELS[: None if sizes.tiny_tokens > 100 else 1]:
        if (folder / name / "artifact").exists():  # written last
            continue
        told(f"tokens: {name}")
        model, prompt = tiny_model(name), [1, 2, 3]
        with tempfile.TemporaryDirectory() as work:
            cpu = _compiled(model, Path(work) / "cpu", "cpu", dtype="f32", max_seq_len=256)
            result = cpu.generate(prompt, max_tokens=sizes.tiny_tokens, temperature=0.0, ignore_eos=True)
        expected = {"prompt": prompt, "tokens": [int(i) for i in result.token_ids]}
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "expected.json").write_text(json.dumps(expected))
        _compiled(model, folder / name / "artifact", target, dtype="f32", max_seq_len=256)


def _schemes(folder: Path, target: str, sizes: Sizes, told: Told) -> None:
    """bfloat16 artifacts of the target in every kind of scheme, and the logits of the cpu's."""
    from tools.tiny_configs import tiny_model

    big = sizes.tiny_tokens > 100
    # wide enough that groups of 128 columns are several
    model = tiny_model("llama", **({"hidden_size": 256, "intermediate_size": 512} if big else {}))
    ids = [int(i) for i in np.random.default_rng(3).integers(3, 256, 40)]
    for scheme in SCHEMES if big else ("q4g32",):
        if (folder / scheme / "artifact").exists():  # written last
            continue
        told(f"schemes: {scheme}")
        spec = dict(dtype="bf16", quant=scheme, max_seq_len=64)
        with tempfile.TemporaryDirectory() as work:
            cpu = _compiled(model, Path(work) / "cpu", "cpu", **spec)
            logits = cpu.logits(ids, prefill=30)
        place = folder / scheme
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / "logits.npy", logits)
        allowed = _ALLOWED.get(scheme, 3e-2)
        (place / "expected.json").write_text(json.dumps({"ids": ids, "prefill": 30, "allowed": allowed}))
        _compiled(model, place / "artifact", target, **spec)


# -- the 8B shape without its weights --------------------------------------------------------------------------------------


def _config(sizes: Sizes) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, dim, mlp, vocab = sizes.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _model(folder: Path, target: str, name: str, sizes: Sizes) -> None:
    """An artifact whose weight files are missing, the plan by which they are packed, and the source's config."""
    with tempfile.TemporaryDirectory(prefix="llmc-prepare-") as work:
        source = Path(work) / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(_config(sizes), indent=1))
        compile_without_weights(
            source,
            Path(work) / "artifact",
            Path(work) / "out",
            target=target,
            dtype="bf16",
            max_seq_len=min(8192, 2 * sizes.prompt + 256),
            max_batch=8,
            max_step_tokens=sizes.prompt,
            **({} if name == "bf16" else {"quant": name}),
        )
        shutil.copytree(source, Path(work) / "out" / "source")
        shutil.copytree(Path(work) / "out", folder)


def compile_without_weights(source: Path, scratch: Path, out: Path, **fields: Any) -> None:
    """Compile a folder that has only config.json; the manifest tells of weight files that somebody has to write.

    Args:
        scratch: where the artifact is made; its weight files are holes and take no room.
        out: gets it without them, and plan.json.
    """
    from llmc.pipeline.compile import write_files
    from llmc.pipeline.levels import LevelCompiler
    from llmc.pipeline.lower import capture_graph, rewrite_graph
    from llmc.pipeline.manifest import manifest_of
    from llmc.pipeline.source import spec_of
    from llmc.pipeline.tuning import known_records
    from llmc.shards import PackedTensor
    from llmc.stages import StageRunner
    from llmc.targets.backend import get_levels
    from llmc.writer import ArtifactWriter

    spec = spec_of(source, None, {**fields, "meta_weights": True, "verify": "off"})
    backend, levels = get_levels(spec.target)
    known = known_records(spec, backend, levels)
    runner = StageRunner(spec)
    with runner, ArtifactWriter(scratch) as writer:
        model, graph = capture_graph(source, spec)
        compiler = LevelCompiler(
            rewrite_graph(graph, spec, model, runner), spec, model, backend, known, runner
        )
        best = compiler.compile(levels[0])
        params = best.step.params
        assert not any(p.expression for p in params), "computed weights have no plan in JSON"
        tensors = [PackedTensor(p.name, p.shape, p.dtype, p.layout_text, p.sources) for p in params]
        with writer.shards(tensors, kind=_holes()) as shards:
            for tensor in tensors:
                shards.write(tensor.name, np.zeros(tensor.nbytes, np.uint8))
        manifest = manifest_of(spec, model, best, (), tuple(shards.entries))
        write_files(writer, best.built, manifest, model, best.tuned.used)
        writer.commit()
    out.mkdir(parents=True)
    for path in scratch.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
    plan = {
        "params": [
            {**{f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name != "expression"},
             "layout_text": p.layout_text}
            for p in params
        ],
        "shapes": {name: list(t.shape) for name, t in model.module.named_parameters()},
        "bytes": sum(t.nbytes for t in tensors),
    }  # fmt: skip
    (out / "plan.json").write_text(json.dumps(plan))


def _holes() -> Any:
    """A ShardWriter whose files have the right headers and sizes and no data: holes, which are neither written nor hashed."""
    from llmc.shards import ShardWriter

    class Holes(ShardWriter):
        def _put(self, raw: bytes | memoryview) -> None:
            assert self._file is not None
            if self._file.tell() == 0:
                super()._put(raw)
                return
            self._file.seek(len(raw), 1)
            self._file.truncate()

    return Holes


# -- what goes along -------------------------------------------------------------------------------------------------------


def runtime_wheels(folder: Path, python: str, told: Told) -> None:
    """TVM's runtime for another Python: its libraries without the compiler, and the wheel of its interface.

    Args:
        python: version there, e.g. ``3.12``.
    """
    import importlib.util

    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    lines = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text().splitlines()
    pins = [part for line in lines for part in line.split('"') if part.startswith("apache-tvm-ffi==")]
    platforms = [f"manylinux_2_{n}_x86_64" for n in (28, 24, 17)] + ["manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "-d", str(wheels), *pins[:1]]
    subprocess.run([*command, *(x for p in platforms for x in ("--platform", p))], check=True)
    spec = importlib.util.find_spec("tvm")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    info = next(root.parent.glob("apache_tvm-*.dist-info"))
    with zipfile.ZipFile(wheels / "tvm_runtime.zip", "w", zipfile.ZIP_DEFLATED) as held:
        for name in _RUNTIME:
            if (root / "lib" / name).is_file():
                held.write(root / "lib" / name, f"tvm/lib/{name}")
        # no code of TVM's: what is looked for is the folder, and the version of the package
        held.writestr("tvm/__init__.py", "")
        held.write(info / "METADATA", f"{info.name}/METADATA")
    for path in sorted(wheels.iterdir()):
        told(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


def sizes_of(folder: Path) -> tuple[int, list[tuple[str, int]]]:
    """(bytes in all, bytes of each of its parts)."""
    parts = [
        (p.name, sum(f.stat().st_size for f in p.rglob("*") if f.is_file())) for p in sorted(folder.iterdir())
    ]
    return sum(size for _, size in parts), parts
