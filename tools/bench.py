"""Speed of llmc's artifacts beside llama.cpp, OpenVINO and transformers on the same random weights, in one run.

    python tools/bench.py --shape llama-1b --quant none,w4a8 --against llama.cpp,openvino,transformers --json out.json
    python tools/bench.py --shape llama-1b --quant none --batch 8 --context 8192      # llmc alone
    python tools/bench.py --check --against llama.cpp,openvino                        # do the peers compute the same?
    python tools/bench.py --prepare --shape llama-1b,qwen-0.5b --quant none,w4a8 --against llama.cpp,openvino

A checkpoint of random weights is made once, in the cache folder. Every peer is installed from pip into an environment
of its own there, and gets the checkpoint in its own format. Each side is a process of its own, so that none's memory
or thread pool disturbs another; they take turns, one round each, and only one computes at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmc import host, knobs  # noqa: E402
from llmc.doctor import cpu_name  # noqa: E402
from llmc.limits import measured_limits  # noqa: E402
from llmc.quant import schemes  # noqa: E402
from tools.bench_sides import check, llmc_side, table  # noqa: E402
from tools.bench_sides.peers import (  # noqa: E402
    PEERS,
    Peer,
    PeerUnavailable,
    converted,
    interpreter,
    peer_weight_bytes,
)
from tools.bench_sides.protocol import Round, SideFailed, Worker  # noqa: E402
from tools.bench_sides.results import Weights, summary  # noqa: E402
from tools.bench_sides.shapes import SHAPES, TORCH_NAMES, checkpoint, prompt_of  # noqa: E402

# seconds between two turns: threads of the side that had its turn stop spinning
_REST = 0.5


def llmc_bits(quant: str, dtype: str) -> int:
    """Bits of llmc's codes: of the scheme, or of the dtype."""
    scheme = schemes.parse(quant.partition("+")[0])
    return scheme.bits if scheme else {"f32": 32, "bf16": 16, "f16": 16}[dtype]


def peer_format(peer: Peer, bits: int) -> str:
    """The peer's format with as many bits.

    Raises:
        PeerUnavailable: it has none.
    """
    if bits not in peer.formats:
        have = ", ".join(f"{b} bits ({name})" for b, name in sorted(peer.formats.items()))
        raise PeerUnavailable(f"{peer.name} has no format of {bits} bits here; it has {have}")
    return peer.formats[bits]


class Case:
    """One shape in one format: what each side loads, and its worker."""

    def __init__(self, shape: str, quant: str, options: argparse.Namespace, cache: Path) -> None:
        self.shape, self.quant, self.options, self.cache = shape, quant, options, cache
        self.model = checkpoint(shape, options.dtype, cache)
        self.bits = llmc_bits(quant, options.dtype)
        self.formats: dict[str, str] = {}
        self.weights: dict[str, Weights] = {}
        self.missing: dict[str, str] = {}
        self._loads: dict[str, tuple[Path, Path]] = {}

    def prepare_peers(self) -> None:
        """Install and convert; a peer that cannot is left out, and why is kept in `missing`."""
        for name in self.options.against:
            peer = PEERS[name]
            try:
                kind = peer_format(peer, self.bits)
                python = interpreter(peer, self.cache)
                folder = converted(peer, python, self.model, kind)
            except PeerUnavailable as e:
                print(f"bench: {e}", file=sys.stderr)
                self.missing[name] = str(e)
                continue
            self.formats[name] = kind if kind != "16" else self.options.dtype
            self.weights[name] = Weights(self.shape, peer_weight_bytes(peer, folder))
            self._loads[name] = (python, folder)

    def compile(self) -> tuple[Path, float]:
        """The artifact and the seconds that compiling took."""
        o = self.options
        artifact = self.cache / f"{self.shape}-{o.dtype}-{self.quant}.artifact"
        longest = max(o.prompt, o.context or 0) + o.tokens
        arguments = ["--dtype", o.dtype, "--target", o.target, "--page-size", str(o.page_size)]
        arguments += ["--max-seq-len", str(max(longest, o.page_size))]
        arguments += [
            "--max-batch",
            str(max(16, o.batch)),
            "--max-step-tokens",
            str(max(o.prompt, 16, o.batch)),
        ]
        if self.quant != schemes.NONE:
            scheme, _, head = self.quant.partition("+")
            arguments += ["--quant", scheme, *(["--quant-head", head] if head else [])]
        seconds = llmc_side.compile_artifact(self.model, artifact, arguments + o.compile_option)
        self.formats["llmc"] = o.dtype if self.quant == schemes.NONE else self.quant
        self.weights["llmc"] = Weights(self.shape, llmc_side.weight_bytes(artifact))
        self._loads["llmc"] = (Path(sys.executable), artifact)
        return artifact, seconds

    def names(self) -> list[str]:
        """Sides that can run, llmc first."""
        return ["llmc", *(name for name in self.options.against if name in self._loads)]

    def start(self, name: str) -> Worker:
        """A worker of that side, loaded."""
        python, folder = self._loads[name]
        module = llmc_side.__name__ if name == "llmc" else PEERS[name].side
        o = self.options
        extra = {"dtype": TORCH_NAMES[o.dtype], "attention": o.attention, "longest": str(o.prompt + o.tokens)}
        return Worker(name, python, module, folder, self.options.threads, extra)


