"""The pipeline that a user's training loop steps through."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paci.errors import ConfigError
from paci.runtime.assemble import OptimizerMaker, SchedulerMaker, build_stages, choose_group, listed
from paci.runtime.connect import open_channels
from paci.runtime.evaluate import evaluate
from paci.runtime.execute import Engine, execute
from paci.runtime.failures import FailureBoard, Failures
from paci.runtime.feed import Feed
from paci.runtime.keywords import KeywordInputs
from paci.runtime.names import Naming, whole_names
from paci.runtime.observation.drift import DriftMeter, DriftReport
from paci.runtime.observation.recorder import Recorder
from paci.runtime.observation.status import Status, StatusBoard, combine
from paci.runtime.result import StepResult
from paci.runtime.stage.batch import as_micro_batch, split_batch
from paci.runtime.stage.checks import check_options
from paci.runtime.stage.loss import as_loss
from paci.runtime.stage.stage import UpdateHook
from paci.runtime.transport.codecs.codec_registry import CodecSpec, make_codecs
from paci.runtime.transport.codecs.coder import coded
from paci.runtime.weights.policy import WeightPolicy
from paci.runtime.weights.policy_registry import prepare_weight_policies, recommended_weights
from paci.runtime.whole_state import state_by_stage, whole_state
from paci.runtime.world import World
from paci.schedule.action import Payload
from paci.schedule.base import Schedule
from paci.schedule.sequence import Cursor, Sequencer
from paci.trace import Trace

DEFAULT_FLUSH_FIRST = 40  # a tenth of a run of `paci train` with its defaults
_EVALUATED_AT_ONCE = 16  # batches between two checks that all processes have as many


class Pipeline:
    """Runs a schedule over the stages of a model, in one process or in many; ``with`` closes it.

    A process that passes all stages runs them all by itself (*virtual*: on any machine, with the
    same bits). Otherwise each process of ``group`` passes the stages that the schedule's
    placement gives it, see ``hosted_stages``, and all call the same methods in the same order.

    Args:
        stage: this process's stage, or a list of its stages in ascending order; any modules, each
            called with the tensors that the one before returned. Parameters must be on the device
            that the stage is to run on.
        schedule: the order of the work; the same on every process.
        optimizer: the optimizer of the stage's parameters, or a list with one for each stage (None
            for a stage that has nothing to train); or a function that makes one from a list of
            parameters, such as ``functools.partial(torch.optim.AdamW, lr=3e-3)``.
        loss_fn: called as ``loss_fn(output, target)`` on the last stage. Either a ``paci.Loss`` (a
            sum over tokens and a count of them, for the exact mean over an update's tokens whatever
            the micro-batches hold) or any criterion that returns a mean over its micro-batch, in
            which case all micro-batches weigh the same. It may return a pair ``(loss, metrics)``
            with a dict of scalars, which are summed or averaged likewise.
        lr_scheduler: stepped after each update of its stage; one, a list, or a function that makes
            one from an optimizer.
        weights: the weight policy: its name, with options as ``lookahead:reach=2``, or an object
            as ``paci.Lookahead(reach=2)``. By default ``lookahead``, unless the schedule flushes
            or has its own. The method as published is ``"current"``.
        flush_first: number of updates at the start of training that each empty the pipeline (delay
            costs most there); by default ``DEFAULT_FLUSH_FIRST``, or 0 if ``weights`` is given.
        max_grad_norm: clip each update's gradient to this norm, taken over one stage alone.
        precision: ``"fp32"``, or ``"bf16"`` for one bf16 working copy of each weight beside fp32
            masters, gradients and optimizer state; buffers stay as they are. Do not use autocast
            in a stage: it keeps a copy of each weight for every micro-batch in flight.
        group: the pipeline's processes; by default all ranks, or this one if it passes all stages.
            If several pipelines run side by side, all ranks build theirs at the same time.
        seed: seed of random numbers in forwards (dropout), mixed with stage and micro-batch.
        timeout_s: longest wait for another process, in seconds; on NCCL a pause between steps
            counts too, since receives are posted ahead.
        trace_capacity: number of newest events that ``trace`` can show, per process.
        share_memory: let processes of one host pass CPU tensors in shared memory, where the
            system can, instead of through torch.distributed: faster, with the same bits.
        codec: makes messages between stages small: a codec's name, with options as
            ``topk:share=0.05``, a ``Codec``, or a pair (activations, gradients); see
            ``paci.runtime.transport.codecs``. It is no state: a saved one loads under any codec.
        on_update: called with the stage and its version in each update; see ``Stage.on_update``.
        names: the names of weights in saved states: the whole model that the stages were cut
            from, or a function of a stage's index and a name in its module. By default as in the
            stages' modules, or as in ``nn.Sequential(*stages)`` if two of them use one name.

    Raises:
        ConfigError: stages, optimizers, processes or configurations do not fit together.

    Source: arXiv 2606.07881 for the default schedule; the interface is ours.
    """

    def __init__(
        self,
        stage: nn.Module | Sequence[nn.Module],
        schedule: Schedule,
        optimizer: OptimizerMaker | Optimizer | Sequence[Optimizer | OptimizerMaker | None] | None,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        lr_scheduler: SchedulerMaker | LRScheduler | Sequence[Any] | None = None,
        weights: str | WeightPolicy | None = None,
        flush_first: int | None = None,
        max_grad_norm: float | None = None,
        precision: str = "fp32",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        timeout_s: float = 600.0,
        trace_capacity: int = 20_000,
        share_memory: bool = True,
        codec: CodecSpec | Sequence[CodecSpec] = None,
        on_update: UpdateHook | None = None,
        names: Naming | None = None,
    ) -> None:
        check_options(seed, trace_capacity, timeout_s, flush_first)
        modules = listed(stage)
        self.schedule = schedule
        self._loss = as_loss(loss_fn)
        self._world = World(schedule, choose_group(group, len(modules), schedule), timeout_s)
        if flush_first is None:
            flush_first = DEFAULT_FLUSH_FIRST if weights is None else 0
        self._num_flushed = 0 if schedule.flushes else flush_first
        policies = prepare_weight_policies(weights or recommended_weights(schedule), schedule)
        codecs = make_codecs(codec)
        self._world.agree(
            {"the schedule": repr(schedule), "weights": repr(policies[0]), "precision": precision}
            | {"the seed": seed, "share_memory": share_memory, "flush_first": self._num_flushed}
            | {"the codec": repr(codecs)}
        )
        held = self._world.stages
        with self._world.refusing_together():
            self.stages = build_stages(
                held,
                schedule,
                modules,
                listed(optimizer, len(modules)),
                listed(lr_scheduler, len(modules)),
                policies,
                self._loss,
                loss_fn,
                precision,
                seed,
                max_grad_norm,
            )
        if on_update is not None:
            for each in self.stages.values():
                each.on_update(on_update)
        self._names = whole_names(dict(zip(held, modules, strict=True)), names, self._world)
        devices = {index: each.device for index, each in self.stages.items()}
        opened = open_channels(schedule, self._world, devices, share_memory)
        self._engine = Engine(
            schedule.num_stages,
            self.stages,
            coded(opened.transport, codecs, seed),
            {index: DriftMeter(schedule, index, policies[index].sees) for index in held},
            Recorder(
                schedule, devices[held[0]], self._world.position, self._world.size, trace_capacity
            ),
        )
        board = None if self._world.group is None else FailureBoard(dist.get_rank(), *opened[1:])
        self._failures = Failures(board)
        self._status_board = StatusBoard(self._world.ranks, self._world.position)
        # Micro-batches of all stretches that have been drained, and of the one that is running.
        self._num_done = self._num_fed = 0
        self._kept = StepResult()  # results that are known, and not returned yet
        self._keywords = KeywordInputs(self._world, [s.call for s in self.stages.values()])
        self._start_stretch()

    @property
    def holds_first(self) -> bool:
        """Whether this process holds the first stage, and so needs the batches' inputs."""
        return 0 in self.stages

    @property
    def holds_last(self) -> bool:
        """Whether this process holds the last stage, and so needs targets and knows the losses."""
        return self.schedule.num_stages - 1 in self.stages

    @property
    def busy_s(self) -> float:
        """Seconds spent in this process's actions so far; on CUDA up to the last drain."""
        return self._engine.recorder.busy_s

    @property
    def num_micro_batches(self) -> int:
        """The number of micro-batches fed since the start of training."""
        return self._num_done + self._num_fed

    def step(self, batch: Any = None, targets: Any = None, /, **direct: Any) -> StepResult:
        """Feed the micro-batches of one update and run until the schedule asks for more.

        Does not empty the pipeline (unless the schedule flushes, or for ``flush_first``): what it
        cannot finish, later steps or ``drain`` will. Returns the losses that became known.

        Args:
            batch: ``(inputs, targets)`` or a list of micro-batches, see ``split_batch``; or the
                inputs alone, if ``targets`` are given. The process with the first stage reads
                inputs, that with the last targets; others may pass None. It must stay unchanged
                until its backwards have run, perhaps in later steps: pass fresh tensors.
            targets: see ``batch``.
            direct: keyword inputs (an attention mask), cut likewise, for every stage whose forward
                has a parameter of that name. All processes pass the same names in all steps.

        Raises:
            ConfigError: the batch is missing or cannot be cut, or an earlier one was written to.
            WorkerError: another process failed, or a wait took longer than ``timeout_s``.
            DriftError: a stage met other weight versions than its program predicts.
        """
        self._failures.require_none()
        with self._failures.shared():
            refusal = self._keywords.refusal_of_step(direct.keys())
        if refusal is not None:
            raise refusal
        with self._failures.shared():
            self._feed_batch(batch if targets is None else (batch, targets), direct)
        with self._failures.final():
            self._num_fed += self.schedule.accumulation
            self._sequencer.feed(self._num_fed)
            self._run()
        if self.num_micro_batches <= self._num_flushed * self.schedule.accumulation:
            return self.drain()
        return self._result()

    def drain(self) -> StepResult:
        """Finish all micro-batches that were fed; afterwards none is in flight anywhere.

        Needed before a checkpoint and at the end of training. The next ``step`` fills the pipeline
        anew, which costs what one flush costs: about ``num_stages - 1`` slots.
        """
        self._failures.require_none()
        if not self._num_fed:
            return self._result()
        with self._failures.final():
            self._sequencer.drain()
            self._run()
            self._engine.finish()
        result = self._result()
        self._num_done += self._num_fed
        self._num_fed = 0
        return result

    def evaluate(self, batches: Iterable[Any]) -> float:
        """Return the mean loss over the tokens of ``batches``, the same number on every process.

        Drains the pipeline first. Modules run in evaluation mode, with the working weights. Batches
        are read as they are needed, a few at a time.

        Args:
            batches: pairs (inputs, targets) of any sizes; every process passes equally many.

        Returns:
            The mean over tokens, or over batches if ``loss_fn`` returns a mean; nan if there are
                none.

        Raises:
            ConfigError: a batch is no pair, or processes pass different numbers of them.
        """
        self._kept = self.drain()  # losses are for the next result
        total, given = torch.zeros(2, dtype=torch.float64), iter(batches)
        for first in itertools.count(step=_EVALUATED_AT_ONCE):
            with self._failures.shared():
                few = [as_micro_batch(b) for b in itertools.islice(given, _EVALUATED_AT_ONCE)]
                names = {name for batch in few for name in batch.direct}
                numbers = {"the number of evaluation batches": first + len(few)}
                refusal = self._world.disagreement(numbers) or self._keywords.refusal(names)
            if refusal is not None:
                raise refusal
            with self._failures.final(), self._engine.entered():
                total += evaluate(self._engine, few)
            if len(few) < _EVALUATED_AT_ONCE:
                break
        parts = self.gather(total.tolist())
        loss, count = (sum(column) for column in zip(*parts, strict=True))
        return loss / count if count else float("nan")

    def trace(self) -> Trace:
        """Drain; return when each action of the newest stretch ran, on all processes."""
        self._kept = self.drain()  # losses are for the next result
        recorder = self._engine.recorder
        with self._failures.final():
            shift_s = self._world.clock_shift_s()
        return recorder.trace(self.gather((shift_s, recorder.events())))

    def utilization(self) -> float:
        """Drain; return busy time divided by workers times span, over all processes so far.

        Trials of a policy that looks ahead do not count. If one process runs all workers, it is
        what separate devices would have reached.
        """
        return self._share(lambda recorder: recorder.busy_s)

    def trial_share(self) -> float:
        """Drain; return the time of trials divided by workers times span, as ``utilization``."""
        return self._share(lambda recorder: recorder.trial_s)

    def _share(self, seconds: Callable[[Recorder], float]) -> float:
        self._kept = self.drain()  # losses are for the next result
        recorder = self._engine.recorder
        return recorder.share(self.gather((seconds(recorder), recorder.span_s)))

    def drift(self) -> dict[int, DriftReport]:
        """Drain; return the drift and delay of every stage so far, by stage, from all processes."""
        self._kept = self.drain()  # losses are for the next result
        own = {i: copy.deepcopy(meter.report) for i, meter in self._engine.meters.items()}
        return dict(sorted(item for part in self.gather(own) for item in part.items()))

    def bytes_sent(self) -> dict[str, int]:
        """Drain; return the bytes that stages sent each other in training, by payload.

        That is all tensors, as encoded, since this pipeline was built, also inside a process.
        """
        self._kept = self.drain()  # losses are for the next result
        parts = self.gather(self._engine.transport.bytes_sent)
        return {payload.value: sum(part[payload] for part in parts) for payload in Payload}

    def live(self) -> Status:
        """Return utilization and largest drift so far, from the newest report of each process.

        Neither drains nor waits for other processes, so it may lag behind; for progress lines.
        """
        drifts = [max(m.report.drift, default=0) for m in self._engine.meters.values()]
        own = Status(self._engine.recorder.share_busy, max(drifts))
        return combine([own, *self._status_board.exchange(own)])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this process's stages under whole-model names; drain first.

        With ``load_state_dict`` it makes a pipeline a ``Stateful`` of torch.distributed.checkpoint:
        ``dcp.save({"pipeline": pipeline}, checkpoint_id=folder)`` on all processes, and
        ``dcp.load`` likewise. Layout: ``paci.runtime.whole_state``. Tensors are not copied, but
        for those in options of optimizers and in the state of schedulers.

        Raises:
            ConfigError: micro-batches are in flight, or such an option or state cannot be saved.
        """
        self._require_drained("state_dict")
        return whole_state(self.stages, self._names, self._num_done)

    def model_state_dict(self) -> dict[str, Tensor]:
        """Return this process's weights and buffers by whole-model name; drain first."""
        self._require_drained("model_state_dict")
        return {
            self._names[index][name]: value
            for index, stage in self.stages.items()
            for name, value in stage.module.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned into the stages that this process holds.

        All processes call it, each with the state of its own stages.

        Raises:
            ConfigError: micro-batches are in flight, or the state of any process is of other
                stages, another accumulation, another weight policy or another moment than the
                others'; no process has loaded anything then.
        """
        self._require_drained("load_state_dict")
        with self._world.refusing_together():
            by_stage = state_by_stage(state, self.stages, self._names)
            for index, stage in self.stages.items():
                stage.require_state(by_stage[index], state["num_micro_batches"])
        self._world.agree({"the state's number of micro-batches": state["num_micro_batches"]})
        with self._failures.final():
            for index, stage in self.stages.items():
                stage.load_state_dict(by_stage[index])
        self._num_done = state["num_micro_batches"]
        self._start_stretch()

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Report an error raised inside to all processes, as ``step`` does; raise the first one."""
        with self._failures.shared():
            yield

    def close(self) -> None:
        """Close the channels and stop watching for failures of other processes.

        All processes call it, when all are done; the pipeline cannot be used afterwards.
        """
        self._failures.close()
        for stage in self.stages.values():
            stage.close()
        self._engine.transport.close()
        self._world.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_stretch(self) -> None:
        """Start a stretch: the pipeline is empty, and micro-batches are counted from 0 again."""
        self._feed = Feed(self._num_done)
        workers = self._world.workers
        self._sequencer: Cursor | Sequencer = (
            Cursor(self.schedule, workers[0]) if len(workers) == 1 else Sequencer(self.schedule)
        )
        for index, stage in self.stages.items():
            self._engine.meters[index].start(stage.version)
        self._engine.recorder.start()

    def _run(self) -> None:
        """Run all of this process's actions that can run now.

        A process with one worker follows that worker's program. One with several picks its own
        actions from one legal order of all workers' actions, which cannot block.
        """
        own = (action for action in self._sequencer.actions() if action.stage in self.stages)
        with torch.enable_grad(), self._engine.entered():  # wherever the user's loop calls from
            execute(own, self._engine, self._feed)

    def _feed_batch(self, batch: Any, direct: Mapping[str, Any]) -> None:
        if not self._num_fed:
            self._start_stretch()
        needed = self.holds_first or self.holds_last
        if batch is None and needed:
            raise ConfigError(
                "a process with the first or the last stage must be given a batch, got None; pass "
                "(inputs, targets)"
            )
        whole = batch if needed else (None, None)
        parts = split_batch(whole, self.schedule.accumulation, direct)
        self._feed.put(self._num_fed, parts, self.stages, self._loss)

    def _result(self) -> StepResult:
        """Return all results that have not been returned yet."""
        kept, self._kept = self._kept, StepResult()
        return kept.followed_by(self._feed.take_result(self.schedule.accumulation))

    def gather(self, own: Any) -> list[Any]:
        """Return ``own``, any picklable value, of every process in order, on every process."""
        with self._failures.final():
            return self._world.gather(own)

    def _require_drained(self, what: str) -> None:
        if self._num_fed:
            raise ConfigError(
                f"{what} needs an empty pipeline, got {self._num_fed} micro-batches fed since it "
                f"last was; call drain() first"
            )
