"""``paci bench convergence``: what delay costs, by method, optimizer, learning rate and seed.

Every run is a ``paci train`` of one process that plays all workers, started with the options of its
method; two processes or many would end with the same bits. A run that has ended adds one line to a
store, so that a sweep which is interrupted goes on where it was, and a wider one keeps what it has.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.methods import find_method
from paci.bench.question import Question, Row, numbers
from paci.bench.runs import best_runs, codec_of, key_of, read_runs, summarize
from paci.errors import ConfigError
from paci.plan.encoding import NO_CODEC
from paci.schedule.base import require_count

if TYPE_CHECKING:
    from paci.bench.turns import Say

_HELD_OUT_BATCHES = 100
# Options of a run that its row in a table is told apart by.
_OWN_OPTIONS = {"optimizer", "stages", "accumulation", "learning_rate", "seed", "precision"}
_TOLD = 200  # characters of a failed run's last words


@dataclass(frozen=True)
class Convergence(Question):
    """A sweep; its fields are the options of the command line.

    Args:
        methods: names out of docs/rivals.md, separated by spaces.
        optimizers: of ``paci train``, separated by spaces.
        learning_rates: at their peak, separated by commas.
        seeds: of weights and data, separated by commas.
        stages: numbers of stages, separated by commas.
        accumulations: micro-batches of an update, separated by commas.
        updates: of a run; methods that update after every micro-batch make more, at equal tokens.
        batch_size: sequences of an update.
        layers: blocks of the GPT.
        width: of the GPT's residual stream.
        context: tokens of a sequence.
        data: text, as of ``paci train``.
        precision: fp32 or bf16.
        held_out: text, as of ``paci train``, on which each run's last checkpoint is evaluated
            besides (``held_out_loss``); none by default.
        evaluations: number in a run, evenly spread; each drains the pipeline.
        warmups: shares of the updates in linear warm-up, separated by commas; each method stands
            at its best, as for learning rates; the trainer's own if empty.
        codecs: of messages between stages, as of ``paci train``, separated by spaces; ``none`` is
            one of them.
        extra: further options of every run, as ``KEY=VALUE`` separated by spaces.
        most: runs to make at most; 0 trains nothing and shows those that are in the store.
        jobs: runs at a time; 0 for as many as there are cores.
        store: a file of JSON lines, one per run; runs that are in it are not made again,
            unless they failed.
        timeout: longest time of a run, in seconds.
    """

    timeout: float = 7200.0
    methods: str = "flush paci lookahead"
    optimizers: str = "muon"
    learning_rates: str = "0.004,0.008"
    seeds: str = "0,1,2"
    stages: str = "8"
    accumulations: str = "8"
    updates: int = 600
    batch_size: int = 32
    layers: int = 8
    width: int = 64
    context: int = 64
    data: str = "stdlib"
    precision: str = "fp32"
    held_out: str = ""
    evaluations: int = 12
    warmups: str = ""
    codecs: str = "none"
    extra: str = ""
    most: int = 100_000
    jobs: int = 0
    store: str = "results/convergence/runs.jsonl"

    name: ClassVar[str] = "convergence"
    summary: ClassVar[str] = "what delay costs: methods, optimizers, learning rates, seeds"
    columns: ClassVar[Mapping[str, str]] = {
        "method": "{method}",
        "optimizer": "{optimizer}",
        "weights": "{weights}",
        "codec": "{codec}",
        "precision": "{precision}",
        "stages": "{num_stages}",
        "accumulation": "{accumulation}",
        "mean delay": "{mean_delay:.2f}",
        "max drift": "{max_drift}",
        "learning rate": "{learning_rate:g}",
        "warm-up": "{warmup:g}",
        "seeds": "{num_seeds}",
        "validation loss": "{val_loss:.4f}",
        "spread": "{spread:.4f}",
        "held-out loss": "{held_out_loss:.4f}",
        "against no codec": "{against_plain:+.2%}",
        "against flush": "{against_flush:+.2%}",
        "tokens to equal loss": "{tokens_to_flush:.2f}",
        "to the best flush's": "{tokens_to_best_flush:.2f}",
        "trials": "{trials_over_busy:.1%}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("updates", "batch_size", "layers", "width", "context", "evaluations"):
            require_count(name, getattr(self, name))
        require_count("jobs", self.jobs, least=0)
        require_count("most", self.most, least=0)
        for name in self.methods.split():
            find_method(name)

    def answer(self, say: Say) -> list[Row]:
        """Make the runs that are missing; return the rows of all that are asked for.

        Interrupted, it returns what there is, with a row that says so.
        """
        store = Path(self.store)
        wanted = list(self.runs())
        known = read_runs(store)
        result = "held_out_loss" if self.held_out else "val_loss"
        missing = [run for run in wanted if result not in known.get(key_of(run), {})]
        say(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them in {store}")
        missing = missing[: self.most]
        store.parent.mkdir(parents=True, exist_ok=True)
        started, interrupted = time.perf_counter(), False
        children: set[subprocess.Popen[str]] = set()
        with concurrent.futures.ThreadPoolExecutor(self.jobs or os.cpu_count()) as pool:
            futures = [
                pool.submit(_train, run, self.held_out, self.timeout, children) for run in missing
            ]
            try:
                for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    row = future.result()
                    known[key_of(row)] = row
                    with store.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    left_s = (time.perf_counter() - started) / count * (len(missing) - count)
                    say(f"{count}/{len(missing)}  {_told(row)}  {left_s / 60:.0f} min left")
            except KeyboardInterrupt:
                interrupted = True
                for child in tuple(children):
                    child.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
        rows: list[Row] = [known[key_of(run)] for run in wanted if key_of(run) in known]
        if interrupted:
            rows.append({"method": "", "problem": "interrupted", "interrupted": True})
        return rows

    def runs(self) -> Iterator[dict[str, Any]]:
        """The options of every run that is asked for, in order."""
        for optimizer, stages, a, name, rate, warmup, codec, seed in itertools.product(
            self.optimizers.split(),
            numbers("stages", self.stages),
            numbers("accumulations", self.accumulations),
            self.methods.split(),
            _floats("learning_rates", self.learning_rates),
            _floats("warmups", self.warmups) if self.warmups else (None,),
            self.codecs.split(),
            numbers("seeds", self.seeds, least=0),
        ):
            own: dict[str, Any] = {} if warmup is None else {"warmup": warmup}
            own |= {} if codec == NO_CODEC else {"codec": codec}
            yield self._run(name, optimizer, stages, a, rate, seed, own)

    def _run(
        self,
        name: str,
        optimizer: str,
        stages: int,
        a: int,
        rate: float,
        seed: int,
        own: Mapping[str, Any],
    ) -> dict[str, Any]:
        method = find_method(name)
        divided = a if method.every_micro_batch else 1
        if self.batch_size % a:
            raise ConfigError(
                f"batch_size must be divisible into {a} micro-batches, got {self.batch_size}; "
                f"choose a multiple"
            )
        updates = self.updates * divided
        options = {
            "schedule": "paci",
            "optimizer": optimizer,
            "flush_first": 0.0,
            **method.options,
            "stages": stages,
            "accumulation": a // divided,
            "learning_rate": rate,
            "seed": seed,
            "updates": updates,
            "batch_size": self.batch_size // divided,
            "layers": self.layers,
            "width": self.width,
            "heads": max(1, self.width // 32),
            "context": self.context,
            "data": self.data,
            "precision": self.precision,
            "eval_every": max(1, updates // self.evaluations),
            **own,
        }
        extra = dict(item.split("=", 1) for item in self.extra.split())
        own_options = sorted(extra.keys() & (_OWN_OPTIONS | own.keys()))
        if own_options:
            raise ConfigError(
                f"extra must leave {', '.join(own_options)} to the sweep's own options, got "
                f"{self.extra!r}; pass it as one of those"
            )
        options |= extra
        coding = {"coding": _coding(options["codec"])} if "codec" in options else {}
        return {
            "method": name,
            "schedule": options["schedule"],
            "optimizer": options["optimizer"],
            "weights": options["weights"],
            "policy": _with_numbers(options["weights"]),
            "num_stages": stages,
            "accumulation": a // divided,
            "learning_rate": rate,
            "seed": seed,
            "precision": self.precision,
            **coding,
            "options": options,
        }

    @classmethod
    def summarize(cls, rows: Sequence[Row]) -> list[Row]:
        """A row for each method in each setting, at the best of its learning rates."""
        return summarize(rows)

    @classmethod
    def draw(cls, rows: Sequence[Row], path: Path) -> bool:
        """Loss over tokens, learning rates and delay."""
        from paci.view.sweep import sweep_picture

        best = best_runs(rows)
        if best:
            sweep_picture(rows, best, path)
        return bool(best)


def _with_numbers(weights: str) -> str:
    """Return a weight policy with all its options, so that a store never mixes two defaults."""
    from paci.runtime.weights.policy_registry import make_weight_policy  # loads torch

    try:
        return repr(make_weight_policy(weights))
    except ConfigError:
        return weights  # its run will say what is wrong


def _coding(codec: str) -> str:
    """Return a codec with all its options, likewise."""
    from paci.runtime.transport.codecs.codec_registry import make_codecs

    return repr(make_codecs(codec))


def _train(
    run: Mapping[str, Any],
    held_out: str,
    timeout_s: float,
    children: set[subprocess.Popen[str]],
) -> dict[str, Any]:
    """Run ``paci train``, for a while among ``children``; return the run's row, with its curve or
    with what went wrong."""
    with tempfile.TemporaryDirectory(prefix="paci-convergence-") as folder:
        options = {**run["options"], "checkpoint_every": run["options"]["updates"]}
        options |= {"sample_tokens": 0, "out": f"{folder}/run", "log_every": 50}
        command = [sys.executable, "-m", "paci", "train"]
        for key, value in options.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        started = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        children.add(child)
        try:
            _, told = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            _, told = child.communicate()[0], f"it took longer than {timeout_s:g} s"
        children.discard(child)
        row = {**run, "elapsed_s": round(time.perf_counter() - started, 1)}
        if child.returncode:
            words = told.strip().splitlines() or [f"exit code {child.returncode}"]
            return {**row, "problem": words[-1][:_TOLD]}
        return {**row, **_read_run(Path(folder) / "run", held_out)}


def _read_run(folder: Path, held_out: str) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    curve = [[m["tokens"], round(m["val_loss"], 5)] for m in metrics if "val_loss" in m]
    delays = [stage["delay"] for stage in summary["drift"]]
    total = sum(count for delay in delays for count in delay.values())
    late = sum(int(k) * count for delay in delays for k, count in delay.items())
    besides = {}
    if held_out:
        from paci.train.summary import evaluate_text

        loss, _ = evaluate_text(folder, held_out, _HELD_OUT_BATCHES)
        besides = {"held_out": held_out, "held_out_loss": round(loss, 5)}
    return {
        "tokens": curve[-1][0],
        "val_loss": curve[-1][1],
        "curve": curve,
        "mean_delay": round(late / total, 4),
        "max_drift": max(summary["max_drift"]),
        "trials_over_busy": round(summary["trial_share"] / summary["utilization"], 5),
        "weights_sha256": summary["weights_sha256"],
        **besides,
    }


def _told(row: Mapping[str, Any]) -> str:
    loss = row.get("val_loss", math.nan)
    words = f"{row['method']} {row['optimizer']}, {row['num_stages']} stages, "
    words += f"accumulation {row['accumulation']}, rate {row['learning_rate']:g}, "
    words += f"codec {codec_of(row)}, " if codec_of(row) else ""
    return words + f"seed {row['seed']}: {row.get('problem') or f'loss {loss:.4f}'}"


def _floats(name: str, text: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < each < math.inf for each in found):
        raise ConfigError(
            f"{name} must be numbers above 0 separated by commas, got {text!r}; write it like "
            f"0.001,0.002"
        )
    return found
