"""Cuts within memory against brute force; profiles, search and ``paci plan``."""

from __future__ import annotations

import itertools
import random
import re
import socket
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from paci.errors import ConfigError
from paci.models import gpt_config, num_parameters
from paci.models.estimate import estimate_profile
from paci.plan.encoding import Encoding, int8_bytes
from paci.plan.given import GivenSchedule
from paci.plan.profile import (
    DeviceProfile,
    LayerProfile,
    LinkProfile,
    Profile,
    load_profile,
    parse_profile,
    save_profile,
)
from paci.plan.search import explain, search
from paci.plan.stage_memory import RECEIVES_AHEAD, ring_bytes
from paci.plan.stages import Layout
from paci.runtime.transport.boundary import Form, Spec, notice_of, specs_of
from paci.runtime.transport.channel import Ends
from paci.runtime.transport.nccl import Lane, NcclReceiver
from paci.runtime.transport.shared_memory import SharedReceiver, SharedSender
from paci.schedule.action import Kind, Message, Payload
from paci.schedule.base import Schedule
from paci.schedule.paci import PACI
from paci.schedule.paci_v import PaciV


def drawn_profile(source: random.Random, num_layers: int, num_stages: int) -> Profile:
    layers = tuple(
        LayerProfile(
            forward_s=source.choice([0.1, 0.2, 0.3, source.random()]),
            backward_s=source.choice([0.2, 0.4, source.random()]),
            update_s=source.choice([0.0, 0.1]),
            weight_bytes=source.randint(0, 20),
            gradient_bytes=source.randint(0, 5),
            optimizer_bytes=source.randint(0, 5),
            kept_bytes=source.randint(0, 10),
            output_bytes=source.randint(0, 6),
        )
        for _ in range(num_layers)
    )
    devices = tuple(
        DeviceProfile(
            slowdown=source.choice([1.0, 1.5, 0.7]),
            memory_bytes=source.choice([None, source.randint(20, 120)]),
        )
        for _ in range(num_stages)
    )
    links = tuple(
        LinkProfile(bytes_per_s=source.choice([float("inf"), 5.0, 20.0]))
        for _ in range(max(num_stages - 1, 1))
    )
    return Profile(
        layers=layers,
        micro_batch_size=2,
        input_bytes=3,
        devices=devices,
        links=links,
        transport="nccl",
    )


def bytes_by_hand(profile: Profile, layers: range, held: int, recompute: bool) -> int:
    total = kept = 0
    for index in layers:
        layer = profile.layers[index]
        total += layer.weight_bytes + layer.gradient_bytes + layer.optimizer_bytes
        kept += layer.kept_bytes
    first = layers[0]
    taken = profile.layers[first - 1].output_bytes if first else profile.input_bytes
    total += held * taken + kept if recompute else held * kept
    if first:
        total += 2 * taken
    if layers[-1] + 1 < len(profile.layers):
        total += 2 * profile.layers[layers[-1]].output_bytes
    return total


def best_by_hand(
    profile: Profile, num_stages: int, a: int, slack: int, recompute: bool
) -> tuple[range, ...] | None:
    num_layers = len(profile.layers)
    found = []
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        cut = [range(x, y) for x, y in itertools.pairwise([0, *inner, num_layers])]
        costs = []
        for stage, layers in enumerate(cut):
            device = profile.devices[stage]
            held = (1 + slack) * (num_stages - 1 - stage) + 1
            limit = device.memory_bytes
            if limit is not None and bytes_by_hand(profile, layers, held, recompute) > limit:
                break
            cost = Fraction()
            for index in layers:
                layer = profile.layers[index]
                forwards = 2 if recompute else 1
                seconds = forwards * layer.forward_s + layer.backward_s + layer.update_s / a
                cost += Fraction(seconds) * Fraction(device.slowdown)
            if stage < num_stages - 1:
                sent = profile.layers[layers[-1]].output_bytes / profile.links[stage].bytes_per_s
                cost = max(cost, Fraction(sent))
            costs.append(cost)
        else:
            rank = max(costs), sum(cost * cost for cost in costs), [len(each) for each in cut]
            found.append((rank, tuple(cut)))
    return min(found)[1] if found else None


