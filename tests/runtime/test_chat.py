"""Chat templates give the text that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmc.errors import LlmcError
from llmc.runtime.chat import ChatTemplate, find_chat_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  What is 2 + 2? é 🙂"},
    {"role": "assistant", "content": "4", "reasoning": "2 and 2 are 4"},
    {"role": "user", "content": "And 3 + 3?"},
]
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
INST = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}
{% for m in loop_messages %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {% if m['role'] == 'user' %}
        {{ '[INST] ' + (system + '\n\n' if loop.first and system is defined else '') + m['content'] + ' [/INST]' }}
    {% else %}
        {% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""
TOOLS = """{%- set ns = namespace(count=0) -%}
{% if tools is not none %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}
{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.count = ns.count + 1 %}
{{ ns.count }}:{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}"""


@pytest.mark.parametrize("source", [CHATML, INST, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_same_text_as_transformers(source: str, prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers")
    tools = (
        [{"name": "add", "description": "<a> & 'b'", "x": [1, 2.5, None, True]}] if source is TOOLS else None
    )
    want, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=prompt, tools=tools, **SPECIAL
    )
    got = ChatTemplate(source, SPECIAL).render(MESSAGES, add_generation_prompt=prompt, tools=tools)
    assert got == want[0] and len(got) > 40


def test_messages_that_do_not_fit() -> None:
    template = ChatTemplate(INST, SPECIAL)
    with pytest.raises(LlmcError, match=r"roles must alternate.*\[chat-template\]"):
        template.render([MESSAGES[1], MESSAGES[1]])
    bad: list[Any]
    for bad in ([{"content": "hi"}], ["hi"], [{"role": 3, "content": ""}]):
        with pytest.raises(LlmcError, match=r"Chat message 0 must be a mapping.*\[chat-message\]"):
            template.render(bad)
    with pytest.raises(LlmcError, match="chat-template"):
        template.render([{"role": "user", "content": None}])
    with pytest.raises(LlmcError, match=r"not valid.*\[chat-template\]"):
        ChatTemplate("{% if %}", {})


def test_templates_run_in_a_sandbox() -> None:
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ):
        with pytest.raises(LlmcError, match="chat-template"):
            ChatTemplate(source, {}).render([{"role": "user", "content": ""}])

    class Loaded(str):
        def boom(self) -> str:
            return "boom"

    message = {"role": "user", "content": Loaded("hi"), "image": object()}
    text = ChatTemplate("{{ messages[0].content.boom is defined }} {{ messages[0].image }}", {}).render(
        [message]
    )
    assert text == "False <object>"


def test_where_templates_come_from(tmp_path: Path) -> None:
    config, file, tokens = (
        tmp_path / "tokenizer_config.json",
        tmp_path / "chat_template.jinja",
        tmp_path / "m.json",
    )
    message = [{"role": "user", "content": "x"}]

    def text(template: ChatTemplate | None) -> str:
        assert template is not None
        return template.render(message)

    assert find_chat_template(None, None, None) is None
    config.write_text(json.dumps({"bos_token": {"content": "<b>"}}))
    assert find_chat_template(config, None, None) is None
    source = "{{ bos_token }}{{ eos_token }}C"
    config.write_text(json.dumps({"bos_token": {"content": "<b>"}, "chat_template": source}))
    tokens.write_text(json.dumps({"bos_token": "<old>", "eos_token": "<e>"}))
    assert text(find_chat_template(config, None, tokens)) == "<b><e>C"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert text(find_chat_template(config, None, tokens)) == "D"
    file.write_text("F")
    assert text(find_chat_template(config, file, None)) == "F"
    config.write_text("{")
    with pytest.raises(LlmcError, match=r"tokenizer_config.json cannot be read.*\[file-unreadable\]"):
        find_chat_template(config, None, None)
