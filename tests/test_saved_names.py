"""Saved state under the names of the whole model, and torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import enum
import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import launching
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract_helpers import Case, batches, every_kind, linears, mse
from runtime_helpers import same_bits
from test_fsdp import A as ROWS_A
from test_fsdp import batches as wide_batches
from test_fsdp import needs_streams, part, sgd, stage
from test_probe import CountingOnItself, Preconditioned
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import paci

adamw = partial(torch.optim.AdamW, lr=0.05)
decay = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2, 4])  # a Counter by number


def save(pipeline: paci.Pipeline, folder: Path) -> None:
    with warnings.catch_warnings():  # that there is one process only
        warnings.simplefilter("ignore")
        dcp.save({"pipeline": pipeline}, checkpoint_id=folder)


def load(pipeline: paci.Pipeline, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"pipeline": pipeline}, checkpoint_id=folder)


@every_kind
def test_a_checkpoint_of_torch_goes_on_with_the_same_bits(
    policy: str, precision: str, name: str, tmp_path: Path
):
    options = {"optimizer": adamw, "lr_scheduler": decay, "max_grad_norm": 0.5}
    first = Case(policy, precision, name, **options)
    first.train(3)
    first.pipeline.drain()
    save(first.pipeline, tmp_path)
    again = Case(policy, precision, name, **options, modules=linears(len(first.modules), seed=9))
    assert isinstance(again.pipeline, Stateful)
    load(again.pipeline, tmp_path)
    assert again.pipeline.num_micro_batches == first.pipeline.num_micro_batches
    assert first.train(4, seed=2) == again.train(4, seed=2)
    first.pipeline.drain()
    again.pipeline.drain()
    assert same_bits(first.parameters(), again.parameters())


OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "amsgrad": partial(torch.optim.AdamW, lr=0.05, amsgrad=True),
    "nadam": partial(torch.optim.NAdam, lr=0.05),
    "lists in its state": partial(Preconditioned, lr=np.float64(0.05)),
    "muon": lambda parameters: paci.MuonWithAdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "algorithm": "muon"},
         {"params": [p for p in parameters if p.dim() < 2], "algorithm": "adamw"}],
    ),
}  # fmt: skip


def trained(updates: int, modules: list[Any] | None = None, **options: Any) -> paci.Pipeline:
    pipeline = paci.Pipeline(
        modules or linears(),
        paci.PACI(2, 2),
        options.pop("optimizer", adamw),
        mse,
        weights="current",
        **options,
    )
    for batch in list(batches(8))[:updates]:
        pipeline.step(batch)
    pipeline.drain()
    return pipeline


def values(pipeline: paci.Pipeline) -> list[Tensor]:
    return list(pipeline.model_state_dict().values())


def go_on_alike(one: paci.Pipeline, other: paci.Pipeline) -> bool:
    for pipeline in (one, other):
        for batch in batches(3):
            pipeline.step(batch)
        pipeline.drain()
    return same_bits(values(one), values(other))


@pytest.mark.parametrize(
    "name",
    [name for name in OPTIMIZERS if name != "muon" or hasattr(torch.optim, "Muon")],
)
@pytest.mark.parametrize("updates", [0, 2])
def test_states_of_optimizers_with_and_without_a_step(name: str, updates: int, tmp_path: Path):
    """A checkpoint before the first update holds stand-ins, which are not taken for state; one that
    is loaded into a pipeline that has trained makes it forget that."""
    options = {"optimizer": OPTIMIZERS[name]}
    undisturbed, saved = trained(4, **options), trained(updates, **options)
    save(saved, tmp_path)
    fresh, used = trained(0, linears(seed=3), **options), trained(3, linears(seed=3), **options)
    for pipeline in (fresh, used):
        load(pipeline, tmp_path)
    for pipeline in (saved, fresh, used):  # saving has left no trace either
        for batch in list(batches(8))[updates:4]:
            pipeline.step(batch)
            pipeline.drain()
    assert same_bits(values(saved), values(fresh))
    assert same_bits(values(saved), values(used))
    if not updates:
        stepwise = trained(0, **options)
        for batch in list(batches(8))[:4]:
            stepwise.step(batch)
            stepwise.drain()
        assert same_bits(values(saved), values(stepwise))
    assert undisturbed.num_micro_batches == saved.num_micro_batches


def test_saving_before_the_first_update_leaves_an_optimizers_own_alone():
    """What it counts in options, in attributes, in a list of two names; a rate its user holds."""
    rate = torch.tensor(0.1)
    ends = []
    for saves in (False, True):
        pipeline = trained(0, optimizer=partial(CountingOnItself, lr=rate))
        optimizers = [stage.optimizer for stage in pipeline.stages.values()]
        if saves:
            pipeline.state_dict()
        assert all(o.param_groups[0]["lr"] is rate for o in optimizers)
        for batch in batches(3):
            pipeline.step(batch)
        pipeline.drain()
        ends.append(values(pipeline))
        assert all(o.sums is o.same for o in optimizers)
    assert same_bits(*ends)


def test_schedulers_and_options_of_numpys_numbers_go_on(tmp_path: Path):
    milestones = list(np.array([2, 4]))
    numpys = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=milestones)
    options = {"optimizer": partial(torch.optim.SGD, lr=np.float64(0.1)), "lr_scheduler": numpys}
    saved, fresh = trained(3, **options), trained(0, linears(seed=3), **options)
    save(saved, tmp_path)
    load(fresh, tmp_path)
    assert go_on_alike(saved, fresh)


class Late(torch.optim.SGD):
    """Keeps something more of each parameter with every step, and steps by it."""

    def __init__(self, params: Any, lr: float, nested: bool) -> None:
        super().__init__(params, lr)
        self.nested = nested

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            kept = state.setdefault("kept", []) if self.nested else list(state.values())
            for each in kept:
                p.add_(each, alpha=0.1)
            if self.nested:
                kept.append(p.clone())
            else:
                state[f"step {len(kept)}"] = p.clone()
        super().step()


@pytest.mark.parametrize("nested", [False, True])
def test_state_that_a_checkpoint_has_no_place_for_is_refused(nested: bool, tmp_path: Path):
    options = {"optimizer": partial(Late, lr=0.1, nested=nested)}
    saved = trained(3, **options)
    save(saved, tmp_path)
    fresh, used = trained(0, linears(seed=3), **options), trained(3, linears(seed=3), **options)
    place = "kept/1" if nested else "step 1"
    with pytest.raises(paci.ConfigError, match=f"kept of .*, got none of '{place}'; train until"):
        load(fresh, tmp_path)
    load(used, tmp_path)
    assert go_on_alike(saved, used)


class Color(enum.StrEnum):
    """Text, but of a class of one's own."""

    RED = "red"


class OwnKind:
    """Of no kind that a checkpoint may hold, though it can be pickled."""


def test_what_could_not_be_loaded_is_refused_when_saved():
    pipeline = trained(1, optimizer=partial(torch.optim.SGD, lr=0.1))
    told = (
        "^options of the optimizer of stage 1, param_groups, mine must be numbers, text, tensors "
        "and containers of them to be saved, got one of type {}; keep it elsewhere$"
    )
    for wrong in (OwnKind(), Color.RED):
        pipeline.stages[1].optimizer.param_groups[0]["mine"] = [wrong]
        with pytest.raises(paci.ConfigError, match=told.format(type(wrong).__name__)):
            pipeline.state_dict()


def test_states_of_before_options_were_packed_can_be_loaded():
    saved, fresh = trained(3), trained(0, linears(seed=3))
    state = copy.deepcopy(saved.state_dict())
    for rest in state["stages"].values():
        options = torch.load(io.BytesIO(rest.pop("optimizer")), weights_only=True)
        rest |= {"param_groups": options["param_groups"]}
    fresh.load_state_dict(state)
    assert go_on_alike(saved, fresh)


class Slice(nn.Module):
    """Some layers of a model, under places of its own."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def whole() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Module()
        model.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in "12"
        )
        return model


def test_names_are_those_of_the_whole_model():
    model = whole()
    cut = [Slice([layer]) for layer in model.layers]
    for names in (model, lambda stage, name: name.replace("layers.0", f"layers.{stage}")):
        pipeline = trained(1, cut, names=names)
        state = pipeline.model_state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value)
        whole().load_state_dict(state)
        assert pipeline.state_dict()["optimizer"].keys() == dict(model.named_parameters()).keys()
    by_default = trained(1, cut).model_state_dict()
    assert set(by_default) == set(nn.Sequential(*cut).state_dict())
    kept = [nn.Sequential() for _ in "12"]
    for index, layer in enumerate(model.layers):
        kept[index].add_module(str(index), layer)
    assert (
        trained(1, kept).model_state_dict().keys()
        == nn.Sequential(*model.layers).state_dict().keys()
    )


def test_names_that_are_no_names_are_refused():
    with pytest.raises(paci.ConfigError, match="must tell all stages' weights apart, got bias"):
        trained(0, names=lambda stage, name: name)
    with pytest.raises(paci.ConfigError, match="must hold all that the stages hold, got none of w"):
        trained(0, names=whole())
    state = trained(1).state_dict()
    del state["model"]["1.bias"]
    with pytest.raises(
        paci.ConfigError, match=r"all that stage 1 holds, got none of 1\.bias; load"
    ):
        trained(0).load_state_dict(state)


def go_on(rank: int, num_ranks: int, folder: Path) -> Any:
    """Two stages, each sharded over two processes: save, load into new ones, go on."""
    index, shard = divmod(rank, 2)
    mesh = DeviceMesh.from_group([dist.new_group([0, 1]), dist.new_group([2, 3])][index], "cpu")
    group = [dist.new_group([0, 2]), dist.new_group([1, 3])][shard]

    def build(weights: str, module: nn.Module) -> tuple[nn.Module, paci.Pipeline]:
        fully_shard(module, mesh=mesh)
        pipeline = paci.Pipeline(
            module,
            paci.PACI(2, ROWS_A),
            sgd(module),
            nn.MSELoss(),
            weights=weights,
            group=group,
            timeout_s=60.0,
        )
        return module, pipeline

    def train(pipeline: paci.Pipeline, given: Any) -> None:
        for x, y in given:
            pipeline.step((part(x, shard), part(y, shard)))
        pipeline.drain()

    same = []
    for weights in ("lookahead", "pipemare"):
        module, first = build(weights, stage(index))
        train(first, wide_batches(6)[:3])
        dcp.save({"pipeline": first}, checkpoint_id=folder / weights)
        other, again = build(weights, stage(index + 5))
        dcp.load({"pipeline": again}, checkpoint_id=folder / weights)
        for pipeline in (first, again):
            train(pipeline, wide_batches(6)[3:])
        pairs = zip(module.parameters(), other.parameters(), strict=True)
        same.append(all(torch.equal(p.to_local(), q.to_local()) for p, q in pairs))
        names = list(again.model_state_dict())
        dist.barrier()
        first.close()
        again.close()
    return same, names


@needs_streams
def test_processes_and_shards_save_together(tmp_path: Path):
    for rank, (same, names) in enumerate(
        launching.values(launching.launch(tmp_path, 4, go_on, tmp_path))
    ):
        assert same == [True, True]
        assert names[0] == f"{rank // 2}.0.weight"
