"""Boundaries that learn to be narrow: a GPT whose stages send 16 numbers a token instead of 128.

    python examples/learned_subspace.py
    torchrun --nproc-per-node 2 examples/learned_subspace.py

It trains the same model three times, 200 updates or as many as the command line says, and prints
the loss on text that was held out and the bytes that stages sent each other:

- dense, in bfloat16;
- across a fixed subspace: the codec ``lowrank``, which takes no change of the model;
- across learned subspaces, with embeddings that every stage makes for itself from the tokens.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

import paci
from paci.data import Sampler, prepare, validation_batches
from paci.models import GPTConfig, Narrow, Widen
from paci.models.gpt import Block

STAGES, WIDTH, RANK, CONTEXT, BATCH = 4, 128, 16, 64, 32
UPDATES = int(sys.argv[1]) if len(sys.argv) > 1 else 200
VOCAB = 257  # bytes, and the end of a text
GPT = GPTConfig(VOCAB, context=CONTEXT, num_layers=STAGES, num_heads=4, width=WIDTH)


class Part(nn.Module):
    """A block, with what the first and the last stage need besides.

    Args:
        index: of the stage.
        narrow: whether its boundaries are learned subspaces.
    """

    def __init__(self, index: int, narrow: bool) -> None:
        super().__init__()
        # The same fixed numbers on every stage: they are never sent, and never learn.
        fixed = torch.Generator().manual_seed(0)
        self.register_buffer("fixed_VD", 0.5 * torch.randn(VOCAB, WIDTH, generator=fixed))
        first, last = index == 0, index == STAGES - 1
        self.embedding = nn.Embedding(VOCAB, WIDTH) if first else None
        self.position = nn.Parameter(0.1 * torch.randn(CONTEXT, WIDTH)) if first else None
        self.widen = Widen(WIDTH, RANK, seed=index) if narrow and not first else None
        self.block = Block(GPT)
        self.narrow = Narrow(WIDTH, RANK, seed=index + 1) if narrow and not last else None
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)) if last else None

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Run the stage: ``x`` comes from the stage before, ``tokens`` come to each directly."""
        known_BTD = self.fixed_VD[tokens]
        if self.embedding is not None:
            x = known_BTD + 0.1 * self.embedding(x) + self.position
        if self.widen is not None:
            x = self.widen(x, known_BTD)
        x = self.block(x)
        if self.narrow is not None:
            x = self.narrow(x, known_BTD)
        return x if self.head is None else self.head(x)


def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def train(narrow: bool, codec: str) -> tuple[float, int]:
    """Return the loss in the end, and the bytes that were sent."""
    schedule = paci.PACI(STAGES, accumulation=8, slack=1)
    stages, optimizers = [], []
    for index in paci.hosted_stages(schedule, rank, world_size):
        torch.manual_seed(index)  # a stage starts the same wherever it lives
        stages.append(Part(index, narrow))
        optimizers.append(torch.optim.AdamW(stages[-1].parameters(), lr=2e-3))
    options = {"weights": "lookahead", "flush_first": UPDATES // 10, "codec": codec}
    pipeline = paci.Pipeline(stages, schedule, optimizers, loss, **options)
    for update in range(UPDATES):
        inputs, targets = map(torch.from_numpy, sampler.batch(update))
        pipeline.step((inputs, targets), tokens=inputs)
    sent = sum(pipeline.bytes_sent().values())
    held_out = validation_batches(corpus.val, CONTEXT, BATCH, 256)
    batches = [tuple(map(torch.from_numpy, batch)) for batch in held_out]
    found = pipeline.evaluate([(x, y, {"tokens": x}) for x, y in batches])
    pipeline.close()
    return found, sent


rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if world_size > 1:
    dist.init_process_group("gloo")
torch.set_num_threads(1)
corpus = prepare("stdlib", "bytes")
sampler = Sampler(corpus.train, CONTEXT, BATCH, 0)
for name, narrow, codec in (
    ("dense", False, "bf16"),
    ("fixed subspace", False, f"lowrank:rank={RANK}"),
    ("learned subspaces", True, "bf16"),
):
    found, sent = train(narrow, codec)
    if rank == 0:
        print(f"{name:18} loss {found:.4f}, {sent / 1e6:.1f} MB sent", flush=True)
if world_size > 1:
    dist.destroy_process_group()
