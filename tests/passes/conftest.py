"""Every function that a pass builds must be well formed Relax."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import relax

from llmc.passes.rewrite import Builder


@pytest.fixture(autouse=True)
def well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what Builder.function returns, in every pass; well_formed raises with the reason."""
    build = Builder.function

    def checked(self: Builder, *args: Any, **kwargs: Any) -> Any:
        func = build(self, *args, **kwargs)
        relax.analysis.well_formed(func)
        return func

    monkeypatch.setattr(Builder, "function", checked)