@pytest.mark.parametrize("seed", range(150))
def test_a_cut_within_memory_is_the_best_of_all_cuts(seed: int):
    source = random.Random(seed)
    num_stages = source.randint(1, 5)
    num_layers = source.randint(num_stages, 12)
    profile = drawn_profile(source, num_layers, num_stages)
    a, slack, recompute = source.randint(1, 4), source.randint(0, 1), source.random() < 0.3
    layout = Layout(profile, PACI(num_stages, a, slack=slack), recompute)
    expected = best_by_hand(profile, num_stages, a, slack, recompute)
    assert layout.fits() == (expected is not None)
    if expected is not None:
        assert layout.cut() == expected
        return
    with pytest.raises(ConfigError, match="must fit the memory of their devices") as error:
        layout.cut()
    # With as many bytes more as it says, it does fit; with one less it does not.
    more = int(re.search(r"it takes ([\d,]+) bytes more", str(error.value))[1].replace(",", ""))
    assert layout_with(profile, layout, more).fits()
    assert not layout_with(profile, layout, more - 1).fits()
    assert ("recomputation, which fits" in str(error.value)) == (
        not recompute and best_by_hand(profile, num_stages, a, slack, True) is not None
    )


def layout_with(profile: Profile, layout: Layout, more: int) -> Layout:
    devices = tuple(
        each
        if each.memory_bytes is None
        else DeviceProfile(slowdown=each.slowdown, memory_bytes=each.memory_bytes + more)
        for each in profile.devices
    )
    wider = profile.model_copy(update={"devices": devices})
    return Layout(wider, layout.schedule, layout.recompute)


def test_the_random_instances_are_of_both_kinds():
    fits = []
    for seed in range(150):
        source = random.Random(seed)
        num_stages = source.randint(1, 5)
        profile = drawn_profile(source, source.randint(num_stages, 12), num_stages)
        fits.append(best_by_hand(profile, num_stages, 2, 0, False) is not None)
    assert 30 < sum(fits) < 120


def test_96_layers_are_cut_into_64_stages():
    source = random.Random(0)
    layers = tuple(
        LayerProfile(
            forward_s=source.random(), backward_s=source.random(), kept_bytes=1, output_bytes=9
        )
        for _ in range(96)
    )
    profile = Profile(
        layers=layers,
        micro_batch_size=1,
        devices=(DeviceProfile(memory_bytes=10**6),),
        links=(LinkProfile(bytes_per_s=1e3),),
    )
    cut = Layout(profile, PACI(64, 64)).cut()
    assert len(cut) == 64
    assert [layer for stage in cut for layer in stage] == list(range(96))


def test_workers_with_several_stages_are_evened_out():
    # A V on two workers, (0, 3) and (1, 2): a cut into even stages is not one into even workers.
    costs = [1, 1, 1, 1, 1, 1, 6]
    layers = tuple(LayerProfile(forward_s=c, backward_s=0, kept_bytes=1) for c in costs)
    rows = ((), ())
    schedule = GivenSchedule(4, 1, "v", ((0, 3), (1, 2)), rows)
    cut = Layout(Profile(layers=layers, micro_batch_size=1), schedule).cut()
    sums = [sum(costs[layer] for layer in stage) for stage in cut]
    assert max(sums[0] + sums[3], sums[1] + sums[2]) == 7  # the last layer, and one at least
    assert [layer for stage in cut for layer in stage] == list(range(7))


class Posted:
    """A link that brings the form of a message of ``specs``, then whatever."""

    device = torch.device("cpu")

    def __init__(self, specs: tuple[Spec, ...]) -> None:
        self._notice = notice_of(Form(specs).encode())

    def receive(self, tensor: torch.Tensor, message: Message, lane: Lane) -> None:
        if lane is Lane.NOTICE:
            tensor[: len(self._notice)] = torch.frombuffer(self._notice, dtype=torch.uint8)

    def wait(self, work: None, verb: str, message: Message, lane: Lane) -> None:
        pass


