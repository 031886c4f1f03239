"""What the inner loops of aarch64 kernels consist of: python tools/inner_loops.py [--target cpu/aarch64-i8mm] [--mca CPU].

Code is generated, not run: for each kernel the loop with the most multiplications is found in LLVM's assembly, and its
instructions are counted by kind. --mca neoverse-n2 adds the cycles that llvm-mca (which must be on PATH) predicts.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from llmc.errors import LlmcError

# multiplications of one instruction on 128-bit registers
MULTIPLIES = {"sdot": 16, "smmla": 32, "bfdot": 8, "bfmmla": 16, "fmla": 4, "fmlal": 4, "fmlal2": 4, "mla": 4}
_LABEL = re.compile(r"^(\.L\w+):")
_FUNCTION = re.compile(r"^(\w[\w.$]*):")
_BRANCH = re.compile(r"^(?:b|b\.\w+|cbn?z|tbn?z)\s+.*?(\.L\w+)$")
_LOADS = ("ld", "prf")
_SHUFFLES = ("zip", "uzp", "trn", "tbl", "ext", "dup", "ins", "mov", "rev")
_CONVERSIONS = ("scvtf", "ucvtf", "fcvt", "bfcvt", "shll", "sshll", "ushll", "xtl", "sxtl", "uxtl")


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        function: that it is in.
        lines: its instructions, operands included.
    """

    function: str
    lines: tuple[str, ...]

    def counts(self) -> Counter[str]:
        """How often each instruction occurs."""
        return Counter(line.split()[0] for line in self.lines)

    @property
    def multiplies(self) -> int:
        """Multiplications of elements in one turn."""
        found = 0
        for line in self.lines:
            name = line.split()[0]
            # scalar multiply-adds, or of half a register, are not what the table counts
            wide = ".4s" in line.split(",")[0]
            found += MULTIPLIES.get(name, 0) if wide else 0
        return found

    @property
    def spills(self) -> tuple[str, ...]:
        """Vector registers that are moved from or to the stack."""
        return tuple(
            line for line in self.lines if re.match(r"(ldr|str|ldp|stp|ldur|stur)\s+[qdsv]\d+.*\[sp", line)
        )

    @property
    def calls(self) -> tuple[str, ...]:
        """Functions that are called."""
        return tuple(line for line in self.lines if re.match(r"blr?\s", line))


def loops(assembly: str) -> Iterator[Loop]:
    """The innermost loops of a text of aarch64 assembly: backward branches over no other backward branch."""
    function, body, labels = "", [], {}  # type: ignore[var-annotated]
    last = -1  # where the last loop that was found ends
    for raw in assembly.splitlines():
        line = raw.split("//")[0].strip()
        if match := _LABEL.match(line):
            labels[match[1]] = len(body)
        elif match := _FUNCTION.match(line):
            function, body, labels, last = match[1], [], {}, -1
        elif line and not line.startswith("."):
            body.append(re.sub(r"\s+", " ", line))
            match = _BRANCH.match(body[-1])
            start = labels.get(match[1]) if match else None
            if start is not None and start > last:
                last = len(body) - 1
                yield Loop(function, tuple(body[start:]))


def hottest(assembly: str, *, least: int = 1) -> list[Loop]:
    """The loops with at least `least` multiplications, the most first."""
    found = [loop for loop in loops(assembly) if loop.multiplies >= least]
    return sorted(found, key=lambda loop: -loop.multiplies)


def densest(assembly: str) -> Loop:
    """The loop with the fewest instructions per multiplication.

    Raises:
        ValueError: no loop multiplies.
    """
    return min(hottest(assembly), key=lambda loop: len(loop.lines) / loop.multiplies)


