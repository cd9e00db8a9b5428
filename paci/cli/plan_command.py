"""``paci plan``."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paci.errors import ConfigError
from paci.plan.encoding import AS_IT_IS
from paci.plan.profile import DeviceProfile, LinkProfile, Profile, load_profile
from paci.plan.search import SAME_TIME, Choice, Plan, explain, search
from paci.schedule.base import Schedule, require_count
from paci.schedule.registry import make_schedule, schedules
from paci.train.config import TrainConfig

if TYPE_CHECKING:
    from paci.models import GPTConfig

_GIB = 2**30
_OF_A_MODEL = ("precision", "optimizer")  # what of training the costs of a layer depend on


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="choose schedule, stages, cut and micro-batches before training",
        description="Price every way to run a model on a number of devices and rank them, by "
        "simulation. The model is a profile that `paci profile` measured (one file for each "
        "micro-batch size), or a GPT by name with the speed of a device.",
    )
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help="profiles of one model")
    model = parser.add_argument_group("a model by formula")
    model.add_argument("--size", metavar="NAME", help="instead of profiles: a preset such as gpt2")
    model.add_argument("--context", type=int, default=1024, metavar="N", help="tokens (1024)")
    model.add_argument("--vocab", type=int, default=50257, metavar="N", help="tokens (50257)")
    model.add_argument(
        "--tflops", type=float, default=100.0, metavar="X", help="sustained by a device (100)"
    )
    model.add_argument(
        "--micro-batch-sizes", default="1,2,4,8,16,32", metavar="N,...", help="to try"
    )
    for name in _OF_A_MODEL:
        field = TrainConfig.model_fields[name]
        model.add_argument(
            f"--{name}",
            choices=typing.get_args(field.annotation),
            help=f"as in train ({field.default})",
        )
    machine = parser.add_argument_group("the machines")
    machine.add_argument("--devices", type=int, default=8, metavar="N", help="how many (8)")
    machine.add_argument(
        "--use", metavar="N,...", help="numbers of devices to try; default: all of them"
    )
    machine.add_argument("--memory-gib", type=float, metavar="X", help="of a device")
    machine.add_argument("--latency-us", type=float, metavar="X", help="of a link")
    machine.add_argument("--gb-per-s", type=float, metavar="X", help="bandwidth of a link")
    machine.add_argument("--jitter", type=float, metavar="X", help="variation of computing times")
    machine.add_argument(
        "--transport",
        choices=("shared", "group", "nccl"),
        help="how messages go: shared memory of one host, or a process group over gloo (CPU) or "
        "NCCL; default the profile's, or group",
    )
    search_ = parser.add_argument_group("the search")
    search_.add_argument(
        "--batch-size", type=int, required=True, metavar="N", help="sequences of one update"
    )
    search_.add_argument(
        "--schedules",
        metavar="NAME,...",
        help="default: all, paci:slack=1, and paci and 1f1b with slack=auto, the least slack of "
        "each hop that hides its messages; torch-zbv and others of PyTorch's can be named",
    )
    search_.add_argument(
        "--recompute", choices=("yes", "no", "both"), default="both", help="(both)"
    )
    search_.add_argument(
        "--weights",
        metavar="NAME",
        help="weight policy where nothing is recomputed; default that of train: the schedule's "
        "own, or lookahead if it never empties",
    )
    search_.add_argument(
        "--codec",
        metavar="NAME",
        help="as for train; messages are priced with the bytes that it sends, and the time that "
        "it takes itself is not counted",
    )
    search_.add_argument("--top", type=int, default=10, metavar="N", help="choices to print (10)")
    search_.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Print the ranked choices."""
    from paci.train.planning import planned_codec, planned_weights

    require_count("devices", options.devices)
    require_count("top", options.top)
    profiles = [_with_machines(profile, options) for profile in _profiles(options)]
    specs = [*schedules(), "paci:slack=1", "paci:slack=auto", "1f1b:slack=auto"]
    if options.schedules:
        specs = options.schedules.split(",")
    again = {"yes": (True,), "no": (False,), "both": (False, True)}[options.recompute]
    counts = _numbers("use", options.use) if options.use else [options.devices]
    choose_weights = partial(planned_weights, _without_recomputation(options.weights))
    encoding = planned_codec(options.codec)
    if encoding != AS_IT_IS:
        _require_widths(profiles)
    plan = search(
        profiles, options.batch_size, counts, specs, again, _make, choose_weights, encoding
    )
    if options.json:
        chosen = [choice.to_json() for choice in plan.choices[: options.top]]
        print(json.dumps({"rows": chosen, "refused": [list(each) for each in plan.refused]}))
        return 0
    print(_table(plan, options.top))
    print()
    print("\n".join([*explain(plan), *_trials_told(plan)]))
    for tried, reason in plan.refused[:3]:
        print(f"not possible: {tried}: {reason}")
    if len(plan.refused) > 3:
        print(f"({len(plan.refused) - 3} more were not possible; --json lists them)")
    print(f"\n{plan.choices[0].command()}")
    about, train = plan.choices[0].profile.about, plan.choices[0].profile.train
    if "vocab" in about and "tokenizer" not in train:
        print(
            f"(no tokenizer of paci train has {about['vocab']} tokens: with another the head is of "
            f"another size, and another cut is even)"
        )
    return 0


