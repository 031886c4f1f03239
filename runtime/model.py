"""load() and Model: what a user of an artifact sees."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np

from llmc import host, knobs
from llmc.artifact import Manifest
from llmc.errors import LlmcError
from llmc.runtime import memory
from llmc.runtime.chat import ChatTemplate, Message, find_chat_template, read_json
from llmc.runtime.checks import ArtifactFiles, open_artifact
from llmc.runtime.device_engine import load_engine
from llmc.runtime.engine import CompiledEngine, Engine, Floats, input_names
from llmc.runtime.generate import TextStream, generate
from llmc.runtime.library import Library, tvm_version, use_threads
from llmc.runtime.pages import PageAllocator, plan_pages, pool_bytes
from llmc.runtime.profile import Profiler
from llmc.runtime.request import Defaults, Stop, make_request
from llmc.runtime.results import GenerateResult, Memory
from llmc.runtime.sequence import Sequence
from llmc.runtime.stepper import Stepper, TokenIds
from llmc.runtime.tokenizer import Tokenizer
from llmc.runtime.weights import Weights

# share of the available memory that the KV cache may take when nothing is said; taken only as it fills
_KV_SHARE = 0.5


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    kv_pages: int | None = None,
    max_memory: int | str | None = None,
    check_hashes: bool = True,
    level: str | None = None,
) -> Model:
    """Load an artifact.

    Args:
        path: the folder that ``llmc compile`` wrote, or its model.so (of several levels: that one alone).
        threads: worker threads; the first load of a process decides. Default: the cores of this machine.
        kv_pages: pages in the KV cache, per group of layers.
        max_memory: bytes (or e.g. "6GB") that weights and KV cache may take together. Default: the cache may grow
            to half of the memory that is available (on a GPU: to 90 % of what weights and step functions leave), and
            never beyond max_batch sequences of max_seq_len tokens.
        check_hashes: compare the sha256 of every file with the manifest's (reads all weights once).
        level: of an artifact with code for several levels of processors, the one to run, e.g. ``x86-64-v3``. Default:
            what LLMC_LEVEL says, else the best that this machine runs.

    Raises:
        LlmcError: damaged or incomplete, compiled for another machine or TVM version, too little memory.
    """
    if kv_pages is not None and max_memory is not None:
        raise LlmcError("memory-options", "Give kv_pages or max_memory, not both.")
    wanted = knobs.level() if level is None else level
    files = open_artifact(Path(path), tvm_version=tvm_version(), check_hashes=check_hashes, level=wanted)
    manifest = files.manifest
    _check_functions(manifest)
    use_threads(threads)
    weights = Weights(files.folder, manifest.params)
    given = None if max_memory is None else parse_bytes(max_memory) - weights.nbytes
    limits = manifest.limits

    def plan(free: int) -> tuple[int, ...]:
        """Pages for the cache, in what was said or in `free` bytes."""
        return plan_pages(
            manifest.kv_plan,
            max_seq_len=limits.max_seq_len,
            max_batch=limits.max_batch,
            max_step_tokens=limits.max_step_tokens,
            kv_pages=kv_pages,
            budget=free if given is None else given,
        )

    engine: Engine
    if files.image is not None:
        image = files.folder / files.image.file
        engine, pages = load_engine(manifest, files.library, image, weights, plan)
    else:
        pages = plan(int(host.available_memory() * _KV_SHARE))
        names = tuple(f.name for f in manifest.functions)
        library = Library(files.library, manifest.target.target)
        engine = CompiledEngine(library, names, weights, manifest.kv_plan, pages)
    return Model(manifest, engine, PageAllocator(manifest.kv_plan, pages, limits.max_seq_len), files)


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text such as "6GB", "512 MiB" or "1.5g"; K, M, G, T are powers of 1024.

    Raises:
        LlmcError: not a size.
    """
    if isinstance(size, int):
        return size
    text = size.strip().lower().removesuffix("b").removesuffix("i")
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(text[-1:], 1)
    try:
        return int(float(text.rstrip("kmgt ")) * factor)
    except (ValueError, OverflowError):
        raise LlmcError(
            "memory-size", f"{size!r} is not a size in bytes.", hint='Write e.g. 6000000000 or "6GB".'
        ) from None


