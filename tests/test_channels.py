"""Channels between stages: what messages look like may differ from one to the next."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import channel_helpers
import pytest
import torch
from channel_helpers import NUM_FORMS, Pair, hand_over, messages, plan, same, take_over, value_of
from launching import launch, values
from torch import Tensor, nn

import paci
from paci.plan.stage_memory import KEPT_PER_RECEIVE
from paci.runtime.transport.boundary import Form, arguments, flatten, specs_of, unflatten
from paci.runtime.transport.channel import Ends, LocalChannel
from paci.runtime.transport.shared_memory import SharedReceiver, SharedSender
from paci.schedule.action import Message, Payload

CPU = torch.device("cpu")
MESSAGE = Message(Payload.ACTIVATION, 1, 0)

# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", range(NUM_FORMS))
def test_values_are_put_together_again(form: int):
    value = value_of(form, 3)
    tensors, structure = flatten(value)
    told = Form.decode(Form(specs_of(tensors), structure).encode())
    assert told == Form(specs_of(tensors), structure)
    assert hash(told) == hash(Form(specs_of(tensors), structure))
    again = unflatten(told.structure, tensors)
    assert type(again) is type(value)
    assert same(again, value)
    assert told.fits(tensors, structure)


@pytest.mark.parametrize(
    "value", [None, 1, True, -(2**70), 0.1, -0.0, float("inf"), "", "ü\0\ud800", torch.Size([2, 3])]
)
def test_plain_values_are_kept(value: Any):
    form = Form((), flatten([value])[1])
    (again,) = unflatten(Form.decode(form.encode()).structure, ())
    assert type(again) is type(value)
    assert repr(again) == repr(value)


def test_values_that_are_equal_but_not_the_same_have_structures_that_differ():
    several = [1, True, 1.0, "1", None, -0.0, 0.0, 0, False, (), [], {}, torch.Size(())]
    assert len({flatten(value)[1] for value in several}) == len(several)
    assert flatten(float("nan"))[1] == flatten(float("nan"))[1]
    a, b = torch.ones(1), torch.ones(1)
    assert flatten({"a": a, "b": b})[1] != flatten({"b": b, "a": a})[1]


def test_what_a_function_of_torch_returns_is_kept():
    tensors, structure = flatten(torch.ones(2, 3).max(1))
    again = unflatten(Form.decode(Form((), structure).encode()).structure, tensors)
    assert torch.equal(again.indices, torch.ones(2, 3).max(1).indices)


def test_a_module_is_called_with_the_elements_of_a_tuple_or_list():
    x, y = torch.ones(1), torch.ones(2)
    for value, expected in (
        (x, (x,)),
        ((x, y), (x, y)),
        ([x, (y, None)], (x, (y, None))),
        (Pair(x, y), (x, y)),
        ({"x": x}, ({"x": x},)),
    ):
        tensors, structure = flatten(value)
        assert repr(arguments(structure, tensors)) == repr(expected)
    assert arguments(None, (x, y)) == (x, y)


@dataclasses.dataclass
class Output:
    hidden: Tensor


class ModelOutput(collections.OrderedDict[str, Tensor]):
    pass


def test_what_no_channel_carries_is_refused():
    class Hidden(NamedTuple):
        x: Tensor

    x = torch.ones(2, 3)
    for value, words in (
        (Output(x), "got Output; hand on a dict or a tuple"),
        (ModelOutput(x=x), "got ModelOutput; "),
        ((x, {"a": [x, {x}]}), "got set at [1]['a'][1]; "),
        ({1: x}, "got a dict with other keys than strings; "),
        ([Hidden(x)], "Hidden at [0]; "),
        ((i for i in (x, x)), "got generator; "),
        (x.to_sparse(), "got a tensor that is sparse_coo in the output of stage 2; hand on"),
        ((x, x.to("meta")), "meta in the output of stage 2 at [1]"),
        (
            torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
            "got a tensor that is nested",
        ),
    ):
        with pytest.raises(paci.ConfigError) as error:
            flatten(value, "the output of stage 2")
        assert "the output of stage 2" in str(error.value)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


# --- within a process ---------------------------------------------------------------------------


def test_a_local_channel_carries_all_forms():
    channel, sent = LocalChannel(CPU), plan(1)
    for stretch in sent:
        hand_over([stretch], _Unfinished(channel))
        assert all(map(same, take_over([stretch], channel), stretch))


class _Unfinished(LocalChannel):
    """The sending end of another channel."""

    def __init__(self, channel: LocalChannel) -> None:
        self._queue = channel._queue

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("through", ["itself", "a view", "what it is a view of"])
def test_a_tensor_that_is_written_to_before_it_is_received_is_refused(through: str):
    channel, base = LocalChannel(CPU), torch.zeros(3)
    sent = base.detach()
    channel.send(MESSAGE, (torch.ones(1), sent))
    {"itself": sent, "a view": sent[1:], "what it is a view of": base}[through].add_(1)
    words = (
        "what stage 0 hands on must not be written to before stage 1 has received it, got a "
        "change in place of the activation of micro-batch 0; hand on"
    )
    with pytest.raises(paci.ConfigError, match=words):
        channel.receive(MESSAGE)
    channel.send(MESSAGE, (sent,))
    (received,) = channel.receive(MESSAGE)
    received.add_(1)  # it is the receiver's now
    with torch.inference_mode():
        unknown = torch.zeros(3)
        channel.send(MESSAGE, (unknown,))
        channel.receive(MESSAGE)


# --- memory that is shared ----------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[tuple[SharedSender, SharedReceiver]]:
    """Both ends of a channel with two messages under way at most, in one process."""
    connections, ends = socket.socketpair(), Ends(0, 1, 5.0)
    channel = SharedSender(connections[0], ends, 2), SharedReceiver(connections[1], ends, 2)
    yield channel
    for end in channel:
        end.close()


def test_memory_grows_while_tensors_in_the_old_one_are_held(shared: tuple[Any, Any]):
    sender, receiver = shared
    sent = [torch.full((size,), float(size)) for size in (10, 200, 7, 5000, 4000, 30)]
    held, sizes = [], []
    for before, after in zip(sent[::2], sent[1::2], strict=True):
        # The second goes into new memory while the first is still under way in the old.
        sender.send(MESSAGE, (before,))
        sender.send(MESSAGE, (after,))
        held += [receiver.receive(MESSAGE)[0] for _ in range(2)]
        sizes.append(receiver.reserved_bytes)
    assert all(map(torch.equal, held, sent))
    assert sizes[0] < sizes[1] == sizes[2]  # for smaller ones it stays
    addresses = [tensor.data_ptr() for tensor in held]
    assert [receiver.holds(address) for address in addresses[:3]] == [False] * 3
    del held[:4]
    gc.collect()
    for j in range(20):
        sender.send(MESSAGE, (torch.full((5000,), float(j)),))
        assert receiver.receive(MESSAGE)[0][-1] == j
    assert all(map(torch.equal, held, sent[4:]))


def test_a_sender_is_held_at_its_capacity_though_its_memory_grows(shared: tuple[Any, Any]):
    sender, receiver = shared
    sender._ends = Ends(0, 1, 0.2)
    for size in (10, 1000):
        sender.send(MESSAGE, (torch.ones(size),))
    with pytest.raises(paci.WorkerError, match="got nothing for"):
        sender.send(MESSAGE, (torch.ones(100_000),))
    receiver.receive(MESSAGE)
    sender.send(MESSAGE, (torch.ones(100_000),))
    assert [receiver.receive(MESSAGE)[0].numel() for _ in range(2)] == [1000, 100_000]


def test_messages_alike_take_two_bytes_on_the_socket(shared: tuple[Any, Any]):
    sender, receiver = shared
    hand_over([[value_of(4, 0)]], sender)
    take_over([[value_of(4, 0)]], receiver)
    for message, value in messages([value_of(4, 0)] * 5):
        sender.send(message, *flatten(value))
        assert len(receiver._connection.recv(100, socket.MSG_PEEK)) == 2
        receiver.receive(message)


# --- between processes --------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 7])
@pytest.mark.parametrize("kind", ["shared", "gloo", "nccl"])
def test_all_forms_in_any_order(tmp_path: Path, kind: str, capacity: int):
    seeds = [capacity, 10 + capacity, 20 + capacity]
    sent, right = values(launch(tmp_path, 2, channel_helpers.hand_over_all, kind, capacity, seeds))
    assert right == sent > 480


def test_messages_are_one_operation_each(tmp_path: Path):
    sent, received = values(launch(tmp_path, 2, channel_helpers.count_operations, 50))
    # Receives are posted four ahead, one when the channel is made. When messages grow, there is no
    # room for them in the four that are posted, so four come in two pieces. At the end the
    # receiver thanks, and the sender posts a receive for the next time.
    assert sent == [50 + 1, 50 + 4 + 1, 50 + 4 + 1]
    assert received == [50 + 3 + 1, 50 + 4 + 1, 50 + 4 + 1]


@pytest.mark.parametrize("num_floats", [100, 100_000, 3_000_000])
def test_channels_over_gloo_keep_what_the_plan_says(tmp_path: Path, num_floats: int):
    for planned, kept in values(launch(tmp_path, 2, channel_helpers.keep_memory, num_floats)):
        assert planned == kept
        # Many receives for small messages, as many as slack needs for large ones.
        assert planned >= {100: 7, 100_000: 7, 3_000_000: 3}[num_floats] * 4 * num_floats


@pytest.mark.parametrize(("kind", "times"), [("shared", 1), ("gloo", KEPT_PER_RECEIVE)])
@pytest.mark.parametrize("capacity", [1, 3])
def test_a_sender_is_held_at_its_capacity(tmp_path: Path, capacity: int, kind: str, times: int):
    sender, received = values(launch(tmp_path, 2, channel_helpers.outrun, capacity, 12, kind))
    assert sender == [times * capacity, 12]
    assert received == list(range(12))


def limited(rank: int, num_ranks: int) -> str:
    """Files, and so shared memory, may have a few pages only: activations need more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))
    make = functools.partial(torch.optim.SGD, lr=0.1)
    pipeline = paci.Pipeline(nn.Linear(64, 64), paci.PACI(2, 2), make, nn.MSELoss(), timeout_s=30.0)
    try:
        for _ in range(2):
            pipeline.step((torch.ones(128, 64), torch.ones(128, 64)))
    except paci.PaciError as error:
        return str(error)
    return "no error"


def test_a_limit_on_file_sizes_is_named(tmp_path: Path):
    for said in values(launch(tmp_path, 2, limited)):
        assert "bytes of shared memory, got 'File too large'; raise the limit on file sizes" in said
