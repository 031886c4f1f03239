"""Tile registers (AMX): which machines have them, and whether the system lets a process use them."""

from __future__ import annotations

import sys

import pytest

from llmc import host
from llmc.caps import TileUnit
from llmc.errors import LlmcError
from llmc.targets.cpu.backend import _PRESETS, capabilities, detect


def test_preset_detection_and_permission(monkeypatch):
    amx = set(_PRESETS["x86-64-v4-amx"]["features"])
    monkeypatch.setattr("llmc.targets.cpu.backend.architecture", lambda: "x86_64")
    monkeypatch.setattr("llmc.targets.cpu.backend.features", lambda: frozenset(amx))
    assert detect() == "x86-64-v4-amx" and capabilities("").tiles is TileUnit.AMX
    monkeypatch.setattr("llmc.targets.cpu.backend.features", lambda: frozenset(amx - {"amx_int8"}))
    assert detect() == "x86-64-v4-bf16" and capabilities("").tiles is TileUnit.NONE
    host.require_permission(["avx2"])  # needs none
    monkeypatch.setattr(host, "system", lambda: "linux")
    monkeypatch.setattr(host, "_request_tiles", lambda: 0)
    host.require_permission(amx)
    monkeypatch.setattr(host, "_request_tiles", lambda: 22)
    with pytest.raises(
        LlmcError, match=r"tile registers of amx_bf16, amx_int8, amx_tile.*Invalid argument.*tiles-refused"
    ):
        host.require_permission(amx)


@pytest.mark.skipif(sys.platform != "linux", reason="arch_prctl is Linux's")
def test_the_system_is_really_asked():
    """Linux refuses by itself where the processor has no tiles."""
    code = host._request_tiles()
    assert code != 0 or "amx_tile" in (host.features() or ())
