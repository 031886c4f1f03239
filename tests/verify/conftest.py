"""Checkpoints that all tests of verify share."""

from __future__ import annotations

import pytest

from tests.verify.models import Opened


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def opened(checkpoints: Opened, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Models and their checkpoints, whose reference runs verify shares with the tests before."""
    monkeypatch.setattr("llmc.verify.reference_logits", checkpoints.reference)
    return checkpoints
