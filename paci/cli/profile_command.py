"""``paci profile``."""

from __future__ import annotations

import argparse
import os
import socket
import typing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paci.errors import ConfigError
from paci.schedule.base import require_count
from paci.train.config import TrainConfig, load_config

if TYPE_CHECKING:
    from paci.models import GPTConfig
    from paci.plan.profile import Profile


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "profile",
        help="measure layers and links for `paci plan`",
        description="Measure every layer of a GPT on this device, a few at a time, so that the "
        "whole model need not fit, and what an action takes of the runtime itself; with --workers "
        "also the links between that many processes (under torchrun, between hosts). Writes a "
        "small JSON file for `paci plan`.",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the profile")
    parser.add_argument("--size", default="tiny", metavar="NAME", help="preset, as in train (tiny)")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="tokens (128)")
    parser.add_argument("--vocab", type=int, default=257, metavar="N", help="tokens (257: bytes)")
    parser.add_argument(
        "--micro-batch-size", type=int, default=4, metavar="N", help="sequences (4)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="for medians (5)")
    parser.add_argument(
        "--together",
        type=int,
        default=4,
        metavar="N",
        help="most layers in memory at once; 1 if two do not fit (4)",
    )
    parser.add_argument("--every", action="store_true", help="measure each block, not only a few")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes whose links are measured too (1: none)",
    )
    field = TrainConfig.model_fields["optimizer"]
    parser.add_argument(
        "--optimizer",
        choices=typing.get_args(field.annotation),
        default=field.default,
        help=f"as in train ({field.default})",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (1)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Measure here, or start the workers that do."""
    for name in ("micro_batch_size", "repeats", "together", "workers", "threads"):
        require_count(name, getattr(options, name))
    if not Path(options.out).resolve().parent.is_dir():
        raise ConfigError(
            f"out must be a file in a folder that exists, got {options.out}; make the folder first"
        )
    if options.workers > 1 and "WORLD_SIZE" not in os.environ:
        from paci.train.launch import launch

        _config(options)  # refuses bad options before any process is started
        launch(arguments, options.workers, 0)
        return 0
    from paci.plan.profile import save_profile

    profile = _measured(options)
    if profile is not None:
        save_profile(profile, Path(options.out))
        print(_table(profile))
        print(f"wrote {options.out}", flush=True)
    return 0


def _config(options: argparse.Namespace) -> tuple[TrainConfig, GPTConfig]:
    """What would be trained: one micro-batch at a time."""
    from paci.models import gpt_config

    names = ("size", "context", "optimizer", "device", "threads")
    training = {name: getattr(options, name) for name in names}
    training |= {"batch_size": options.micro_batch_size, "accumulation": 1}
    model = gpt_config(options.size, vocab_size=options.vocab, context=options.context)
    return load_config(None, training), model


def _measured(options: argparse.Namespace) -> Profile | None:
    """Measure the profile; return None on all ranks but the first."""
    import torch
    import torch.distributed as dist

    from paci.train.launch import end_with_launcher
    from paci.train.planning import profile_gpt, profile_runtime
    from paci.train.run import connect
    from paci.train.setup import choose_device

    torch.set_num_threads(options.threads)
    config, model = _config(options)
    device = choose_device(config)
    measure = partial(
        profile_gpt,
        config,
        model,
        device,
        num_repeats=options.repeats,
        num_together=options.together,
        every=options.every,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return measure().model_copy(update=profile_runtime(config, model, device))
    end_with_launcher()
    connect(config, device)
    changed, rank = profile_runtime(config, model, device), dist.get_rank()
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    dist.destroy_process_group()  # nobody waits for another: it may take long
    # All at once, as they will compute: workers of one host share its caches and its memory.
    profile = measure()
    if rank > 0:
        return None
    if len(set(hosts)) > 1 and changed["transport"] == "shared":
        changed["transport"] = "group"
    return profile.model_copy(update=changed)


def _table(profile: Profile) -> str:
    lines = ["layer            forward   backward (to input)    update     weights        kept"]
    shown = ""
    for layer in profile.layers:
        inside = "-" if layer.backward_input_s is None else f"{layer.backward_input_s * 1e3:.3f}"
        numbers = (
            f"{layer.forward_s * 1e3:>7.3f} ms {layer.backward_s * 1e3:>7.3f} ms "
            f"{f'({inside})':>9}  {layer.update_s * 1e3:>7.3f} ms {layer.weight_bytes:>11,} "
            f"{layer.kept_bytes:>11,}"
        )
        if numbers != shown:
            lines.append(f"{layer.name:<14} {numbers}")
        shown = numbers
    if profile.overhead_s:
        lines.append(f"the runtime's own: {profile.overhead_s * 1e6:.0f} us an action")
    for place, link in enumerate(profile.links):
        lines.append(
            f"link {place} to {place + 1}: {link.latency_s * 1e6:.1f} us, "
            f"{link.bytes_per_s / 1e9:.3g} GB/s"
        )
    return "\n".join(lines)
