"""llama.cpp through the C interface of llama-cpp-python; runs in its own environment."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

# tokens that one call computes
STEP = 512


class Side:
    """See protocol.Side; `model` is the folder with model.gguf. Option: longest, tokens of the longest sequence."""

    def __init__(self, model: Path, threads: int, options: dict[str, str]) -> None:
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(model / "model.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = int(options.get("longest", 1024)), STEP, STEP
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def start(self, prompt: list[int], batch: int) -> Any:
        if batch != 1:
            raise SystemExit("the llama.cpp side runs one sequence at a time")
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        for at in range(0, len(prompt), STEP):
            self._decode(prompt[at : at + STEP])
        return self._logits()

    def step(self, tokens: list[int]) -> Any:
        self._decode(tokens)
        return self._logits()

    def versions(self) -> dict[str, str]:
        info = self._lib.llama_print_system_info().decode()
        on = [part.split("=")[0].strip() for part in info.split("|") if part.strip().endswith("= 1")]
        return {
            "llama-cpp-python": metadata.version("llama-cpp-python"),
            "llama.cpp features": " ".join(on),
        }

    def _decode(self, tokens: list[int]) -> None:
        ids = (self._lib.llama_token * len(tokens))(*tokens)
        code = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(ids, len(tokens)))
        if code:
            raise SystemExit(f"llama_decode failed with code {code}")

    def _logits(self) -> Any:
        import numpy as np

        row = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (self._vocabulary,))[None]