def measure(case: Case) -> dict[str, Any]:
    """Compile, run all sides in turn, and llmc's own modes; the result as plain data."""
    o = case.options
    load = os.getloadavg()[0]
    if load > 0.5:
        # waiting threads of one side lose their core to whatever else runs, which can slow it down manyfold
        print(
            f"bench: this machine is busy (load average {load:.1f}); do not trust the figures",
            file=sys.stderr,
        )
    _, compile_seconds = case.compile()
    prompt = prompt_of(case.shape, o.prompt)
    workers: dict[str, Worker] = {}
    rounds: dict[str, list[Round]] = {}
    limits = measured_limits(o.threads)
    try:
        for name in case.names():
            try:
                workers[name] = case.start(name)
                workers[name].round(prompt, 2)  # first touch of weights, code and pools
                rounds[name] = []
            except SideFailed as e:
                if name == "llmc":
                    raise
                print(f"bench: {e}", file=sys.stderr)
                case.missing[name] = str(e)
        for _ in range(o.rounds):
            for name in rounds:
                time.sleep(_REST)
                rounds[name].append(workers[name].round(prompt, o.tokens))
        own = llmc_modes(workers["llmc"], case)
    finally:
        for worker in workers.values():
            worker.close()
    result: dict[str, Any] = {
        "shape": case.shape,
        "dtype": o.dtype,
        "quant": case.quant,
        "threads": o.threads,
        "prompt": o.prompt,
        "tokens": o.tokens,
        "rounds": o.rounds,
        "attention": o.attention,
        "machine": cpu_name(),
        "features": sorted(f for f in host.features() or () if f.startswith(("avx", "amx", "fma"))),
        "versions": {k: v for name in rounds for k, v in workers[name].versions.items()},
        "load_average": load,
        "compile_seconds": compile_seconds,
        "limits": limits.to_json(),
        "missing": case.missing,
        "sides": {
            name: summary(rounds[name], o.prompt, case.formats[name], case.weights[name], limits)
            for name in rounds
        },
        **own,
    }
    llmc = result["sides"]["llmc"]
    result["ratios"] = {
        name: {key: side[f"{key}_seconds"] / llmc[f"{key}_seconds"] for key in ("prefill", "decode")}
        for name, side in result["sides"].items()
        if name != "llmc"
    }
    return result


def llmc_modes(worker: Worker, case: Case) -> dict[str, Any]:
    """Decode of a batch and after a long context, against the same with one sequence and a prompt of 512."""
    o = case.options
    out: dict[str, Any] = {}
    short = min(512, o.prompt)
    if o.batch > 1:
        many, one = [], []
        for _ in range(o.rounds):
            one += worker.round(prompt_of(case.shape, short), o.tokens).decode
            many += worker.round(prompt_of(case.shape, short), o.tokens, o.batch).decode
        out["batch"] = table.compare_batch(o.batch, one, many)
    if o.context:
        near, far, prefill = [], [], []
        for _ in range(o.rounds):
            near += worker.round(prompt_of(case.shape, short), o.tokens).decode
            done = worker.round(prompt_of(case.shape, o.context), o.tokens)
            far += done.decode
            prefill.append(done.prefill)
        out["context"] = table.compare_context(short, o.context, near, far, prefill, done.peak_rss)
    return out


def main() -> None:
    """Entry point."""
    options = arguments()
    cache = knobs.cache_dir() / "bench"
    if options.check:
        sys.exit(check.run(options.against, options.threads, cache))
    results, cases = [], [(s, q) for s in options.shape for q in options.quant]
    for shape, quant in cases:
        case = Case(shape, quant, options, cache)
        case.prepare_peers()
        if options.prepare:
            print(f"{shape} {quant}: ready in {cache}: {', '.join(sorted(case.formats)) or 'the checkpoint'}")
            continue
        try:
            results.append(measure(case))
        except SideFailed as e:
            sys.exit(f"bench: {e}")
        table.show(results[-1])
        if options.json:  # after every case: an interrupted run keeps what it has
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=_names(SHAPES), default=["tiny"], help=f"of {', '.join(SHAPES)}; a comma list")
    add("--against", type=_names(PEERS), default=[], help=f"peers, a comma list of {', '.join(PEERS)}")
    add(
        "--quant",
        type=_schemes,
        default=["none"],
        help="schemes, a comma list; w4a8+q6g64: the head in another one",
    )
    add("--dtype", choices=TORCH_NAMES, default="bf16", help="of the checkpoint and of what is not quantized")
    add("--prompt", type=int, default=512, help="tokens of the prompt")
    add("--tokens", type=int, default=64, help="tokens to generate per round")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--batch", type=int, default=1, help="also decode so many sequences at a time (llmc alone)")
    add("--context", type=int, default=0, help="also decode after so many tokens (llmc alone)")
    add("--json", type=Path, help="also write the results there")
    add("--prepare", action="store_true", help="install, make and convert only; measure nothing")
    add("--check", action="store_true", help="compare the peers' logits with transformers' on small models")
    add("--attention", choices=("eager", "sdpa"), default="eager", help="transformers' attention")
    add("--target", default="cpu", help="llmc's target")
    add("--page-size", type=int, default=32, help="of llmc's KV cache")
    add(
        "--compile-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more word for llmc compile",
    )
    options = parser.parse_args()
    if min(options.prompt, options.tokens, options.threads, options.rounds, options.batch) < 1:
        parser.error("--prompt, --tokens, --threads, --rounds and --batch must be at least 1")
    if options.context < 0:
        parser.error("--context must not be negative")
    return options


def _schemes(text: str) -> list[str]:
    """``none,w4a8+q6g64`` -> its parts; every scheme in it must be known."""
    parts = text.split(",")
    _names(("none", *schemes.SCHEMES))(",".join(name for part in parts for name in part.split("+")))
    return parts


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        wrong = [name for name in names if name not in known]
        if wrong or not names:
            raise argparse.ArgumentTypeError(
                f"{', '.join(wrong) or 'nothing'} is not one of {', '.join(known)}"
            )
        return names

    return parse


if __name__ == "__main__":
    main()
