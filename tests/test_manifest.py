"""The manifest's schema number: raised with every change of the fields; other numbers are refused with a sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing

import pytest

import llmc
from llmc.artifact import OLDEST, SCHEMA, Limits, Manifest
from llmc.errors import LlmcError
from llmc.kv_plan import KVGroup, KVKind
from tests.runtime.conftest import toy_manifest

# schema number -> digest of the fields. Fields changed? Raise SCHEMA in llmc/artifact.py and replace this line.
FIELDS = {4: "9a9c514b3116a288"}


def fields_of(kind: object, seen: dict[str, list[str]]) -> None:
    """All dataclasses that a type reaches -> "field: type" lines in order."""
    for part in typing.get_args(kind):
        fields_of(part, seen)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__name__ not in seen:
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        seen[kind.__name__] = [f"{name}: {hints[name]}" for name in names]
        for name in names:
            fields_of(hints[name], seen)


def test_new_fields_have_a_new_number() -> None:
    seen: dict[str, list[str]] = {}
    fields_of(Manifest, seen)
    assert {"Manifest", "KVGroup", "TextQuality"} <= set(seen)
    digest = hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]
    assert {SCHEMA: digest} == FIELDS, (
        "the manifest's fields changed: raise SCHEMA (docs/design/004-artifact.md)"
    )


@pytest.mark.parametrize(
    ("number", "age"), [(SCHEMA + 1, "a newer"), (OLDEST - 1, "an older"), (0, "an older")]
)
def test_other_numbers_are_refused_by_one_sentence(number: int, age: str) -> None:
    """Whatever else is in it: fields of another schema are not looked at."""
    text = json.dumps({"schema": number, "llmc_version": "7.8", "files": 3})
    with pytest.raises(LlmcError) as refused:
        Manifest.from_text(text, "dist/manifest.json")
    assert refused.value.ref == "manifest-version"
    assert refused.value.message == (
        f"dist/manifest.json is of {age} llmc: it has manifest schema {number}; this llmc reads schemas {OLDEST} to {SCHEMA}."
    )
    assert refused.value.hint == "Compile the model again with this llmc, or install llmc 7.8 that wrote it."


def test_the_same_release_is_not_recommended() -> None:
    """Between two releases the number may change more than once."""
    with pytest.raises(LlmcError, match="with this llmc\\. \\["):
        Manifest.from_text(json.dumps({"schema": 1, "llmc_version": llmc.__version__}), "m")


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"schema": "2"}', '{"schema": true}', '{"schema": null}'])
def test_no_number_is_damage(text: str) -> None:
    with pytest.raises(LlmcError, match="no schema number"):
        Manifest.from_text(text, "manifest.json")


def test_a_manifest_of_before_latents_is_read() -> None:
    group = KVGroup("g0", KVKind.FULL, (0,), 2, 16, 16, 0, 0, "float32")
    text = toy_manifest([group], vocab=8, page_size=16, limits=Limits(64, 1, 64)).as_text()
    old = json.loads(text)
    old["schema"] = 3
    del old["kv_plan"]["groups"][0]["latent"]
    read = Manifest.from_text(json.dumps(old), "dist/manifest.json")
    assert read.kv_plan.groups == (group,) and not group.latent
    assert len(group.pool_shapes(4, 16)) == 2
