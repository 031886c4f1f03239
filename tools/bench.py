"""Prefill and decode speed of an artifact, against transformers on the same weights, in one run.

    python tools/bench.py --shape llama-1b --against transformers --threads 2 --json out.json

A model of random weights is made once (in the cache folder) and compiled. Each side is a process of its own, so that
neither's memory or thread pool disturbs the other; they take turns, one round each, and only one computes at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# transformers configs; llama-1b has the shape of Llama-3.2-1B, qwen-0.5b that of Qwen2.5-0.5B
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(
        model_type="llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "qwen-0.5b": dict(
        model_type="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        model_type="llama",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
}
TORCH_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Round:
    """One prompt and its continuation.

    Attributes:
        prefill: seconds until the logits of the prompt's last token.
        decode: seconds per token, of each generated token.
    """

    prefill: float
    decode: list[float]


class Side(Protocol):
    """Something that runs a model; lives in a worker process."""

    def round(self, prompt: list[int], tokens: int) -> Round:
        """Prefill `prompt`, then feed back the likeliest token `tokens` times."""
        ...

    def versions(self) -> dict[str, str]:
        """What ran it."""
        ...


class LlmcSide:
    """An artifact through llmc's runtime."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llmc

        self._model = llmc.load(options.artifact, threads=options.threads, check_hashes=False)

    def round(self, prompt: list[int], tokens: int) -> Round:
        with self._model.new_sequence() as sequence:
            start = time.perf_counter()
            logits = self._model.step([(sequence, prompt)])
            prefill = time.perf_counter() - start
            decode = []
            for _ in range(tokens):
                start = time.perf_counter()
                logits = self._model.step([(sequence, [int(logits[0].argmax())])])
                decode.append(time.perf_counter() - start)
        return Round(prefill, decode)

    def versions(self) -> dict[str, str]:
        manifest = self._model.manifest
        return {"llmc": manifest.llmc_version, "tvm": manifest.tvm_version, "preset": manifest.target.preset}