def _make(spec: str, num_stages: int, accumulation: int) -> Schedule:
    """A schedule of ours, or one of PyTorch's to compare with."""
    if not spec.startswith("torch-"):
        return make_schedule(spec, num_stages, accumulation)
    from paci.plan.torch_schedules import TORCH_SCHEDULES, torch_schedule

    per_worker = TORCH_SCHEDULES[spec][1] if spec in TORCH_SCHEDULES else 1
    return torch_schedule(spec, max(num_stages // per_worker, 1), accumulation)


def _without_recomputation(weights: str | None) -> str | None:
    """Return the policy that is asked for; one that recomputes is an error here."""
    from paci.runtime.weights.policy_registry import make_weight_policy

    if weights is not None and not make_weight_policy(weights).keeps_graph:
        raise ConfigError(
            f"weights must be a policy that recomputes nothing, got {weights}; pass --recompute yes"
        )
    return weights


def _profiles(options: argparse.Namespace) -> list[Profile]:
    if bool(options.profiles) == bool(options.size):
        raise ConfigError(
            "a model must be given as profiles or as --size, got both or neither; pass one of them"
        )
    given = [name for name in _OF_A_MODEL if getattr(options, name) is not None]
    if options.profiles and given:
        raise ConfigError(
            f"{given[0]} must be left out with profiles, which hold for the one that was measured, "
            f"got {getattr(options, given[0])}; leave it out, or pass --size"
        )
    if options.profiles:
        return [load_profile(Path(name)) for name in options.profiles]
    from paci.data.tokenizer import tokenizer_spec
    from paci.models import gpt_config
    from paci.models.estimate import estimate_profile

    if not options.tflops > 0:
        raise ConfigError(f"tflops must be above 0, got {options.tflops}; pass what is sustained")
    config: GPTConfig = gpt_config(options.size, vocab_size=options.vocab, context=options.context)
    sizes = _numbers("micro-batch-sizes", options.micro_batch_sizes)
    fitting = [size for size in sizes if options.batch_size % size == 0]
    if not fitting:
        raise ConfigError(
            f"one of micro-batch-sizes must divide the batch of {options.batch_size}, got "
            f"{options.micro_batch_sizes}; add a divisor"
        )
    defaults = {name: TrainConfig.model_fields[name].default for name in _OF_A_MODEL}
    precision, optimizer = (getattr(options, name) or defaults[name] for name in _OF_A_MODEL)
    flops_per_s, tokenizer = options.tflops * 1e12, tokenizer_spec(options.vocab)
    profiles = [
        estimate_profile(config, size, flops_per_s, precision, optimizer) for size in fitting
    ]
    if tokenizer is None:
        return profiles
    return [p.model_copy(update={"train": p.train | {"tokenizer": tokenizer}}) for p in profiles]


def _require_widths(profiles: Sequence[Profile]) -> None:
    """Raise ``ConfigError`` if a profile does not say what a codec would make of its messages."""
    for profile in profiles:
        if not any(layer.output_width for layer in profile.layers):
            raise ConfigError(
                "a profile must say the output_width of layers for a codec to be priced, got none; "
                "profile again, or leave --codec out"
            )


def _with_machines(profile: Profile, options: argparse.Namespace) -> Profile:
    """The profile with the links and devices that the command line names."""
    changed: dict[str, Any] = {}
    if options.latency_us is not None or options.gb_per_s is not None:
        for name in ("latency_us", "gb_per_s"):
            value = getattr(options, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be at least 0, got {value}; mend it")
        bandwidth = options.gb_per_s * 1e9 if options.gb_per_s else float("inf")
        latency_s = (options.latency_us or 0.0) * 1e-6
        changed["links"] = (LinkProfile(latency_s=latency_s, bytes_per_s=bandwidth),)
    if options.memory_gib is not None:
        if not options.memory_gib > 0:
            raise ConfigError(f"memory-gib must be above 0, got {options.memory_gib}; mend it")
        limit = int(options.memory_gib * _GIB)
        known = profile.devices or (DeviceProfile(),)
        changed["devices"] = tuple(
            each.model_copy(update={"memory_bytes": limit}) for each in known
        )
    if options.transport is not None:
        changed["transport"] = options.transport
    if options.jitter is not None:
        if not options.jitter >= 0:
            raise ConfigError(f"jitter must be at least 0, got {options.jitter}; mend it")
        changed["jitter"] = options.jitter
    return profile.model_copy(update=changed)


def _numbers(what: str, text: str) -> list[int]:
    try:
        numbers = [int(each) for each in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{what} must be whole numbers separated by commas, got {text!r}; write 1,2,4"
        ) from None
    for number in numbers:
        require_count(what, number)
    return numbers


def _trials_told(plan: Plan) -> list[str]:
    """A line on what trials take in the best choice that makes any, and how to make fewer."""
    from paci.train.planning import with_few_trials, with_free_trials

    choice = next((each for each in plan.choices if each.steady.trial_share), None)
    if choice is None:
        return []
    told = (
        f"Trials take {choice.steady.trial_share:.1%} of the workers' time under {choice.spec} "
        f"with {choice.schedule.accumulation} micro-batches and {choice.weights}"
    )
    free, few = with_free_trials(choice), with_few_trials(choice)
    lost = choice.steady.update_s / free.steady.update_s - 1.0
    if lost < SAME_TIME:
        return [f"{told}, all of it while they would wait anyway."]
    told += f", and lengthen an update by {lost:.1%}."
    saved = 1.0 - few.steady.update_s / choice.steady.update_s
    if saved < SAME_TIME:
        return [told]
    made = "fewer" if few.steady.trial_share else "none in a full pipeline"
    return [
        f"{told} --weights {few.weights} makes {made} and takes {saved:.1%} less time; the loss is "
        f"as low in long runs with Muon, and higher with AdamW (docs/convergence.md)."
    ]


def _table(plan: Plan, top: int) -> str:
    header = (
        "   schedule           devices  micro-batches  weights         time/update   busy  "
        "trials  memory  drift  delay"
    )
    return "\n".join(
        [header, *(_row(place, each) for place, each in enumerate(plan.choices[:top], start=1))]
    )


def _row(place: int, choice: Choice) -> str:
    micro_batches = f"{choice.schedule.accumulation} x {choice.profile.micro_batch_size}"
    return (
        f"{place:>2} {choice.spec:<18} {choice.schedule.num_workers:>7}  {micro_batches:>13}  "
        f"{choice.weights:<13}  {choice.steady.update_s * 1e3:>9.4g} ms  "
        f"{choice.steady.utilization:>5.1%}  "
        f"{choice.steady.trial_share:>6.1%}  {choice.peak_bytes / _GIB:>5.1f}G  "
        f"{choice.max_drift:>5}  {choice.mean_delay:>5.2f}"
    )