@pytest.mark.parametrize("shapes", [[(3, 5)], [(1,), (40, 2)]])
def test_receivers_set_aside_what_the_plan_says(shapes: list[tuple[int, ...]]):
    tensors = tuple(torch.zeros(shape) for shape in shapes)
    sizes, message = [each.nbytes for each in tensors], Message(Payload.ACTIVATION, 1, 0)
    posted = NcclReceiver(Posted(specs_of(tensors)))
    posted.receive(message)
    assert posted.reserved_bytes == RECEIVES_AHEAD * sum(sizes)
    ends = Ends(0, 1, 5.0)
    connections = socket.socketpair()
    sender, receiver = (
        SharedSender(connections[0], ends, 3),
        SharedReceiver(connections[1], ends, 3),
    )
    sender.send(message, tensors)
    receiver.receive(message)
    ring = ring_bytes(sizes, 3)
    assert receiver.reserved_bytes == ring >= 6 * sum(sizes)
    assert ring_bytes(sizes, 3, num_held=2) == ring - 2 * sum(sizes)
    sender.close()
    receiver.close()


def test_only_messages_between_workers_need_memory():
    layers = (LayerProfile(forward_s=1, backward_s=1, output_bytes=640),) * 4
    profile = Profile(layers=layers, micro_batch_size=1, transport="shared")

    def received(schedule: Schedule) -> list[int]:
        layout = Layout(profile, schedule)
        return [layout.memory(s, s, s + 1).receive_bytes for s in range(4)]

    # A ring of 2 * 5 slots each way, less the inputs that are in flight at each stage.
    assert received(PACI(4, 4)) == [640 * n for n in (10, 20 - 3, 20 - 2, 10 - 1)]
    schedule = PaciV(4, 4)  # two workers: stages 0 and 3, 1 and 2
    ring = 2 * schedule.channel_capacity
    held = [schedule.in_flight_cap(stage) for stage in range(4)]
    assert received(schedule) == [640 * n for n in (ring, ring - held[1], ring, ring - held[3])]


def test_stages_add_their_layers_up():
    profile = parse_profile(
        {
            "micro_batch_size": 1,
            "input_bytes": 7,
            "layers": [
                {"forward_s": 1, "backward_s": 2, "backward_input_s": 0.5, "output_bytes": 11},
                {"forward_s": 3, "backward_s": 4, "backward_input_s": 1.5, "output_bytes": 13},
                {"forward_s": 5, "backward_s": 6, "backward_input_s": 2.5, "update_s": 0.25},
            ],
            "devices": [{"slowdown": 2}, {}],
            "links": [{"latency_s": 0.5, "bytes_per_s": 100}],
        }
    )
    layout = Layout(profile, PACI(2, 4))
    costs = layout.costs((range(2), range(2, 3)))
    first, second = costs.stages
    assert (first.forward_s, first.backward_s, first.backward_input_s) == (8.0, 12.0, 4.0)
    assert (first.activation_bytes, first.gradient_bytes) == (13, 0)
    assert (second.activation_bytes, second.gradient_bytes, second.update_s) == (0, 13, 0.25)
    assert costs.link_between(0, 1).latency_s == costs.link_between(1, 0).latency_s == 0.5
    again = Layout(profile, PACI(2, 4), recompute=True).stage_cost(1, 2, 3)
    assert (again.forward_s, again.backward_s) == (5.0, 11.0)
    assert again.seconds(Kind.BACKWARD_INPUT) == 7.5
    assert again.seconds(Kind.BACKWARD_WEIGHT) == 3.5


