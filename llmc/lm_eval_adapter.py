"""An artifact as a model of lm-evaluation-harness (the package lm_eval), for its standard tasks.

    python -m llmc.lm_eval_adapter --model llmc --model_args artifact=dist/demo --tasks lambada_openai

takes lm_eval's own options. In Python, importing this module registers the model:

    import lm_eval, llmc.lm_eval_adapter
    lm_eval.simple_evaluate(model="llmc", model_args="artifact=dist/demo", tasks=["lambada_openai"])
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmc.errors import LlmcError
from llmc.runtime.model import Model, load
from llmc.runtime.sampler import SamplingParams
from llmc.scoring import Continuation, Generation, generate_until, loglikelihoods, rolling, split_pair

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as e:
    if (e.name or "").partition(".")[0] != "lm_eval":
        raise
    MISSING = "llmc: lm-evaluation-harness is not installed. Run pip install lm_eval. [no-lm-eval]"
    if __name__ == "__main__":
        print(MISSING, file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(MISSING, name="lm_eval") from None

# new tokens where a task does not say how many
_MAX_TOKENS = 256
# names of that option
_MAX_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("llmc")
class LlmcLM(LM):
    """A loaded artifact.

    Args:
        artifact: folder that llmc compile wrote.
        batch_size: most sequences side by side; "auto" = the artifact's limit.
        threads: worker threads.
        max_memory: see llmc.load.
        max_batch_size, device: given by lm_eval, without effect here.

    Raises:
        LlmcError: see llmc.load; an artifact without a tokenizer.
    """

    def __init__(
        self,
        artifact: str,
        batch_size: int | str | None = None,
        threads: int | str | None = None,
        max_memory: str | None = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.model = load(artifact, threads=None if threads is None else int(threads), max_memory=max_memory)
        if not self.model.has_tokenizer:
            raise LlmcError("no-tokenizer", f"{artifact} has no tokenizer, and the tasks are texts.")
        number = batch_size is not None and str(batch_size).isdigit()
        self.batch: int | None = max(1, int(str(batch_size))) if number else None
        self.prefix = prefix_token(self.model)

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's caches."""
        return self.model.manifest.model.source.replace("/", "__")

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return self.model.manifest.limits.max_seq_len

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) of (context, continuation) pairs."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        with _Bar(len(pairs), "loglikelihood", disable_tqdm) as bar:
            scores = loglikelihoods(self.model, pairs, batch=self.batch, progress=bar.update)
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, every token scored once."""
        pieces: list[Continuation] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            ids = self.model.tokenize(request.args[0], special_tokens=False)
            parts = rolling(ids, self.prefix, self.max_length)
            pieces += parts
            owner += [i] * len(parts)
        with _Bar(len(pieces), "loglikelihood_rolling", disable_tqdm) as bar:
            scores = loglikelihoods(self.model, pieces, batch=self.batch, progress=bar.update)
        totals = [0.0] * len(requests)
        for i, score in zip(owner, scores, strict=True):
            totals[i] += score.logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of (context, options) up to one of the strings in options["until"]."""
        wanted = []
        for request in requests:
            context, options = request.args
            wanted.append(generation(self.encode(context) or [self.prefix], options))
        with _Bar(len(wanted), "generate_until", disable_tqdm) as bar:
            return generate_until(self.model, wanted, batch=self.batch, progress=bar.update)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text that the checkpoint's chat template makes of messages."""
        return self.model.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def encode(self, text: str) -> list[int]:
        """Tokens with what the tokenizer puts before a text, once: a template may have written it already."""
        begin = self.model.detokenize([self.prefix], skip_special_tokens=False)
        return self.model.tokenize(text, special_tokens=not (begin and text.startswith(begin)))

    def encode_pair(self, context: str, continuation: str) -> Continuation:
        """Tokens of a context and of its continuation; spaces between them belong to the continuation.

        The two are tokenized together, because a tokenizer may treat a word differently at the start of a text. An
        empty context becomes the begin (or else end) token.
        """
        if not context:
            ids = self.model.tokenize(continuation, special_tokens=False)
            if ids[:1] == [self.prefix] and len(ids) > 1:
                return Continuation((self.prefix,), tuple(ids[1:]))
            return Continuation((self.prefix,), tuple(ids))
        bare = context.rstrip()
        pair = split_pair(self.encode(bare), self.encode(context + continuation))
        return pair if pair.context else Continuation((self.prefix,), pair.tokens)


def prefix_token(model: Model) -> int:
    """What the first token of a text is predicted from: the model's begin token, else its end token."""
    info = model.manifest.model
    if info.bos_token_id is not None:
        return info.bos_token_id
    if info.eos_token_ids:
        return info.eos_token_ids[0]
    raise LlmcError(
        "no-begin-token",
        f"{info.source} names neither a begin nor an end token, so the first token of a text cannot be scored.",
        hint="Add bos_token_id to the checkpoint's config.json and compile again.",
    )


def generation(prompt: Sequence[int], options: dict[str, Any]) -> Generation:
    """A task's generation options in llmc's terms; greedy unless the task samples."""
    until = options.get("until") or []
    most = next((int(options[name]) for name in _MAX_NAMES if options.get(name) is not None), _MAX_TOKENS)
    sampling: dict[str, Any] = {}
    if options.get("do_sample") is not False and float(options.get("temperature") or 0) > 0:
        names = ("temperature", "top_k", "top_p", "min_p")
        sampling = {name: options[name] for name in names if options.get(name) is not None}
        sampling["seed"] = int(options.get("seed") or 0)
    if options.get("repetition_penalty") is not None:
        sampling["repetition_penalty"] = options["repetition_penalty"]
    return Generation(
        tuple(prompt), most, (until,) if isinstance(until, str) else tuple(until), SamplingParams(**sampling)
    )


class _Bar:
    """tqdm's progress bar, as lm_eval's own models show."""

    def __init__(self, total: int, name: str, disable: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=name, disable=disable)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        self._bar.update(count)


def main() -> None:
    """lm_eval's own command line, with the model llmc known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
