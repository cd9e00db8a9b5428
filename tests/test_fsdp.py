"""FSDP2 around a stage: two stages, each sharded over two processes, beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import paci

# FSDP2 of PyTorch 2.6 asks streams of the CPU for what they have not.
needs_streams = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch shards on GPUs only"
)

WIDTH, ROWS, A = 8, 4, 4  # rows of a micro-batch
PRECISIONS = {"fp32": 1e-6, "bf16": 1e-3}


def stage(index: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(index)
        return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def batches(num: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shape = (A * ROWS, WIDTH)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(num)
    ]


def part(whole: Tensor, shard: int) -> Tensor:
    """This shard's rows of every micro-batch."""
    return whole.view(A, 2, ROWS // 2, WIDTH)[:, shard].reshape(-1, WIDTH)


def train(pipeline: paci.Pipeline, given: list[tuple[Tensor, Tensor]]) -> None:
    for batch in given:
        pipeline.step(batch)
    pipeline.drain()


def in_one_process(weights: str, precision: str, most: float | None = None) -> list[list[Tensor]]:
    modules = [stage(0), stage(1)]
    pipeline = paci.Pipeline(
        modules,
        paci.PACI(2, A),
        [sgd(module) for module in modules],
        nn.MSELoss(),
        weights=weights,
        precision=precision,
        max_grad_norm=most,
    )
    train(pipeline, batches(10))
    return [[p.detach().clone() for p in module.parameters()] for module in modules]


def sharded(
    rank: int, num_ranks: int, runs: list[tuple[str, str, bool]], most: float | None = None
) -> list[Any]:
    """Ranks 0 and 1 share stage 0, ranks 2 and 3 stage 1."""
    index, shard = divmod(rank, 2)
    mesh = DeviceMesh.from_group([dist.new_group([0, 1]), dist.new_group([2, 3])][index], "cpu")
    group = [dist.new_group([0, 2]), dist.new_group([1, 3])][shard]
    found: list[Any] = []
    for weights, precision, reshards in runs:
        module = stage(index)
        mixed = MixedPrecisionPolicy()
        if precision == "bf16":
            mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
        fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=reshards)
        own = [id(p) for p in module.parameters()]
        try:
            pipeline = paci.Pipeline(
                module,
                paci.PACI(2, A),
                sgd(module),
                nn.MSELoss(),
                weights=weights,
                precision="bf16" if precision == "wrong" else "fp32",
                max_grad_norm=most,
                group=group,
                timeout_s=60.0,
            )
        except paci.ConfigError as error:
            found.append(str(error))
            dist.barrier()  # the other pipeline is not yet refused, and rank 0 keeps the store
            continue
        train(pipeline, [(part(x, shard), part(y, shard)) for x, y in batches(10)])
        assert [id(p) for p in module.parameters()] == own
        found.append([p.full_tensor().detach() for p in module.parameters()])
        dist.barrier()
        pipeline.close()
    return found


@needs_streams
def test_sharded_stages_train_as_one_process(tmp_path: Path):
    runs = [
        (weights, precision, reshards)
        for weights in ("current", "lookahead")
        for precision in PRECISIONS
        for reshards in (True, False)
    ]
    found = launching.values(launching.launch(tmp_path, 4, sharded, runs))
    expected = {
        (weights, precision): in_one_process(weights, precision)
        for weights in ("current", "lookahead")
        for precision in PRECISIONS
    }
    for rank, mine in enumerate(found):
        for (weights, precision, _), weight in zip(runs, mine, strict=True):
            for p, q in zip(weight, expected[weights, precision][rank // 2], strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=PRECISIONS[precision])
    # And the two policies are not the same to begin with.
    pairs = zip(expected["current", "fp32"][0], expected["lookahead", "fp32"][0], strict=True)
    assert max(float((p - q).abs().max()) for p, q in pairs) > 0.002


@needs_streams
@pytest.mark.parametrize("most", [None, 0.05])
def test_policies_with_one_working_copy_and_clipping(tmp_path: Path, most: float | None):
    policies = ["lookahead", "predict", "pipemare", "recompute"]
    runs = [(weights, "fp32", True) for weights in policies]
    found = launching.values(launching.launch(tmp_path, 4, sharded, runs, most))
    for place, weights in enumerate(policies):
        expected = in_one_process(weights, "fp32", most)
        for rank, mine in enumerate(found):
            for p, q in zip(mine[place], expected[rank // 2], strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (("stash", "fp32", True), "the weight policy stash needs whole parameters, got sharded"),
        (("double_buffer", "fp32", True), "the weight policy double_buffer needs whole parameters"),
        (("current", "wrong", True), "leave bf16 to FSDP's MixedPrecisionPolicy"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, run: Any, message: str):
    for (said,) in launching.values(launching.launch(tmp_path, 4, sharded, [run])):
        assert message in said
