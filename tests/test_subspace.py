"""Boundaries in learned subspaces."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paci.errors import ConfigError
from paci.models import Narrow, Widen

ROOT = Path(__file__).parent.parent


def test_at_the_start_both_ends_are_a_projection():
    x, known = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    narrow, widen = Narrow(8, 3, seed=4), Widen(8, 3, seed=4)
    basis = narrow.basis_DR.detach()
    assert torch.equal(basis, widen.basis_DR)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(3))
    expected = (x - known) @ basis @ basis.t() + known
    torch.testing.assert_close(widen(narrow(x, known), known), expected)
    torch.testing.assert_close(widen(narrow(x)), x @ basis @ basis.t())
    assert not torch.equal(Narrow(8, 3, seed=5).basis_DR, basis)


def test_what_is_known_and_what_is_in_the_subspace_crosses_whole():
    known = torch.randn(2, 5, 16)
    narrow, widen = Narrow(16, 4), Widen(16, 4)
    x = known + torch.randn(2, 5, 4) @ narrow.basis_DR.detach().t()
    assert narrow(x, known).shape == (2, 5, 4)
    torch.testing.assert_close(widen(narrow(x, known), known), x)


def test_both_ends_learn():
    narrow, widen = Narrow(6, 2), Widen(6, 2)
    x = torch.randn(4, 6)
    (widen(narrow(x)) - x).square().sum().backward()
    for end in (narrow, widen):
        assert end.basis_DR.grad is not None
        assert end.basis_DR.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [Narrow, Widen])
@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_no_subspace_has_is_refused(kind: type[Narrow], rank: int):
    with pytest.raises(ConfigError, match=f"from 1 to the width of 6, got {rank}"):
        kind(6, rank)


def test_the_example_runs_in_one_process_and_in_two(own_cache: None):
    """With the same losses; its learned boundaries send an eighth of the bytes."""
    example = [str(ROOT / "examples" / "learned_subspace.py"), "3"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for launch in ([], ranks):
        command = [sys.executable, *launch, *example]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        found.append(done.stdout)
    assert found[0] == found[1]
    rows = re.findall(r"(.+?) +loss (\d\.\d{4}), ([\d.]+) MB sent", found[0])
    names, losses, sizes = zip(*rows, strict=True)
    assert names == ("dense", "fixed subspace", "learned subspaces")
    assert all(2.0 < float(loss) < 6.0 for loss in losses)
    dense, fixed, learned = map(float, sizes)
    assert fixed == learned == pytest.approx(dense / 8, rel=0.05)
