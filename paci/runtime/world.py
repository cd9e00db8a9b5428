"""The processes that share a pipeline, and which of them holds which stages."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from paci.errors import ConfigError
from paci.runtime.failures import collective_error
from paci.runtime.gather import Gatherer
from paci.runtime.transport.channel import Ends
from paci.schedule.base import Schedule


def hosted_workers(num_workers: int, position: int, num_processes: int) -> range:
    """Return the schedule's workers that process ``position`` of ``num_processes`` runs.

    They are contiguous and spread as evenly as possible: one per process if the numbers are equal.
    """
    return range(
        -(-position * num_workers // num_processes),
        -(-(position + 1) * num_workers // num_processes),
    )


def hosted_stages(schedule: Schedule, position: int, num_processes: int) -> tuple[int, ...]:
    """Return the stages that process ``position`` of ``num_processes`` holds, ascending.

    These are the stages that the process passes to ``Pipeline``.
    """
    workers = hosted_workers(schedule.num_workers, position, num_processes)
    return tuple(sorted(stage for worker in workers for stage in schedule.placement[worker]))


def require_agreement(what: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Raise ``ConfigError`` on every rank of ``group`` unless all pass equal values.

    All ranks of the group must call this.

    Args:
        what: picklable values by name; the name is used in the error.
        group: by default all ranks.

    Raises:
        ConfigError: two ranks passed different values.
        WorkerError: a rank is gone, or did not answer in time.
    """
    refusal = _first_difference(_gather((dist.get_rank(), dict(what)), group))
    if refusal is not None:
        raise refusal


def _first_difference(everyone: Sequence[tuple[int, dict[str, Any]]]) -> ConfigError | None:
    first_rank, first = everyone[0]
    for rank, other in everyone:
        for key in sorted(first.keys() | other.keys()):
            if other.get(key) != first.get(key):
                return ConfigError(
                    f"all ranks must agree on {key}, got {first.get(key)!r} on rank {first_rank} "
                    f"and {other.get(key)!r} on rank {rank}; start every rank with the same "
                    f"configuration"
                )
    return None


# Groups of the pipeline that was closed last. A group that goes joins its threads and holds
# Python's lock meanwhile, which a thread may need to give up a tensor (PyTorch 2.6 hung there). So
# it goes when the next pipeline is closed, and its threads have long been idle.
_retired: list[dist.ProcessGroup] = []


