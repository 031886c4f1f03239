"""Chat templates: messages to the text that the model was trained on.

The environment is that of transformers' apply_chat_template, so that a checkpoint's template gives the same text.
Templates are code from a checkpoint: they run in jinja2's sandbox and see plain values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError

Message = Mapping[str, Any]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A checkpoint's chat template.

    Args:
        source: jinja2 text.
        special_tokens: e.g. bos_token; templates name them.

    Raises:
        LlmcError: not a jinja2 template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise LlmcError("chat-template", f"The chat template is not valid: {e}.") from None
        self._special = dict(special_tokens)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: further variables of the template, e.g. tools.

        Raises:
            LlmcError: the messages are not messages, or the template refuses them.
        """
        import jinja2

        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise LlmcError(
                    "chat-message",
                    f'Chat message {number} must be a mapping such as {{"role": "user", "content": "Hi"}}, '
                    f"found {message!r}.",
                )
        known = {"tools": None, "documents": None, **self._special, **variables}
        try:
            return self._template.render(
                messages=[_with_reasoning(_plain(m)) for m in messages],
                add_generation_prompt=add_generation_prompt,
                **_plain(known),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as e:
            raise LlmcError("chat-template", f"The chat template refuses these messages: {e}.") from None


def find_chat_template(
    config: Path | None, template: Path | None, tokens: Path | None
) -> ChatTemplate | None:
    """The template of an artifact, or None.

    Args:
        config: tokenizer_config.json; its field chat_template is a text or a list of named ones.
        template: chat_template.jinja, which goes first.
        tokens: special_tokens_map.json, for what the configuration does not name.
    """
    settings = read_json(config)
    special = {**_special_tokens(read_json(tokens)), **_special_tokens(settings)}
    if template is not None:
        return ChatTemplate(template.read_text(encoding="utf-8"), special)
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    return ChatTemplate(source, special) if isinstance(source, str) else None


def read_json(path: Path | None) -> dict[str, Any]:
    """An object in a JSON file; empty for None.

    Raises:
        LlmcError: not JSON, or no object.
    """
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise LlmcError("file-unreadable", f"{path} cannot be read: {e}.") from None
    if not isinstance(value, dict):
        raise LlmcError("file-unreadable", f"{path} must hold a JSON object.")
    return value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _plain(value: Any) -> Any:
    """Only plain JSON values go into a template: other objects have methods that the sandbox knows nothing about."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read an assistant's reasoning under one of several names; fill those that transformers fills."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[n] for n in names if message.get(n) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _generation_tag() -> Any:
    """``{% generation %}…{% endgeneration %}`` marks an assistant's words for training; here it only passes on."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2 reads a plain class attribute

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag
