"""Does less delay learn better? PACI, PACI on a V and a flush at equal tokens, one process each.

    python docs/v/curves.py                # the runs that are missing, then the table
    python docs/v/curves.py --most 0       # the table

Eight workers in all arms, one process plays all of them: the weights are those that eight would
end with. The same model (16 layers, so a V has one per stage and the others two), data,
micro-batches and optimizer; nothing is tuned for an arm. Every run that ends adds a row to
``curves.jsonl`` beside this file, so an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import paci
from paci.data import Sampler, prepare, validation_batches
from paci.models import (
    GPTConfig,
    build_stage,
    is_hidden_matrix,
    layer_costs,
    muon_groups,
    parameter_groups,
)
from paci.optim.muon import MuonWithAdamW
from paci.plan.partition import balanced_cut

RESULTS = Path(__file__).parent / "curves.jsonl"
PICTURE = Path(__file__).parent.parent / "images" / "v-curves.png"
WORKERS, ACCUMULATION, UPDATES, SEEDS = 8, 8, 400, (0, 1, 2)
BATCH, CONTEXT, WIDTH = 16, 64, 32
RATES = {"adamw": 2e-3, "muon": 6e-3}
SCHEDULES: dict[str, Callable[[], paci.Schedule]] = {
    "1f1b": lambda: paci.OneFOneBFlush(WORKERS, ACCUMULATION),
    "paci": lambda: paci.PACI(WORKERS, ACCUMULATION),
    "paci-v": lambda: paci.PaciV(2 * WORKERS, ACCUMULATION),
}


def optimizer_of(name: str, module: nn.Module) -> Optimizer:
    """AdamW for all; or Muon for the matrices inside blocks and AdamW for the rest."""
    betas = (0.9, 0.95)
    if name == "adamw":
        return AdamW(parameter_groups(module, 0.1), lr=RATES[name], betas=betas)
    groups = muon_groups(module, 0.1, is_hidden_matrix)
    for group in groups:
        if group["algorithm"] == "muon":
            group |= {"lr": RATES["muon"], "adjust_lr_fn": "original"}
        else:
            group |= {"lr": RATES["adamw"], "weight_decay": 0.0}
    return MuonWithAdamW(groups, betas=betas)


def factor(update: int) -> float:
    """Linear warm-up over 5 %, then linear to a tenth."""
    warm = UPDATES // 20
    return min(1.0, (update + 1) / warm) * (1.0 - 0.9 * min(1.0, update / UPDATES))


def run(schedule: paci.Schedule, optimizer: str, seed: int) -> dict[str, Any]:
    """Train once; the row of results."""
    corpus = prepare("stdlib", "bytes", val_fraction=0.1)
    layers = 2 * WORKERS - 2
    model = GPTConfig(corpus.tokenizer.vocab_size, CONTEXT, layers, 2, WIDTH)
    cut = balanced_cut([1.0] * len(layer_costs(model)), schedule.num_stages)
    modules = [build_stage(model, part, seed) for part in cut]
    optimizers = [optimizer_of(optimizer, module) for module in modules]
    rates = [LambdaLR(each, factor) for each in optimizers]
    pipeline = paci.Pipeline(
        modules, schedule, optimizers, paci.CrossEntropy(), lr_scheduler=rates, seed=seed
    )
    sampler = Sampler(corpus.train, CONTEXT, BATCH, seed)
    losses: list[float] = []
    started = time.perf_counter()
    for update in range(UPDATES):
        inputs, targets = sampler.batch(update)
        batch = torch.from_numpy(inputs), torch.from_numpy(targets)
        losses += [float(loss) for loss in pipeline.step(batch).losses]
    losses += [float(loss) for loss in pipeline.drain().losses]
    row = {
        "schedule": schedule.name,
        "optimizer": optimizer,
        "seed": seed,
        "val_loss": pipeline.evaluate(held_out(corpus)),
        "train_loss": [
            round(statistics.mean(losses[k : k + 20]), 4) for k in range(0, UPDATES, 20)
        ],
        "late": round(share_late(pipeline), 4),
        "tokens": UPDATES * BATCH * CONTEXT,
        "elapsed_s": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }
    pipeline.close()
    return row


def held_out(corpus: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Validation batches, the same for all."""
    batches = validation_batches(corpus.val, CONTEXT, BATCH, 50 * BATCH)
    return ((torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches)


def share_late(pipeline: paci.Pipeline) -> float:
    """Updates that a gradient is late by, averaged over micro-batches and stages."""
    reports = pipeline.drift().values()
    total = sum(count for report in reports for count in report.delay.values())
    return sum(k * count for report in reports for k, count in report.delay.items()) / total


def rows() -> list[dict[str, Any]]:
    """What is there already."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table() -> str:
    """Validation loss by schedule and optimizer: mean, and each seed."""
    lines = [
        "| optimizer | schedule | validation loss | seeds | mean delay |",
        "|---|---|---|---|---|",
    ]
    for optimizer in RATES:
        for name in SCHEDULES:
            found = sorted(
                (r for r in rows() if (r["schedule"], r["optimizer"]) == (name, optimizer)),
                key=lambda r: r["seed"],
            )
            if found:
                losses = [r["val_loss"] for r in found]
                each = ", ".join(f"{loss:.3f}" for loss in losses)
                lines.append(
                    f"| {optimizer} | `{name}` | {statistics.mean(losses):.3f} | {each} "
                    f"| {statistics.mean(r['late'] for r in found):.2f} |"
                )
    return "\n".join(lines)


def picture() -> None:
    """Training loss over updates: a line for the mean of the seeds, a band from least to most."""
    figure, panels = pyplot.subplots(1, len(RATES), figsize=(10, 4), layout="constrained")
    for axes, optimizer in zip(panels, RATES, strict=True):
        for name in SCHEDULES:
            arm = (name, optimizer)
            curves = [r["train_loss"] for r in rows() if (r["schedule"], r["optimizer"]) == arm]
            points = list(zip(*curves, strict=True))
            step = UPDATES // len(points)
            updates = range(step, UPDATES + 1, step)
            (line,) = axes.plot(updates, [statistics.mean(p) for p in points], label=name)
            lows, highs = [min(p) for p in points], [max(p) for p in points]
            axes.fill_between(updates, lows, highs, color=line.get_color(), alpha=0.2, lw=0)
        axes.set(title=optimizer, xlabel="updates", ylabel="training loss (nats a token)")
        axes.set_ylim(2.15, 3.6)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Run what is missing, seed by seed; print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=100, help="runs to do now, 0 for the table")
    torch.set_num_threads(1)
    done = {(r["schedule"], r["optimizer"], r["seed"]) for r in rows()}
    arms = [arm for arm in itertools.product(SCHEDULES, RATES, SEEDS) if arm not in done]
    for name, optimizer, seed in sorted(arms, key=lambda arm: arm[2])[: parser.parse_args().most]:
        row = run(SCHEDULES[name](), optimizer, seed)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:<7} {optimizer:<6} seed {seed}: {row['val_loss']:.4f}")
    print(table())
    picture()


if __name__ == "__main__":
    main()
