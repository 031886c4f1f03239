"""Sentences for models that torch.export cannot trace, or traces for some lengths only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmc.errors import LlmcError
from llmc.frontend.import_base import module_path

_RECURRENT = frozenset(
    ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding", "moe_mamba")
)


def refuse_recurrent(model: torch.nn.Module, layers: Mapping[str, torch.nn.Module]) -> None:
    """Refuse by the config before minutes are spent on tracing a scan step by step.

    Args:
        layers: the decoder layers by path, to name the first that is meant.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if not isinstance(kinds, list | tuple):
            continue
        found = sorted({k for k in kinds if k in _RECURRENT})
        if found:
            first = next(i for i, kind in enumerate(kinds) if kind in _RECURRENT)
            where = ""
            if len(layers) == len(kinds):
                path, layer = list(layers.items())[first]
                where = f" (the first is {path}, {type(layer).__name__})"
            raise _recurrent_error(model, f"layers of the kind {', '.join(found)}{where}", {})


def trace_error(model: torch.nn.Module, error: Exception) -> LlmcError:
    """What to tell about a model that torch.export cannot trace for every length."""
    facts: dict[str, object] = {"error": str(error)}
    if getattr(model, "_is_stateful", False):  # transformers' mark of classes with a state besides attention
        where = _failing_module(model, error)
        return _recurrent_error(model, f"recurrent layers{f', such as {where}' if where else ''}", facts)
    where = _failing_module(model, error) or type(model).__name__
    if type(error).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException"):
        return LlmcError(
            "data-dependent",
            f"{where} looks at the values of a tensor to decide what to compute next (or how much of it), which has no "
            f"meaning before there are tokens{_place(_forward_line(model, error))}.",
            hint="Mixtures of experts are supported where the model uses transformers' ExpertsInterface.",
            context=facts,
        )
    line = next((line for _, line in _guards(error)), "")
    if "Constraints violated" in str(error):
        return LlmcError(
            "length-dependent",
            f"{type(model).__name__} uses the length of the sequence as a Python number{_place(line)}, so that its graph "
            "holds for one length only.",
            context=facts,
        )
    text = str(error).strip().splitlines()
    return LlmcError(
        "trace-failed",
        f"torch.export cannot trace {where} for every length: {type(error).__name__}: {text[0] if text else ''}",
        context=facts,
    )


def check_range(program: Any, limit: int) -> None:
    """The traced branches have to be those of every length from 1 (2 for torch) to the limit.

    Raises LlmcError("length-dependent") with the line of the source that decides by the length.
    """
    for allowed in program.range_constraints.values():
        lower, upper = int(allowed.lower), allowed.upper
        if lower > 2 or (upper.is_number and upper < min(limit, 2**30)):
            line = next((line for test, line in _program_guards(program) if _ends(test, lower, upper)), "")
            line = line or _blocks(program)
            raise LlmcError(
                "length-dependent",
                f"The model computes differently for lengths outside of {lower} to {upper}{_place(line)}, and is made for "
                f"up to {limit}.",
                hint=f"Compile it for at most {upper} tokens (--max-seq-len {upper})."
                if lower <= 2
                else "Such a model cannot be compiled for every length at once.",
                context={"line": line},
            )


def _ends(condition: Any, lower: int, upper: Any) -> bool:
    """Whether a condition on the length no longer holds just outside of the range."""
    lengths = [lower - 1, int(upper) + 1] if upper.is_number else [lower - 1]
    values = (condition.subs(dict.fromkeys(condition.free_symbols, n)) for n in lengths)
    return any(value == False for value in values)  # noqa: E712  (sympy's false)


def _blocks(program: Any) -> str:
    """The first module that divides the length by something, and so works on blocks of the sequence."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for size in (value, *getattr(value, "shape", ())):
            if isinstance(size, torch.SymInt) and ("//" in str(size) or "Mod" in str(size)):
                path = module_path(node, "model")
                return f"{path or 'the model'} works on blocks of the sequence, in {node.target}"
    return ""


def _recurrent_error(model: torch.nn.Module, what: str, facts: Mapping[str, object]) -> LlmcError:
    return LlmcError(
        "token-mixing-not-captured",
        f"{type(model).__name__} has {what}, which carry a state from token to token; "
        "only attention is supported yet.",
        context=facts,
    )


def _place(line: str) -> str:
    return f" ({line})" if line else ""


def _guards(error: BaseException) -> list[tuple[Any, str]]:
    """Decisions by the length that torch.export had made when it failed: (condition, line of the source)."""
    trace = error.__traceback__
    while trace is not None:
        env = getattr(trace.tb_frame.f_locals.get("fake_mode"), "shape_env", None)
        if env is not None:
            return _guard_lines(env)
        trace = trace.tb_next
    return []


def _program_guards(program: Any) -> list[tuple[Any, str]]:
    for node in program.graph.nodes:
        for size in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(size, torch.SymInt):
                return _guard_lines(size.node.shape_env)
    return []


def _guard_lines(env: Any) -> list[tuple[Any, str]]:
    found = []
    for guard in env.guards:
        frame: Any = getattr(guard.sloc, "framework_loc", None)
        if hasattr(frame, "filename") and not _in_torch(frame.filename):
            found.append((guard.expr, f"{Path(frame.filename).name}:{frame.lineno}, {frame.name}"))
    return found


def _forward_line(model: torch.nn.Module, error: BaseException) -> str:
    """The innermost line of a module's own method that was running when the error was raised."""
    modules = {id(module) for module in model.modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if id(trace.tb_frame.f_locals.get("self")) in modules and not _in_torch(code.co_filename):
            found = f"{Path(code.co_filename).name}:{trace.tb_lineno}, {code.co_name}"
        trace = trace.tb_next
    return found


def _in_torch(filename: str) -> bool:
    return Path(torch.__file__).parent in Path(filename).parents


def _failing_module(model: torch.nn.Module, error: BaseException) -> str:
    """Path and class of the innermost module whose forward was running when the error was raised."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if id(owner) in paths:
            found = f"{paths[id(owner)] or 'the model'} ({type(owner).__name__})"
        trace = trace.tb_next
    return found
