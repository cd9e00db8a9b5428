"""A training loop of your own: the same file in one process or under torchrun.

    python examples/mlp.py
    torchrun --nproc-per-node 2 examples/mlp.py
    torchrun --nproc-per-node 4 examples/mlp.py

All three print the same loss.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

import paci

schedule = paci.PACI(num_stages=4, accumulation=8)
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if world_size > 1:
    dist.init_process_group("gloo")
torch.set_num_threads(1)

stages, optimizers = [], []
for index in paci.hosted_stages(schedule, rank, world_size):
    torch.manual_seed(index)  # a stage starts the same wherever it lives
    stages.append(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1)))
    optimizers.append(torch.optim.AdamW(stages[-1].parameters(), lr=3e-3))

pipeline = paci.Pipeline(stages, schedule, optimizers, nn.MSELoss(), seed=1)
for step in range(100):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
    pipeline.step((x, x.flip(1).tanh()))  # never empties
x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1000))
loss = pipeline.evaluate([(x, x.flip(1).tanh())])  # drains first
drift = {stage: dict(report.drift) for stage, report in pipeline.drift().items()}
if rank == 0:
    print(f"loss {loss:.12f}, drift by stage {drift}")
if world_size > 1:
    dist.destroy_process_group()
