"""What all tests share: one thread (bits must not depend on the machine's cores)."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are kept in a folder of this test, and nothing comes from a hub."""
    monkeypatch.setenv("PACI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