def cycles(loop: Loop, cpu: str, features: str) -> float:
    """Cycles of one turn as llvm-mca predicts them.

    Raises:
        LlmcError: there is no llvm-mca, or it does not know the processor.
    """
    tool = next(filter(None, map(shutil.which, ("llvm-mca-19", "llvm-mca"))), None)
    if tool is None:
        raise LlmcError("no-mca", "llvm-mca is not on PATH.", hint="apt install llvm-19, or leave out --mca.")
    lines = [line for line in loop.lines if not _BRANCH.match(line)]
    done = subprocess.run(
        [tool, "-mtriple=aarch64", f"-mcpu={cpu}", f"-mattr={features}", "-iterations=200"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    match = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if match is None:
        raise LlmcError("no-mca", f"llvm-mca failed: {done.stderr.strip().splitlines()[:1]}.")
    return int(match[1]) / 200


def kernels(preset: str) -> dict[str, str]:
    """Name -> assembly of the kernels that the table shows."""
    from llmc.quant.schemes import by_name
    from llmc.schedules.attention import AttentionConfig, attention_decode, attention_prefill
    from llmc.schedules.ilinear import int_linear
    from llmc.schedules.linear import LinearConfig, linear
    from llmc.schedules.qlayout import quant_layout
    from llmc.schedules.qlinear import QuantLinearConfig, quant_linear
    from llmc.targets.cpu.backend import capabilities

    caps = capabilities(preset)
    funcs = {}
    for dtype in ("float32", "float16", "bfloat16"):
        funcs[f"linear {dtype}"] = linear(LinearConfig(256, 1024, dtype, dtype, dtype), caps)
    for scheme in ("w8a8", "w4a8"):
        layout = quant_layout(by_name(scheme), 256, 1024, caps)
        funcs[f"linear {scheme}"] = int_linear(QuantLinearConfig(256, layout, "bfloat16", "bfloat16"), caps)
    for scheme in ("q8", "q4g32"):
        layout = quant_layout(by_name(scheme), 256, 1024, caps)
        funcs[f"linear {scheme}"] = quant_linear(QuantLinearConfig(256, layout, "bfloat16", "bfloat16"), caps)
    attention = AttentionConfig(8, 2, 64, 64, "bfloat16", "bfloat16", 32, 2, 0.125)
    funcs["attention of step"] = attention_prefill(attention, caps)
    funcs["attention of decode"] = attention_decode(attention, caps)
    return {name: assembly(caps, func) for name, func in funcs.items()}


def assembly(caps: object, func: object) -> str:
    """LLVM's assembly of one kernel."""
    import tvm

    from llmc.targets.codegen import tir_pipeline
    from llmc.targets.cpu.backend import tvm_target

    module = tvm.IRModule({"k": func.with_attr("global_symbol", "k")})  # type: ignore[attr-defined]
    built = tvm.compile(module, target=tvm_target(caps), tir_pipeline=tir_pipeline())  # type: ignore[arg-type]
    return str(built.mod.inspect_source("s"))


def row(name: str, loop: Loop, cpu: str, features: str) -> str:
    """A line of the table."""
    counts = loop.counts()
    multiply = [n for n in counts if n in MULTIPLIES]
    kinds = " + ".join(f"{counts[n]} {n}" for n in multiply)
    loads = sum(c for n, c in counts.items() if n.startswith(_LOADS))
    moves = sum(c for n, c in counts.items() if n.startswith(_SHUFFLES))
    per = loop.multiplies / len(loop.lines)
    cells = [name, kinds, str(len(loop.lines)), str(loads), str(moves), f"{per:.1f}", str(len(loop.spills))]
    if cpu:
        cells.append(f"{loop.multiplies / cycles(loop, cpu, features):.1f}")
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="cpu/aarch64-i8mm")
    parser.add_argument(
        "--mca", default="", metavar="CPU", help="a processor that llvm-mca knows, e.g. neoverse-n2"
    )
    parser.add_argument("--most", type=int, default=2, help="loops per kernel")
    args = parser.parse_args()
    from llmc.targets.backend import get

    _, caps = get(args.target)
    features = ",".join(caps.mattr)
    head = [
        "kernel",
        "multiplications of one turn",
        "instructions",
        "loads",
        "moves",
        "multiplies per instruction",
        "spills",
    ]
    head += [f"per cycle ({args.mca})"] if args.mca else []
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, text in kernels(args.target.partition("/")[2]).items():
        shown: set[str] = set()
        for loop in hottest(text, least=32):
            kinds = str(sorted((n, c) for n, c in loop.counts().items() if n in MULTIPLIES))
            if kinds in shown or len(shown) >= args.most:
                continue
            shown.add(kinds)
            print(row(name, loop, args.mca, features))
    return 0


if __name__ == "__main__":
    sys.exit(main())
