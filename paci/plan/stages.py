"""Cut layers into stages: memory and costs of each stage, and the best cut that fits.

Stage ``s`` of a schedule holds at most ``c_s = in_flight_cap(s)`` micro-batches (``N - s`` under
1F1B and PACI, more with slack), so its memory is known from its layers::

    weights (in as many copies as the weight policy keeps) + gradients + optimizer state
      + c_s * (what the layers keep from forward to backward)   or, recomputing,
        c_s * (the stage's input) + (what the layers keep, once)
      + what channels to the neighbours need, with messages as encoded
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from paci.errors import ConfigError
from paci.plan.cost import Costs, Link, StageCost
from paci.plan.encoding import AS_IT_IS, Encoding
from paci.plan.partition import StageCostOf, as_integers, best_cut, require_stages
from paci.plan.profile import Profile
from paci.plan.stage_memory import Channels, PolicyCost, StageMemory, Traffic
from paci.schedule.base import Schedule


@dataclass(frozen=True)
class Layout:
    """A model and a schedule, before the model is cut into stages.

    Args:
        profile: profile of the model and its devices.
        schedule: the schedule to run. With several stages per worker and limited memory, a cut
            that would fit may be missed.
        recompute: whether backwards recompute their forward.
        policies: cost of the weight policy for each stage; if empty, each stage keeps one copy of
            its weights.
        encoding: the codec of messages between stages. What it takes to encode and decode them is
            not priced.
    """

    profile: Profile
    schedule: Schedule
    recompute: bool = False
    policies: tuple[PolicyCost, ...] = ()
    encoding: Encoding = AS_IT_IS

    def memory(self, stage: int, start: int, end: int) -> StageMemory:
        """Return the memory of ``stage`` if it holds layers ``start`` to ``end - 1``."""
        layers = self.profile.layers[start:end]
        kept = sum(layer.kept_bytes for layer in layers)
        cap = self.schedule.in_flight_cap(stage)
        taken, channels = self._boundary_bytes(start), self._channels[stage]
        if self._message_bytes(start)[0] < taken:
            # Decoded, inputs do not stay in the memory that they were received into.
            channels = channels._replace(num_in_flight=0)
        policy = self._policy(stage)
        working = sum(layer.weight_bytes for layer in layers)
        apart = sum(layer.master_bytes for layer in layers)
        full = sum(layer.master_bytes or layer.weight_bytes for layer in layers)
        return StageMemory(
            policy.weight_bytes(working, full),
            policy.master_bytes(full, apart),
            sum(layer.gradient_bytes for layer in layers),
            sum(layer.optimizer_bytes for layer in layers),
            cap * taken + kept if self.recompute else cap * kept,
            channels.num_bytes(self._traffic(start), self._traffic(end, gradients=True)),
        )

    def _policy(self, stage: int) -> PolicyCost:
        return self.policies[stage] if self.policies else PolicyCost()

    @functools.cached_property
    def _channels(self) -> tuple[Channels, ...]:
        stages = range(self.schedule.num_stages)
        return tuple(Channels.of(self.schedule, s, self.profile.transport) for s in stages)

    def _boundary_bytes(self, layer: int) -> int:
        """Return the bytes of the input of ``layer``."""
        return self.profile.layers[layer - 1].output_bytes if layer else self.profile.input_bytes

    def _message_bytes(self, layer: int) -> tuple[int, int]:
        """Return the bytes that are sent for the input of ``layer``, and for its gradient."""
        num_bytes = self._boundary_bytes(layer)
        if not layer:
            return num_bytes, num_bytes
        made = self.profile.layers[layer - 1]
        about = num_bytes, made.output_width, made.output_itemsize
        return self.encoding.activation_bytes(*about), self.encoding.gradient_bytes(*about)

    def _traffic(self, layer: int, gradients: bool = False) -> Traffic:
        """Return what a stage receives and sends at the input of ``layer``.

        It receives activations there, or gradients.
        """
        activation, gradient = ([size] for size in self._message_bytes(layer))
        return Traffic(gradient, activation) if gradients else Traffic(activation, gradient)

    def stage_cost(self, stage: int, start: int, end: int) -> StageCost:
        """Return the costs of ``stage`` if it holds layers ``start`` to ``end - 1``."""
        layers = self.profile.layers[start:end]
        slowdown = self.profile.device(self.schedule.worker_of(stage)).slowdown
        policy = self._policy(stage)
        trials_s = policy.trials * sum(layer.trial_s for layer in layers) * slowdown
        update_s = sum(layer.update_s + policy.passes * layer.copy_s for layer in layers)
        forward_s = sum(layer.forward_s for layer in layers) * slowdown
        backward_s = sum(layer.backward_s for layer in layers) * slowdown
        parts = [layer.backward_input_s for layer in layers]
        known = [part for part in parts if part is not None]
        input_s = sum(known) * slowdown if len(known) == len(parts) else None
        if self.recompute:
            backward_s += forward_s
            input_s = None if input_s is None else input_s + forward_s
        return StageCost(
            forward_s,
            backward_s,
            backward_input_s=input_s,
            update_s=update_s * slowdown,
            activation_bytes=self._message_bytes(end)[0] if end < len(self.profile.layers) else 0,
            gradient_bytes=self._message_bytes(start)[1] if start else 0,
            trial_s=trials_s,
            tried=policy.tried,
        )

    def costs(self, cut: tuple[range, ...], seed: int = 0) -> Costs:
        """Return the costs of a cut for the simulator; ``seed`` is that of its random draws."""
        stages = tuple(
            self.stage_cost(stage, layers.start, layers.stop) for stage, layers in enumerate(cut)
        )
        links = {}
        for low in range(self.schedule.num_workers):
            for high in range(low + 1, self.schedule.num_workers):
                # Workers that are not neighbours talk over the worst link on their way.
                between = [self.profile.link(worker) for worker in range(low, high)]
                link = Link(
                    max(each.latency_s for each in between),
                    min(each.bytes_per_s for each in between),
                    max(each.jitter_s for each in between),
                )
                links[low, high] = links[high, low] = link
        return Costs(
            stages,
            links=links,
            jitter=self.profile.jitter,
            seed=seed,
            overhead_s=self.profile.overhead_s,
        )

    def cut(self) -> tuple[range, ...]:
        """Return the contiguous cut whose slowest stage is fastest, within the devices' memory.

        The cost of a stage is the time of a slot (forward, backward, its share of an update) on
        its device, or the time that a message to or from the next stage occupies the link,
        whichever is longer. The cut is exactly the best; ``paci.plan.partition`` says how ties are
        decided.

        Where workers hold several stages, that cut (with an equal share of the memory for each
        stage) is only the start: single layers are then moved between neighbouring stages for as
        long as that makes the workers more even.

        Raises:
            ConfigError: there are fewer layers than stages, or no cut fits; the message says how
                much memory is missing and what would help.
        """
        num_stages, layers = self.schedule.num_stages, self.profile.layers
        require_stages(len(layers), num_stages)
        found = best_cut(len(layers), num_stages, self._cost_within_memory())
        if found is None:
            raise self._does_not_fit()
        return self._evened(found) if self.schedule.num_workers < num_stages else found

    def _evened(self, cut: tuple[range, ...]) -> tuple[range, ...]:
        """Move single layers to neighbouring stages for as long as workers become more even."""
        cost_of = self._cost_within_memory(limited=False)
        best, rank = cut, self._unevenness(cut, cost_of)
        improved = True
        while improved:
            improved = False
            for moved in _one_layer_moved(best):
                if self._workers_fit(moved) and (other := self._unevenness(moved, cost_of)) < rank:
                    best, rank, improved = moved, other, True
        return best

    def _unevenness(self, cut: tuple[range, ...], cost_of: StageCostOf) -> tuple[int, int]:
        """Return the largest cost of a worker, and the sum of all workers' squared costs."""
        costs = [
            sum(cost_of(stage, cut[stage].start, cut[stage].stop) or 0 for stage in stages)
            for stages in self.schedule.placement
        ]
        return max(costs), sum(cost * cost for cost in costs)

    def _workers_fit(self, cut: tuple[range, ...]) -> bool:
        for worker, stages in enumerate(self.schedule.placement):
            limit = self.profile.device(worker).memory_bytes
            spans = ((stage, cut[stage].start, cut[stage].stop) for stage in stages)
            if limit is not None and sum(self.memory(*each).total_bytes for each in spans) > limit:
                return False
        return True

    def _limit(self, stage: int) -> int | None:
        worker = self.schedule.worker_of(stage)
        limit = self.profile.device(worker).memory_bytes
        return None if limit is None else limit // len(self.schedule.placement[worker])

    def _cost_within_memory(self, limited: bool = True) -> StageCostOf:
        a, num_stages = self.schedule.accumulation, self.schedule.num_stages
        layers = self.profile.layers
        again = 2 if self.recompute else 1
        trials = [self._policy(stage).trials for stage in range(num_stages)]
        work = [
            again * each.forward_s + each.backward_s + each.update_s / a + number * each.trial_s
            for number in trials
            for each in layers
        ]
        workers = [self.schedule.worker_of(stage) for stage in range(num_stages)]
        slowdowns = [self.profile.device(worker).slowdown for worker in workers]
        sent = [
            max(self._message_bytes(end)) / self.profile.link(workers[stage]).bytes_per_s
            for stage in range(num_stages)
            for end in range(len(layers) + 1)
        ]
        # work * slowdown and seconds on a link as integers on one scale.
        slow = as_integers([*slowdowns, 1.0])
        whole = as_integers([*work, *sent])
        firsts = range(0, len(work), len(layers))
        prefixes = [list(accumulate(whole[k : k + len(layers)], initial=0)) for k in firsts]
        wire = whole[len(work) :]
        limits = [self._limit(stage) if limited else None for stage in range(num_stages)]

        def cost_of(stage: int, start: int, end: int) -> int | None:
            limit = limits[stage]
            if limit is not None and self.memory(stage, start, end).total_bytes > limit:
                return None
            cost = (prefixes[stage][end] - prefixes[stage][start]) * slow[stage]
            if end < len(layers):
                cost = max(cost, wire[stage * (len(layers) + 1) + end] * slow[-1])
            return cost

        return cost_of

    def _does_not_fit(self) -> ConfigError:
        """Make the error that says how much memory the best cut lacks, and what would help."""
        num_stages, num_layers = self.schedule.num_stages, len(self.profile.layers)
        limits = [self._limit(stage) for stage in range(num_stages)]

        def excess(stage: int, start: int, end: int) -> int:
            limit = limits[stage]
            needed = self.memory(stage, start, end).total_bytes
            return 0 if limit is None else max(needed - limit, 0)

        closest = best_cut(num_layers, num_stages, excess)
        assert closest is not None, "excess allows everything"
        spans = [(stage, each.start, each.stop) for stage, each in enumerate(closest)]
        worst = max(spans, key=lambda span: excess(*span))
        needed, limit = self.memory(*worst).total_bytes, limits[worst[0]]
        assert limit is not None, "only a limit can be exceeded"
        helps = [f"{needed - limit:,} bytes more on each device"]
        if (
            not self.recompute
            and Layout(self.profile, self.schedule, True, encoding=self.encoding).fits()
        ):
            helps.append("recomputation, which fits")
        return ConfigError(
            f"{num_stages} stages must fit the memory of their devices, got at best "
            f"{needed:,} bytes for stage {worst[0]} (layers {worst[1]} to {worst[2] - 1}) with "
            f"{limit:,} allowed, {needed - limit:,} too many; it takes {' or '.join(helps)}, "
            f"and smaller micro-batches or more stages may do"
        )

    def fits(self) -> bool:
        """Return whether there is a cut within the devices' memory."""
        found = best_cut(
            len(self.profile.layers), self.schedule.num_stages, self._cost_within_memory()
        )
        return found is not None


def _one_layer_moved(cut: tuple[range, ...]) -> Iterator[tuple[range, ...]]:
    """Yield every cut that moves one boundary by one layer and leaves no stage empty."""
    for place, (left, right) in enumerate(itertools.pairwise(cut)):
        for boundary in (left.stop - 1, left.stop + 1):
            if left.start < boundary < right.stop:
                middle = range(left.start, boundary), range(boundary, right.stop)
                yield (*cut[:place], *middle, *cut[place + 2 :])