def test_messages_are_priced_as_they_are_encoded():
    made = {"output_bytes": 3 * 4 * 300, "output_width": 300, "output_itemsize": 4}
    layers = [LayerProfile(forward_s=1, backward_s=1, **made)] * 2
    layers.append(LayerProfile(forward_s=1, backward_s=1, output_bytes=77))  # integers besides
    layers.append(LayerProfile(forward_s=1, backward_s=1))
    link = LinkProfile(bytes_per_s=1000.0)
    profile = Profile(layers=tuple(layers), micro_batch_size=1, links=(link,))
    encoding = Encoding("int8+none", int8_bytes)
    schedule = PACI(4, 4)
    cut = tuple(range(k, k + 1) for k in range(4))
    plain, coded = Layout(profile, schedule), Layout(profile, schedule, encoding=encoding)
    sizes = [
        [(each.activation_bytes, each.gradient_bytes) for each in layout.costs(cut).stages]
        for layout in (plain, coded)
    ]
    assert sizes[0] == [(3600, 0), (3600, 3600), (77, 3600), (0, 77)]
    assert sizes[1] == [(3 * 304, 0), (3 * 304, 3600), (77, 3600), (0, 77)]
    # A slow link is as fast as its slower direction; memory holds what is received.
    nccl = profile.model_copy(update={"transport": "nccl"})
    found = Layout(nccl, schedule, encoding=encoding).memory(1, 1, 2).receive_bytes
    assert found == 2 * (3 * 304 + 3600)
    assert Layout(nccl, schedule).memory(1, 1, 2).receive_bytes == 2 * (3600 + 3600)
    # Over gloo a packet has a header. Four receives are posted from and to stage 0, three from and
    # to stage 2; twice as many messages are kept.
    small, large = 64 + 960, 64 + 3648
    received, kept = 4 * small + 3 * large, 2 * (4 * large + 3 * small)
    assert coded.memory(1, 1, 2).receive_bytes == received + kept
    shared = profile.model_copy(update={"transport": "shared"})
    ring, held = 2 * schedule.channel_capacity, schedule.in_flight_cap(2)
    found = Layout(shared, schedule, encoding=encoding).memory(2, 2, 3).receive_bytes
    assert found == ring * 960 + ring * 128  # inputs were decoded, and lie elsewhere
    found = Layout(shared, schedule).memory(2, 2, 3).receive_bytes
    assert found == ring * 3648 - held * 3600 + ring * 128


# --- profiles -------------------------------------------------------------------------------