class TransformersSide:
    """The same checkpoint through transformers and torch on the CPU, eagerly."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        torch.set_grad_enabled(False)
        dtype = getattr(torch, TORCH_NAMES[options.dtype])
        self._torch, self._transformers = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, attn_implementation=options.attention
        ).eval()

    def round(self, prompt: list[int], tokens: int) -> Round:
        ids = self._torch.tensor([prompt])
        start = time.perf_counter()
        out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        decode = []
        for _ in range(tokens):
            start = time.perf_counter()
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(
                input_ids=ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
            )
            decode.append(time.perf_counter() - start)
        return Round(prefill, decode)

    def versions(self) -> dict[str, str]:
        return {"torch": self._torch.__version__, "transformers": self._transformers.__version__}


SIDES = {"llmc": LlmcSide, "transformers": TransformersSide}


class Worker:
    """A side in a process of its own, spoken to in lines of JSON."""

    def __init__(self, name: str, options: argparse.Namespace, model: Path, artifact: Path) -> None:
        self.name = name
        command = [
            sys.executable,
            __file__,
            "--worker",
            name,
            "--shape",
            options.shape,
            "--dtype",
            options.dtype,
        ]
        command += ["--threads", str(options.threads), "--attention", options.attention]
        command += ["--model", str(model), "--artifact", str(artifact)]
        threads = str(options.threads)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TVM_NUM_THREADS": threads,
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def round(self, prompt: list[int], tokens: int) -> tuple[Round, int]:
        """(times, peak resident bytes of the process)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return Round(answer["prefill"], answer["decode"]), answer["peak_rss"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(
            f"bench: the {self.name} side ended with code {self._process.wait()}; see its output above"
        )


def worker(options: argparse.Namespace) -> None:
    """Body of a worker process: answer rounds until stdin ends."""
    from llmc.runtime.memory import peak_rss

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    side: Side = SIDES[options.worker](options)
    print(json.dumps({"versions": side.versions()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        done = side.round(request["prompt"], request["tokens"])
        print(json.dumps({**asdict(done), "peak_rss": peak_rss()}), file=answers, flush=True)


def make_model(shape: str, dtype: str, folder: Path, layers: int = 0) -> None:
    """Write a Hugging Face folder with random weights, unless it is there already; `layers` instead of the shape's."""
    if (folder / "config.json").exists():
        return
    import torch
    import transformers

    print(f"bench: making random weights in {folder}", file=sys.stderr)
    torch.manual_seed(0)
    values = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    config = transformers.AutoConfig.for_model(**values, bos_token_id=0, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, TORCH_NAMES[dtype]))
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def compile_artifact(options: argparse.Namespace, model: Path, artifact: Path) -> float:
    """Compile `model`; seconds that it took."""
    start = time.perf_counter()
    longest = max(options.prompt + options.tokens, options.page_size)
    command = [
        sys.executable,
        "-m",
        "llmc",
        "compile",
        str(model),
        "-o",
        str(artifact),
        "--dtype",
        options.dtype,
    ]
    command += ["--target", options.target, "--verify", "off", "--page-size", str(options.page_size)]
    command += ["--max-seq-len", str(longest), "--max-step-tokens", str(max(options.prompt, 16)), "--quiet"]
    subprocess.run(command, check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def in_process(function: str, *arguments: str) -> None:
    """Run a function of this file in a process of its own: torch's memory goes back to the system afterwards."""
    code = f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench"
    code += f"; bench.{function}(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdin=subprocess.DEVNULL)


def summary(rounds: list[tuple[Round, int]], prompt: int) -> dict[str, float]:
    """Medians of one side."""
    prefill = statistics.median(r.prefill for r, _ in rounds)
    decode = statistics.median(s for r, _ in rounds for s in r.decode)
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": prompt / prefill,
        "decode_seconds": decode,
        "decode_tokens_per_second": 1 / decode,
        "peak_rss_bytes": max(rss for _, rss in rounds),
    }


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Make, compile, measure; the result as plain data."""
    from llmc import host, knobs
    from llmc.doctor import cpu_name

    cache = knobs.cache_dir() / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    model = cache / f"{options.shape}-{options.dtype}"
    artifact = cache / f"{options.shape}-{options.dtype}.artifact"
    if not (model / "config.json").exists():
        in_process("make_model", options.shape, options.dtype, str(model))
    load = os.getloadavg()[0]
    if load > 0.5:
        # waiting threads of one side lose their core to whatever else runs, which can slow it down manyfold
        print(
            f"bench: this machine is busy (load average {load:.1f}); do not trust the figures",
            file=sys.stderr,
        )
    compile_seconds = compile_artifact(options, model, artifact)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    # fixed, and spread over the vocabulary, so that embedding rows are not all in the cache
    prompt = [(7919 * (i + 1)) % vocabulary for i in range(options.prompt)]
    names = ["llmc", *([options.against] if options.against else [])]
    workers: list[Worker] = []
    rounds: dict[str, list[tuple[Round, int]]] = {name: [] for name in names}
    versions: dict[str, str] = {}
    try:
        for name in names:
            workers.append(Worker(name, options, model, artifact))
            versions |= workers[-1].versions
        for w in workers:  # first touch of weights, code and pools
            w.round(prompt, 2)
        for _ in range(options.rounds):
            for w in workers:
                rounds[w.name].append(w.round(prompt, options.tokens))
    finally:
        for w in workers:
            w.close()
    sides = {name: summary(rounds[name], options.prompt) for name in names}
    result: dict[str, Any] = {
        "shape": options.shape,
        "dtype": options.dtype,
        "threads": options.threads,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "attention": options.attention,
        "machine": cpu_name(),
        "features": sorted(f for f in host.features() or () if f.startswith(("avx", "amx", "fma"))),
        "versions": versions,
        "load_average": load,
        "compile_seconds": compile_seconds,
        "sides": sides,
    }
    if options.against:
        other = sides[options.against]
        result["ratios"] = {
            "prefill": other["prefill_seconds"] / sides["llmc"]["prefill_seconds"],
            "decode": other["decode_seconds"] / sides["llmc"]["decode_seconds"],
        }
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{result['shape']} {result['dtype']}, {result['threads']} threads, prompt {result['prompt']}, "
        f"{result['rounds']} rounds of {result['tokens']} tokens, medians; {result['machine']}"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in ("prefill tok/s", "decode tok/s", "peak RSS MiB"):
        table.add_column(column, justify="right")
    for name, side in result["sides"].items():
        table.add_row(
            name,
            f"{side['prefill_tokens_per_second']:.1f}",
            f"{side['decode_tokens_per_second']:.2f}",
            f"{side['peak_rss_bytes'] / 2**20:.0f}",
        )
    if "ratios" in result:
        table.add_row("ratio", f"{result['ratios']['prefill']:.2f}", f"{result['ratios']['decode']:.2f}", "")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"compiled in {result['compile_seconds']:.1f} s; {result['versions']}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--against", choices=("transformers",), help="measure this too, taking turns")
    parser.add_argument("--dtype", choices=TORCH_NAMES, default="bf16")
    parser.add_argument(
        "--attention", choices=("eager", "sdpa"), default="eager", help="transformers' attention"
    )
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate per round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--artifact", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    if min(options.prompt, options.tokens, options.threads, options.rounds) < 1:
        parser.error("--prompt, --tokens, --threads and --rounds must be at least 1")
    result = bench(options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
