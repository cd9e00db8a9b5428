"""What the public yardstick "Protocol NanoGPT" computes, sends and keeps, and what it published.

A speedrun of Pluralis Research (September to December 2026): a GPT of 8 blocks of width 1,024 and
at most 203,828,352 parameters on 8 workers, updates of 524,288 tokens, links of 200 Mb/s and 50 ms.
Its score is the number of updates to a validation loss of 3.276 times the seconds of an update: the
median of three windows of ten updates over simulated links.

Those links delay what a worker receives. A message starts once it has been sent and the one before
it has arrived, and arrives after the time of its bits and the latency. The one before it is that
which the worker's program needed before, whoever sent it. So activations and gradients to a worker
share one wire, and latency occupies it.

Source: github.com/PluralisResearch/ProtocolNanoGPT, ``train_gpt.py``, ``train_gpt_ssn.py`` and the
logs of its two ``records/``, one run each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paci.plan.cost import Costs, Link, StageCost, Wiring
from paci.schedule.base import Schedule

NUM_WORKERS = 8
TOKENS = 524_288  # of an update
CONTEXT = 1024
WINDOW = 10  # updates from one emptied pipeline to the next, when it is scored
_WIDTH, _VOCABULARY = 1024, 50_304
_COUNT_BYTES = 8  # that each message carries to say how long it is
# Of bfloat16, and of a logit and what the loss keeps of it in float32.
_VALUE_BYTES, _LOGIT_BYTES = 2, 8


@dataclass(frozen=True)
class Entry:
    """A published run; all its computing is counted from its shapes.

    A multiply-add is two operations, a backward takes twice those of a forward. Attention is causal
    and skips what it masks. The embedding looks up and computes nothing; the head is computed by
    the last stage beside its block. Norms, activations and the optimizer are not counted.

    Attributes:
        hidden: width of the feed-forward layers.
        rank: of the subspace that all blocks but the last write into, and that boundaries carry
            coordinates of; 0 where blocks write into all dimensions.
        bytes_per_token: sent forward for each token, and as many backward.
        num_micro_batches: of an update.
        updates: to the loss.
        update_s: seconds of one over links.
        unlinked_s: seconds of one without links, the median of its windows of 125 updates.
    """

    hidden: int
    rank: int
    bytes_per_token: int
    num_micro_batches: int
    updates: int
    update_s: float
    unlinked_s: float

    def block_flops(self, is_last: bool) -> float:
        """Return the operations of a block's forward for one token."""
        inputs = [_WIDTH, self.hidden]  # of the layers that write: attention's and the last
        if self.rank and not is_last:
            written = sum(self.rank * (each + _WIDTH) for each in inputs)
        else:
            written = sum(_WIDTH * each for each in inputs)
        # Coordinates are taken at the end of every block but the last, and read where it begins.
        boundaries = _WIDTH * self.rank * (1 if is_last else 2)
        read = _WIDTH * (3 * _WIDTH + self.hidden)
        return 2.0 * (read + written + boundaries + CONTEXT * _WIDTH)

    @property
    def head_flops(self) -> float:
        """The operations of the head's forward for one token."""
        return 2.0 * _WIDTH * _VOCABULARY

    def stage_flops(self, num_stages: int) -> list[float]:
        """Return the operations of each stage's forward for one token, blocks cut evenly."""
        per_block = num_stages // NUM_WORKERS
        found = [
            self.block_flops(stage // per_block == NUM_WORKERS - 1) / per_block
            for stage in range(num_stages)
        ]
        found[-1] += self.head_flops
        return found

    def costs(
        self, schedule: Schedule, flops_per_s: float, network: Network, bytes_per_token: int
    ) -> Costs:
        """Return the costs of a schedule of this entry's batch.

        Args:
            schedule: of 8 workers, with one or several stages each.
            flops_per_s: operations that a device sustains.
            network: the links.
            bytes_per_token: of a message, whatever the entry itself sends.
        """
        tokens = TOKENS / schedule.accumulation
        message_bytes = bytes_per_token * tokens + _COUNT_BYTES
        stages = tuple(
            StageCost(
                flops * tokens / flops_per_s,
                2 * flops * tokens / flops_per_s,
                activation_bytes=message_bytes,
                gradient_bytes=message_bytes,
            )
            for flops in self.stage_flops(schedule.num_stages)
        )
        return Costs(stages, network.link, wiring=network.wiring)

    def kept_gib(self, schedule: Schedule) -> float:
        """Return the GiB of activations of the worker that keeps most, estimated.

        A block keeps ``6 D + 2 H`` values of bfloat16 a token, its width ``D`` and its feed-forward
        ``H``; the head its input twice and its logits, which a loss cut into pieces need not.
        """
        tokens = TOKENS / schedule.accumulation
        block = _VALUE_BYTES * (6 * _WIDTH + 2 * self.hidden) * NUM_WORKERS / schedule.num_stages
        head = _VALUE_BYTES * 2 * _WIDTH + _LOGIT_BYTES * _VOCABULARY
        last = schedule.num_stages - 1
        kept = (
            sum(schedule.in_flight_cap(s) * (block + head * (s == last)) for s in stages)
            for stages in schedule.placement
        )
        return max(kept) * tokens / 2**30


@dataclass(frozen=True)
class Network:
    """Links between all workers.

    Attributes:
        link: each of them.
        wiring: which messages share one.
    """

    link: Link
    wiring: Wiring


def networks(latency_s: float, bytes_per_s: float) -> Mapping[str, Network]:
    """Return by name the links to price: none, the yardstick's, and those of full duplex."""
    own = Link(latency_s, bytes_per_s, stores_and_forwards=True)
    return {
        "none": Network(Link(), Wiring.DIRECTION),
        "yardstick": Network(own, Wiring.RECEIVER),
        "full duplex": Network(Link(latency_s, bytes_per_s), Wiring.DIRECTION),
    }


DENSE = Entry(4096, 0, 2048, 64, 2925, 100.475, 0.539)
COMPRESSED = Entry(11_292, 160, 322, 32, 9125, 19.889, 0.655)
# What carries a boundary, by bytes a token: bfloat16, eight and four bits a value with a scale of
# 16 bits for each 128 of them, and coordinates in a subspace with the token's number.
CODECS = {2048: DENSE, 1040: DENSE, 528: DENSE, 322: COMPRESSED}