def _check_functions(manifest: Manifest) -> None:
    """There are weights, and the functions' arguments are those that this runtime passes."""
    if not manifest.params:
        raise LlmcError(
            "no-weights",
            "The artifact has no weights: it was compiled for its graph alone.",
            hint="Compile the model without --meta-weights.",
        )
    wanted = input_names(len(manifest.kv_plan.groups))
    by_name = {f.name: [spec.name for spec in f.inputs] for f in manifest.functions}
    if "step" not in by_name or any(found != wanted for found in by_name.values()):
        found = by_name.get("step", sorted(by_name))
        raise LlmcError(
            "function-signature",
            f"The artifact's step functions must take ({', '.join(wanted)}), found ({', '.join(found)}).",
            hint="Compile the model again with this llmc.",
        )


class Model:
    """A loaded model. Several generations may run at a time, also from several threads; their steps take turns.

    Args:
        manifest: what the artifact says about itself.
        engine: runs the compiled functions.
        allocator: pages of the engine's pools.
        files: where the tokenizer's files are; None = none.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        allocator: PageAllocator,
        files: ArtifactFiles | None = None,
    ) -> None:
        self.manifest = manifest
        self._engine = engine
        self._allocator = allocator
        self._stepper = Stepper(
            engine,
            allocator,
            manifest.limits,
            manifest.model.vocab_size,
            [f.name for f in manifest.functions],
        )
        self._tokenizer: Tokenizer | None = None
        self._chat: ChatTemplate | None = None
        config: dict[str, Any] = {}
        if files is not None:
            config = read_json(files.optional("generation_config.json"))
            path = files.optional("tokenizer.json")
            if path is not None:
                self._tokenizer = Tokenizer(
                    path, manifest.model.bos_token_id if manifest.model.add_bos else None
                )
                self._chat = find_chat_template(
                    files.optional("tokenizer_config.json"),
                    files.optional("chat_template.jinja"),
                    files.optional("special_tokens_map.json"),
                )
        self._defaults = Defaults.read(config, manifest.model.eos_token_ids)

    def new_sequence(self) -> Sequence:
        """An empty sequence for step(); free it after use (``with model.new_sequence() as seq:``)."""
        return Sequence(self._allocator)

    def step(self, batch: Seq[tuple[Sequence, TokenIds]], logits: Literal["last", "all"] = "last") -> Floats:
        """Append tokens to sequences: one ragged batch, prompts and single tokens mixed as you like.

        Args:
            batch: each sequence (once) with its new token ids, at least one.
            logits: of the last new token of each sequence, or of all new tokens.

        Returns:
            f32[R, vocab], in the order of the batch.

        Raises:
            LlmcError: see Stepper.step.
        """
        return self._stepper.step(batch, all_rows=logits == "all")

    def logits(self, token_ids: TokenIds, *, prefill: int | None = None) -> Floats:
        """Logits of every token of one sequence.

        Args:
            token_ids: the sequence.
            prefill: the first so many tokens go through `step`, the others one by one through `decode`;
                default all.

        Returns:
            f32[n, vocab].
        """
        return self.logits_batch([token_ids], prefill=None if prefill is None else [prefill])[0]

    def logits_batch(self, batch: Seq[TokenIds], *, prefill: Seq[int] | None = None) -> list[Floats]:
        """logits() of several sequences that run side by side in ragged batches.

        Returns:
            f32[n_i, vocab] for each sequence.
        """
        ids = [self._stepper.check_ids(tokens) for tokens in batch]
        first = [len(x) for x in ids] if prefill is None else list(prefill)
        if len(first) != len(ids) or any(not 1 <= n <= len(x) for n, x in zip(first, ids, strict=True)):
            raise LlmcError(
                "prefill",
                f"prefill must be between 1 and the length of each sequence ({[len(x) for x in ids]}), "
                f"found {first}.",
            )
        sequences = [self.new_sequence() for _ in ids]
        try:
            head = [(seq, x[:n]) for seq, x, n in zip(sequences, ids, first, strict=True)]
            rows = self._stepper.step(head, all_rows=True, function="step")
            out = [[part] for part in np.split(rows, np.cumsum(first)[:-1])]
            for at in range(min(first), max(len(x) for x in ids)):
                going = [i for i, x in enumerate(ids) if first[i] <= at < len(x)]
                if going:
                    tail = [(sequences[i], ids[i][at : at + 1]) for i in going]
                    for i, row in zip(going, self._stepper.step(tail), strict=True):
                        out[i].append(row[None])
            return [np.concatenate(parts) for parts in out]
        finally:
            for seq in sequences:
                seq.free()

    @property
    def has_tokenizer(self) -> bool:
        """False: only token ids go in and come out."""
        return self._tokenizer is not None

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return self._defaults.end_ids

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around one (e.g. a begin token) if asked for.

        Raises:
            LlmcError: the artifact has no tokenizer.
        """
        return self._need_tokenizer().encode(text, special_tokens=special_tokens)

    def detokenize(self, token_ids: TokenIds, *, skip_special_tokens: bool = True) -> str:
        """Text of token ids.

        Raises:
            LlmcError: the artifact has no tokenizer.
        """
        ids = [int(i) for i in token_ids]
        return self._need_tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Seq[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text that the checkpoint's chat template makes of messages (mappings with role and content).

        Raises:
            LlmcError: there is no template, or it refuses the messages.
        """
        if self._chat is None:
            raise LlmcError(
                "no-chat-template",
                "The artifact has no chat template.",
                hint="Give a text prompt; only instruction-tuned checkpoints have a template.",
            )
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    @overload
    def generate(
        self,
        prompt: str | TokenIds | Seq[Message],
        *,
        max_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        min_p: float | None = ...,
        repetition_penalty: float | None = ...,
        seed: int | None = ...,
        stop: Stop = ...,
        stream: Literal[False] = ...,
        logprobs: int | None = ...,
        ignore_eos: bool = ...,
    ) -> GenerateResult: ...

    @overload
    def generate(
        self,
        prompt: str | TokenIds | Seq[Message],
        *,
        max_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        min_p: float | None = ...,
        repetition_penalty: float | None = ...,
        seed: int | None = ...,
        stop: Stop = ...,
        stream: Literal[True],
        logprobs: int | None = ...,
        ignore_eos: bool = ...,
    ) -> TextStream: ...

    def generate(
        self,
        prompt: str | TokenIds | Seq[Message],
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Stop = None,
        stream: bool = False,
        logprobs: int | None = None,
        ignore_eos: bool = False,
    ) -> GenerateResult | TextStream:
        """Continue a prompt.

        Args:
            prompt: text, token ids, or chat messages (mappings with role and content).
            max_tokens: most new tokens; fewer if the sequence's limit comes first.
            temperature: 0 = greedy. Default: what the checkpoint's generation_config.json says, else greedy (else 1
                if top_k, top_p or min_p is given).
            top_k, top_p, min_p, repetition_penalty: see SamplingParams; defaults likewise.
            seed: the same seed gives the same tokens.
            stop: strings (or token ids) that end the text; strings are not part of it.
            stream: return at once; iterate for pieces of text, then read `.result`.
            logprobs: n = log-probabilities of the chosen and of the n likeliest tokens at each place.
            ignore_eos: go on after an end token (for measurements).

        Raises:
            LlmcError: an argument out of its range, prompt too long, pool exhausted, no tokenizer for a text.
        """
        request = make_request(
            self._prompt_ids(prompt),
            limits=self.manifest.limits,
            defaults=self._defaults,
            has_tokenizer=self.has_tokenizer,
            max_tokens=max_tokens,
            sampling={
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
            },
            stop=stop,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        pieces = TextStream(generate(self._stepper, request, self._tokenizer))
        if stream:
            return pieces
        with pieces:
            for _ in pieces:
                pass
        return pieces.result

    def profiler(self) -> Profiler:
        """Times steps kernel by kernel.

        Raises:
            LlmcError: the model's engine is not a compiled one.
        """
        if not isinstance(self._engine, CompiledEngine):
            raise LlmcError("no-profile", "Only a compiled model can be profiled.")
        return Profiler(self._stepper, self._engine.library)

    def memory(self) -> Memory:
        """What the model takes."""
        engine = self._engine.memory()
        rss = memory.process_rss()
        in_use = pool_bytes(self.manifest.kv_plan, self._allocator.used_pages())
        return Memory(
            weights=engine["weights"],
            weights_resident=engine["weights_resident"],
            kv_reserved=engine["kv"],
            kv_resident=engine["kv_resident"],
            kv_in_use=in_use,
            process=rss,
            process_peak=max(rss, memory.peak_rss()),
        )

    def _prompt_ids(self, prompt: str | TokenIds | Seq[Message]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if len(prompt) and isinstance(prompt[0], Mapping):
            text = self.apply_chat_template([m for m in prompt if isinstance(m, Mapping)])
            # a template writes the begin token itself
            return self.tokenize(text, special_tokens=False)
        return [int(i) for i in self._stepper.check_ids(cast(TokenIds, prompt))] if len(prompt) else []

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise LlmcError(
                "no-tokenizer",
                "The artifact has no tokenizer.json, so it takes and gives token ids only.",
                hint="Give a list of token ids as the prompt.",
            )
        return self._tokenizer
