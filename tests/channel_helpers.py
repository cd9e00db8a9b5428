"""Messages of all forms, and ranks that hand them over."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import paci
from paci.plan.stage_memory import KEPT_PER_RECEIVE, Hop, posted_bytes
from paci.runtime.transport import gloo_end
from paci.runtime.transport.boundary import flatten, unflatten
from paci.runtime.transport.channel import Bundle, Ends, Receiver, Sender, Transport
from paci.runtime.transport.gloo import GlooReceiver, GlooSender
from paci.runtime.transport.meeting_point import MeetingPoint
from paci.runtime.transport.nccl import Link, NcclReceiver, NcclSender
from paci.runtime.transport.shared_memory import Meeting, SharedReceiver, SharedSender, visit
from paci.schedule.action import Message, Payload


class Pair(NamedTuple):
    hidden: Tensor
    mask: Any = None


def value_of(form: int, number: int) -> Any:
    """A value of one of ``NUM_FORMS`` forms; ``number`` tells it from others."""
    x = torch.arange(6.0).view(2, 3) + number
    match form:
        case 0:
            return x.requires_grad_()
        case 1:
            return x.detach()
        case 2:
            return (x.repeat(1, 40), x[:0], x.sum())
        case 3:
            return (x.repeat(50, 40).t().requires_grad_(),)
        case 4:
            return [x[0], {"mask": x > 2, "none": None, "n": number, "r": number / 3}, ("é", True)]
        case 5:
            return Pair(x, (torch.complex(x, -x).conj(), x.long(), x.bfloat16()))
        case 6:
            return tuple(x + i for i in range(60))
        case 7:
            return {"nothing": None}
        case _:
            return (torch.full((1 + number % 5, 7), float(number)), number % 2 == 0)


NUM_FORMS = 9


def plan(seed: int) -> list[list[Any]]:
    """Stretches of values: in each, forms stay for a while or change at once."""
    chance = random.Random(seed)
    stretches, number = [], 0
    for _ in range(4):
        values: list[Any] = []
        while len(values) < 40:
            form = chance.randrange(NUM_FORMS)
            for _ in range(chance.choice((1, 1, 2, 3, 9, 12))):
                values.append(value_of(form, number))
                number += 1
        stretches.append(values)
    return [[], *stretches, [], [value_of(0, 0)]]


def same(one: Any, other: Any) -> bool:
    """Whether two values are alike to the bit, and made in the same way."""
    (tensors, structure), (others, other_structure) = flatten(one), flatten(other)
    return structure == other_structure and all(
        a.dtype is b.dtype and a.requires_grad is b.requires_grad and torch.equal(a, b)
        for a, b in zip(tensors, others, strict=True)
    )


def hand_over(stretches: list[list[Any]], sender: Sender) -> None:
    transport = Transport({(Payload.ACTIVATION, 1): sender}, {})
    for values in stretches:
        for message, value in messages(values):
            transport.send(message, Bundle(*flatten(value)))
        transport.finish()


def take_over(stretches: list[list[Any]], receiver: Receiver) -> list[Any]:
    """All values, looked at by nobody before the last has come."""
    transport = Transport({}, {(Payload.ACTIVATION, 1): receiver})
    found = []
    for values in stretches:
        for message, _ in messages(values):
            received = transport.receive(message)
            assert received.structure is not None
            found.append(unflatten(received.structure, received))
        transport.finish()
    return found


def messages(values: list[Any]) -> Iterator[tuple[Message, Any]]:
    for j, value in enumerate(values):
        yield Message(Payload.ACTIVATION, 1, j), value


def hand_over_all(rank: int, num_ranks: int, kind: str, capacity: int, seeds: list[int]) -> int:
    """Rank 0 sends, rank 1 keeps all that it receives and compares at the end.

    Returns how many messages were right; those of rank 0 are all.
    """
    store = dist.distributed_c10d._get_default_store()
    num_right = 0
    for seed in seeds:
        stretches = plan(seed)
        sender, receiver = make_channel(rank, capacity, kind, store, str(seed))
        if sender is not None:
            hand_over(stretches, sender)
            num_right += sum(map(len, stretches))
        elif receiver is not None:
            found = take_over(stretches, receiver)
            sent = [value for values in stretches for value in values]
            assert len(found) == len(sent)
            num_right += sum(map(same, found, sent))
    return num_right


def count_operations(rank: int, num_ranks: int, num: int) -> list[int]:
    """How many operations a stretch of ``num`` messages alike takes over gloo; then how many one
    takes in which every second message differs, and one in which messages grow."""
    store = dist.distributed_c10d._get_default_store()
    sender, receiver = make_channel(rank, 4, "gloo", store, "count")
    counts = []
    large = [[torch.zeros(50_000) for j in range(num)]]
    few, many = ([[value_of(forms[j % 2], j) for j in range(num)]] for forms in ((0, 0), (0, 2)))
    original = gloo_end.End._start
    for stretch in (few, many, large):
        with mock.patch.object(
            gloo_end.End, "_start", autospec=True, side_effect=original
        ) as start:
            if sender is not None:
                hand_over(stretch, sender)
            elif receiver is not None:
                take_over(stretch, receiver)
            counts.append(start.call_count)
    return counts


def keep_memory(rank: int, num_ranks: int, num_floats: int) -> tuple[int, int]:
    """Send as PACI does over its first hop, with slack; return what both ends keep.

    First the plan says it: of the receiver, or of the sender.
    """
    hop = Hop.of(paci.PACI(4, 2, slack=1), 0)
    store = dist.distributed_c10d._get_default_store()
    point = MeetingPoint(store, "memory", rank, 1 - rank, 60.0, threading.Event())
    end = (GlooSender if rank == 0 else GlooReceiver)(
        point, Ends(rank, 1 - rank, 60.0), hop.receives_ahead
    )
    values = [torch.zeros(num_floats)] * 60
    planned = posted_bytes(hop, [4 * num_floats])
    if isinstance(end, Sender):
        hand_over([values], end)
        return KEPT_PER_RECEIVE * planned, end.kept_bytes
    take_over([values], end)
    return planned, end.reserved_bytes


def outrun(rank: int, num_ranks: int, capacity: int, num_messages: int, kind: str) -> list[int]:
    """Rank 0 sends without pause, rank 1 receives when told to, and keeps what it got.

    Returns how many sends had returned when nothing had been received, and at the end; or what
    was received, looked at when all of it was there.
    """
    store = dist.distributed_c10d._get_default_store()
    messages = [Message(Payload.ACTIVATION, 1, j) for j in range(num_messages)]
    sender, receiver = make_channel(rank, capacity, kind, store)
    if receiver is not None:
        store.wait(["go"])
        kept = [receiver.receive(message)[0] for message in messages]
        receiver.finish()
        return [int(tensor[0]) for tensor in kept]
    assert sender is not None
    sent = []

    def send_all() -> None:
        for message in messages:
            sender.send(message, (torch.full((1000,), float(message.micro_batch)),))
            sent.append(message)

    thread = threading.Thread(target=send_all)
    thread.start()
    limit_s = time.monotonic() + 60
    while len(sent) < capacity and time.monotonic() < limit_s:
        time.sleep(0.01)
    time.sleep(0.3)  # in which a sender that is not held would get further
    held_at = len(sent)
    store.set("go", "")
    thread.join()
    sender.seal()
    sender.finish()
    return [held_at, len(sent)]


def make_channel(
    rank: int, capacity: int, kind: str, store: dist.Store, name: str = ""
) -> tuple[Sender | None, Receiver | None]:
    """The end of a channel from rank 0 to rank 1 that ``rank`` has.

    Of kind ``nccl`` it takes the steps that it takes on CUDA, over gloo.
    """
    ends = Ends(rank, 1 - rank, 60.0)
    if kind == "nccl":
        link = Link(dist.new_group([0, 1]), ends, torch.device("cpu"))
        if rank == 0:
            sender = NcclSender(link, capacity)
            sender.open(Message(Payload.ACTIVATION, 1, 0))
            return sender, None
        receiver = NcclReceiver(link)
        receiver.open(Message(Payload.ACTIVATION, 1, 0))
        return None, receiver
    if kind == "gloo":
        point = MeetingPoint(store, f"channel{name}", rank, 1 - rank, 60.0, threading.Event())
        if rank == 0:
            return GlooSender(point, ends, lambda _: capacity), None
        return None, GlooReceiver(point, ends, lambda _: capacity)
    if rank == 0:
        meeting = Meeting()
        store.set(f"path{name}", meeting.path)
        connection = meeting.accept(60.0)
        meeting.close()
        return SharedSender(connection, ends, capacity), None
    connection = visit(store.get(f"path{name}").decode())
    assert connection is not None
    return None, SharedReceiver(connection, ends, capacity)
