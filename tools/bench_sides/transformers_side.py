"""The checkpoint through transformers and torch on the CPU, eagerly, in its own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Side:
    """See protocol.Side; `model` is the checkpoint's folder. Options: dtype (as torch names it), attention."""

    def __init__(self, model: Path, threads: int, options: dict[str, str]) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._transformers = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, options["dtype"]), attn_implementation=options["attention"]
        ).eval()
        self._past: Any = None

    def start(self, prompt: list[int], batch: int) -> Any:
        self._past = None
        return self._run([prompt] * batch)

    def step(self, tokens: list[int]) -> Any:
        return self._run([[t] for t in tokens])

    def versions(self) -> dict[str, str]:
        return {"torch": self._torch.__version__, "transformers": self._transformers.__version__}

    def _run(self, ids: list[list[int]]) -> Any:
        out = self._model(
            input_ids=self._torch.tensor(ids), past_key_values=self._past, use_cache=True, logits_to_keep=1
        )
        self._past = out.past_key_values
        return out.logits[:, -1].float().numpy()
