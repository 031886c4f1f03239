"""OpenVINO's CPU plugin on an exported stateful model; runs in its own environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Side:
    """See protocol.Side; `model` is the exported folder."""

    def __init__(self, model: Path, threads: int, options: dict[str, str]) -> None:
        import numpy as np
        import openvino as ov

        self._np, self._ov = np, ov
        graph = ov.Core().read_model(str(model / "openvino_model.xml"))
        last_token_only(graph)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._compiled = ov.Core().compile_model(graph, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._inputs = {name for port in self._compiled.inputs for name in port.names}
        self._length = 0

    def start(self, prompt: list[int], batch: int) -> Any:
        self._request.reset_state()
        self._length = 0
        return self._run([prompt] * batch)

    def step(self, tokens: list[int]) -> Any:
        return self._run([[t] for t in tokens])

    def versions(self) -> dict[str, str]:
        used = {
            "openvino computes in": "INFERENCE_PRECISION_HINT",
            "openvino KV cache": "KV_CACHE_PRECISION",
        }
        chosen = {
            words: self._compiled.get_property(name).get_type_name()  # e.g. bf16, u8
            for words, name in used.items()
        }
        return {"openvino": self._ov.get_version().split("-")[0], **chosen}

    def _run(self, ids: list[list[int]]) -> Any:
        np = self._np
        batch, new = len(ids), len(ids[0])
        end = self._length + new
        feed = {
            "input_ids": np.array(ids, np.int64),
            "attention_mask": np.ones((batch, end), np.int64),
            "position_ids": np.arange(self._length, end, dtype=np.int64)[None].repeat(batch, 0),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self._request.infer({k: v for k, v in feed.items() if k in self._inputs}, share_inputs=True)
        self._length = end
        return self._request.get_tensor("logits").data[:, -1]


def last_token_only(graph: Any) -> None:
    """Let the output projection see the last token only, as every other side does.

    The exported graph computes the logits of the whole prompt.
    """
    from openvino import opset13 as ops

    node = graph.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input_value(0)
    last = ops.slice(rows, start=[-1], stop=[2**31 - 1], step=[1], axes=[1])
    node.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()
