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


@pytest.fixture
def text(tmp_path: Path, own_cache: None) -> Path:
    """A folder of text, small enough to train on within a test."""
    folder = tmp_path / "text"
    folder.mkdir()
    for k in range(12):
        (folder / f"{k}.txt").write_text(f"{k} plus {k} is {2 * k}.\n" * 40)
    return folder