class World:
    """The processes of one pipeline; one process alone if there is no group.

    Args:
        schedule: the schedule whose workers the processes run.
        group: the pipeline's process group, or None for one process.
        timeout_s: longest wait for another process, in seconds.

    Attributes:
        position: this process's index in the pipeline, from 0.
        ranks: the global rank of each process, by position.
        timeout_s: as given.

    Raises:
        ConfigError: the group lacks this process, or has more processes than there are workers.
    """

    def __init__(
        self, schedule: Schedule, group: dist.ProcessGroup | None, timeout_s: float
    ) -> None:
        self._schedule = schedule
        self.timeout_s = timeout_s
        self.group = group
        self.position = 0 if group is None else dist.get_rank(group)
        if self.position < 0:
            raise ConfigError(
                f"the group of a pipeline must hold the process that builds it, got one without "
                f"rank {dist.get_rank()}; pass each process the group of its own pipeline"
            )
        self.ranks = (0,) if group is None else tuple(dist.get_process_group_ranks(group))
        self._kept: list[Callable[[], Sequence[Any]]] = []
        self._control = None if group is None else self._own_group()
        self._gatherer: Gatherer | None = None
        if self._control is not None:
            self._gatherer = Gatherer(self._control, self.ranks, self.position, timeout_s)
        if len(self.ranks) > schedule.num_workers:
            raise ConfigError(
                f"the world must have at most as many processes as the schedule has workers "
                f"({schedule.num_workers}), got {len(self.ranks)}; start fewer processes or cut "
                f"the model into more stages"
            )

    def _own_group(self) -> dist.ProcessGroup:
        """Make a gloo group of the pipeline's processes for all that is not a message of a channel.

        Its waits end after the pipeline's time-out, not the job's. Every rank of the job takes
        part, in the same order, whatever pipeline it belongs to.
        """
        own: dist.ProcessGroup | None = None
        timeout = timedelta(seconds=self.timeout_s)
        for ranks in sorted(set(self.gather_all(self.ranks))):
            group = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
            if ranks == self.ranks:
                assert isinstance(group, dist.ProcessGroup)
                own = group
        assert own is not None
        return own

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.ranks)

    @property
    def workers(self) -> range:
        """The schedule's workers that this process runs."""
        return hosted_workers(self._schedule.num_workers, self.position, self.size)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this process holds, ascending."""
        return hosted_stages(self._schedule, self.position, self.size)

    def position_of(self, stage: int) -> int:
        """Return the position of the process that holds ``stage``."""
        worker = self._schedule.worker_of(stage)
        for position in range(self.size):
            if worker in hosted_workers(self._schedule.num_workers, position, self.size):
                return position
        raise AssertionError(stage)

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` on every process unless all pass the same ``what``."""
        if (refusal := self.disagreement(what)) is not None:
            raise refusal

    def disagreement(self, what: Mapping[str, Any]) -> ConfigError | None:
        """Return the error that ``agree`` would raise, the same on every process, or None."""
        return _first_difference(self.gather((self.ranks[self.position], dict(what))))

    def gather(self, own: Any) -> list[Any]:
        """Return ``own`` of every process, ordered by position, on every process."""
        return [own] if self._gatherer is None else self._gatherer.gather(own)

    def gather_all(self, own: Any) -> list[Any]:
        """Return ``own`` of every rank of the job, whatever pipeline it belongs to."""
        return _gather(own, dist.group.WORLD)

    def clock_shift_s(self) -> float:
        """Return the seconds to add to this process's clock to get the first process's clock.

        It is 0 on the first process's host; on others it is estimated. All processes of the world
        must call this.
        """
        hosts = self.gather(socket.gethostname())
        if self._gatherer is None or len(set(hosts)) == 1:
            return 0.0
        shift_s = self._gatherer.clock_shift_s()
        return 0.0 if hosts[self.position] == hosts[0] else shift_s

    @contextlib.contextmanager
    def refusing_together(self) -> Iterator[None]:
        """Raise ``ConfigError`` on all processes if any of them raises one inside.

        So no process is left waiting for one that refused. All processes of the world must enter.
        """
        refused: ConfigError | None = None
        try:
            yield
        except ConfigError as error:
            refused = error
        everyone = self.gather(refused and str(refused))
        for rank, message in zip(self.ranks, everyone, strict=True):
            if message is not None and refused is None:
                refused = ConfigError(f"rank {rank} refused: {message}")
        if refused is not None:
            raise refused

    def ends(self, stage: int) -> Ends:
        """Return the ranks of this process and of the holder of ``stage``, and the time-out."""
        return Ends(self.ranks[self.position], self.rank_of(stage), self.timeout_s)

    def rank_of(self, stage: int) -> int:
        """Return the global rank of the process that holds ``stage``."""
        return self.ranks[self.position_of(stage)]

    def keep(self, groups: Callable[[], Sequence[Any]]) -> None:
        """Keep the process groups that ``groups`` returns until after ``close``."""
        self._kept.append(groups)

    def close(self) -> None:
        """Give the process groups up; all processes of the world must be done with them."""
        groups = [group for kept in self._kept for group in kept()]
        self._kept = []
        if self._control is not None:
            groups.append(self._control)
        for group in groups:
            if group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)
        if groups:
            _retired[:] = groups
        self._control = self._gatherer = None


def _gather(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return ``own`` of every process of ``group``, ordered by rank in the group.

    Raises:
        WorkerError: a process is gone, or did not answer in time.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, own, group=group)
    except RuntimeError as error:
        raise collective_error(error) from error
    return everyone
