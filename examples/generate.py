"""Compile the demo model if need be, then generate: greedy, sampled and streamed, and several prompts in one batch.

python examples/generate.py
"""

from __future__ import annotations

from pathlib import Path

import llmc

HERE = Path(__file__).resolve().parent
ARTIFACT = HERE.parent / "dist" / "demo"


def main() -> None:
    if not (ARTIFACT / "manifest.json").exists():
        llmc.compile(HERE / "models" / "stdlib-llama", ARTIFACT, target="cpu")
    model = llmc.load(ARTIFACT)

    print("--- greedy, streamed")
    prompt = "def read_file(path):"
    stream = model.generate(prompt, max_tokens=48, temperature=0, stream=True)
    print(prompt, end="")
    for piece in stream:
        print(piece, end="", flush=True)
    print(f"\n[{stream.result.timings.decode_tokens_per_second:.0f} tokens per second]")

    print("--- sampled; the same seed gives the same text")
    result = model.generate(
        "import os\n", max_tokens=32, temperature=0.8, top_p=0.9, seed=7, stop="\n\n", logprobs=0
    )
    print(result.text)
    assert result.logprobs is not None
    print(f"[mean log-probability {sum(t.logprob for t in result.logprobs) / len(result.logprobs):.2f}]")

    print("--- one step over two sequences of different lengths")
    prompts = ["class Reader:\n    def ", "for i in range("]
    with model.new_sequence() as first, model.new_sequence() as second:
        batch = [(first, model.tokenize(prompts[0])), (second, model.tokenize(prompts[1]))]
        logits = model.step(batch)  # f32 [2, vocabulary]: of the last token of each
        for text, row in zip(prompts, logits, strict=True):
            print(f"{text!r} -> {model.detokenize([int(row.argmax())])!r}")


if __name__ == "__main__":
    main()