_LAYER = {"forward_s": 0.1, "backward_s": 0.2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers in the profile must be"),
        ({"layers": None}, "layers in the profile must be"),
        ({"layers": [{"forward_s": 1}]}, "layers.0.backward_s in the profile must be there"),
        ({"layers": [_LAYER | {"forward_s": -1}]}, r"layers.0.forward_s .* got -1"),
        ({"layers": [_LAYER | {"forward_s": float("nan")}]}, "layers.0.forward_s"),
        ({"layers": [_LAYER | {"backward_s": 1e9}]}, "layers.0.backward_s .* less than or equal"),
        ({"layers": [_LAYER | {"kept_bytes": 10**30}]}, "layers.0.kept_bytes"),
        ({"layers": [_LAYER | {"kept_bytes": -3}]}, "layers.0.kept_bytes .* got -3"),
        ({"layers": [_LAYER | {"backward_input_s": 0.3}]}, "layers.0 .* at most backward_s"),
        ({"layers": [_LAYER | {"speed": 3}]}, "layers.0.speed .* must be left out"),
        ({"layers": [_LAYER | {"forward_s": "fast"}]}, "layers.0.forward_s .* got 'fast'"),
        ({"micro_batch_size": 0}, "micro_batch_size .* got 0"),
        ({"links": [{"bytes_per_s": 0}]}, "links.0.bytes_per_s"),
        ({"devices": [{"memory_bytes": 0}]}, "devices.0.memory_bytes"),
        ({"devices": [{"slowdown": 0}]}, "devices.0.slowdown"),
        ({"jitter": -0.1}, "jitter"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(change: dict[str, object], message: str):
    good = {"micro_batch_size": 2, "layers": [_LAYER]}
    parse_profile(good)
    with pytest.raises(ConfigError, match=message) as error:
        parse_profile(good | change)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        parse_profile([good])


def test_a_profile_is_a_file(tmp_path: Path):
    profile = drawn_profile(random.Random(1), 4, 2)
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a profile must be a readable JSON file, got .*p\.json"):
        load_profile(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="a profile must be a readable JSON file"):
        load_profile(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="out must be a file that can be written"):
        save_profile(profile, tmp_path / "no" / "p.json")


def test_an_estimate_counts_every_parameter():
    config = gpt_config("gpt2-medium", vocab_size=50257, context=1024)
    profile = estimate_profile(config, 4, 1e14, "bf16", "adamw")
    assert len(profile.layers) == len(config.layer_range)
    assert sum(layer.gradient_bytes for layer in profile.layers) == 4 * num_parameters(config)
    assert sum(layer.optimizer_bytes for layer in profile.layers) == 8 * num_parameters(config)
    assert profile.layers[0].output_bytes == 4 * 1024 * 1024 * 2
    # 6 operations a parameter of a matrix and token, and the attention's.
    seconds = sum(layer.forward_s + layer.backward_s for layer in profile.layers)
    matrices = 24 * 12 * 1024**2 + 50257 * 1024
    attention = 24 * 2 * 1024 * 1024
    assert seconds == pytest.approx(6 * 4096 * (matrices + attention) / 1e14, rel=1e-3)


# --- search ---------------------------------------------------------------------------------


def test_the_search_ranks_by_time_then_delay():
    layers = tuple(LayerProfile(forward_s=1.0, backward_s=2.0, kept_bytes=10) for _ in range(8))
    profile = Profile(layers=layers, micro_batch_size=1)
    plan = search([profile], 8, [2, 4], ["paci", "1f1b", "paci:slack=1"])
    best = plan.choices[0]
    assert (best.spec, best.schedule.num_workers, best.recompute) == ("paci", 4, False)
    assert best.steady.update_s == pytest.approx(8 * 6.0)
    by_key = {(c.spec, c.schedule.num_workers, c.recompute): c for c in plan.choices}
    assert len(by_key) == 12
    flush = by_key["1f1b", 4, False]
    assert flush.steady.update_s / best.steady.update_s == pytest.approx(11 / 8)
    assert (flush.mean_delay, flush.max_drift) == (0.0, 0)
    # Stage 0 of 4, lag 3, 8 micro-batches: 3 of 8 gradients are one version late.
    assert best.mean_delay == pytest.approx(3 / 8)
    assert best.worker_bytes == (4 * 20, 3 * 20, 2 * 20, 20)
    assert by_key["paci", 4, True].steady.update_s == pytest.approx(8 * 8.0)
    times = [choice.steady.update_s for choice in plan.choices]
    assert times == sorted(times)
    words = "\n".join(explain(plan))
    assert "1.38 times the time" in words
    assert "0.38 updates late on average" in words


def test_what_cannot_be_done_is_listed_with_its_reason():
    layers = tuple(LayerProfile(forward_s=1.0, backward_s=2.0, kept_bytes=10) for _ in range(4))
    tight = DeviceProfile(memory_bytes=30)
    profile = Profile(layers=layers, micro_batch_size=1, devices=(tight,))
    plan = search([profile], 8, [4], ["paci", "paci:slack=1"], recompute=[False, True])
    # Without recomputation stage 0 holds 4 micro-batches of 10 bytes.
    assert [choice.recompute for choice in plan.choices] == [True, True]
    assert {tried for tried, _ in plan.refused} == {
        "paci on 4, micro-batches of 1",
        "paci:slack=1 on 4, micro-batches of 1",
    }
    with pytest.raises(ConfigError, match="must fit the memory"):
        search([profile], 8, [4], ["paci"], recompute=[False])
    with pytest.raises(ConfigError, match="5 stages for 4 layers"):
        search([profile], 8, [5], ["paci"])
    with pytest.raises(ConfigError, match="batch_size must be divisible into micro-batches of 3"):
        search([profile.model_copy(update={"micro_batch_size": 3})], 8, [4], ["paci"])
