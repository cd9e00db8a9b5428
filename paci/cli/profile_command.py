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
from paci.train.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from paci.models import GPTConfig
    from paci.plan.profile import Profile


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "profile",
        help="measure layers and links for `paci plan`",
        description="Measure every layer of a GPT on this device, one at a time, so that the whole "
        "model need not fit; with --workers also the links between that many processes (under "
        "torchrun, between hosts). Writes a small JSON file for `paci plan`.",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the profile")
    parser.add_argument("--size", default="tiny", metavar="NAME", help="preset, as in train (tiny)")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="tokens (128)")
    parser.add_argument("--vocab", type=int, default=257, metavar="N", help="tokens (257: bytes)")
    parser.add_argument(
        "--micro-batch-size", type=int, default=4, metavar="N", help="sequences (4)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="for medians (5)")
    parser.add_argument("--every", action="store_true", help="measure each block, not only one")
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
    for name in ("micro_batch_size", "repeats", "workers", "threads"):
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


def _config(options: argparse.Namespace) -> GPTConfig:
    from paci.models import gpt_config

    return gpt_config(options.size, vocab_size=options.vocab, context=options.context)


def _measured(options: argparse.Namespace) -> Profile | None:
    """Measure the profile; return None on all ranks but the first."""
    import torch
    import torch.distributed as dist

    from paci.runtime.observation.links import measure_links
    from paci.train.launch import end_with_launcher
    from paci.train.run import connect
    from paci.train.setup import choose_device

    torch.set_num_threads(options.threads)
    config = TrainConfig(device=options.device, optimizer=options.optimizer)
    device = choose_device(config)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _measured_layers(options, config, device)
    end_with_launcher()
    connect(config, device)
    links, rank = measure_links(device), dist.get_rank()
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    dist.destroy_process_group()  # nobody waits for another: it may take long
    # All at once, as they will compute: workers of one host share its caches and its memory.
    profile = _measured_layers(options, config, device)
    if rank > 0:
        return None
    changed: dict[str, Any] = {"links": links}
    if len(set(hosts)) > 1:
        changed["transport"] = "group"
    return profile.model_copy(update=changed)


def _measured_layers(
    options: argparse.Namespace, training: TrainConfig, device: torch.device
) -> Profile:
    import torch
    from torch.nn import functional

    from paci.data.tokenizer import tokenizer_spec
    from paci.models.gpt import build_layer
    from paci.runtime.observation.layer_times import profile_layers
    from paci.runtime.transport.shared_memory import AVAILABLE
    from paci.train.setup import make_optimizer

    config = _config(options)
    shape = (options.micro_batch_size, options.context)
    tokens = torch.randint(config.vocab_size, shape, device=device)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

    def optimizer(layer: torch.nn.Module) -> torch.optim.Optimizer:
        # Names as within a stage, by which Muon's matrices are known.
        return make_optimizer(training, torch.nn.Sequential(layer))

    names = ["embedding", *(f"block {k}" for k in config.layer_range[1:-1]), "head"]
    kinds = names if options.every else ["embedding", *["block"] * config.num_layers, "head"]
    profile = profile_layers(
        [partial(build_layer, config, layer, 0, device) for layer in config.layer_range],
        tokens,
        micro_batch_size=options.micro_batch_size,
        loss_fn=loss,
        make_optimizer=optimizer,
        names=names,
        kinds=kinds,
        num_repeats=options.repeats,
    )
    train: dict[str, Any] = {"size": options.size, "context": options.context}
    # Layers are built, and run, in fp32.
    train |= {"precision": "fp32", "optimizer": training.optimizer}
    tokenizer = tokenizer_spec(config.vocab_size)
    if tokenizer is not None:
        train["tokenizer"] = tokenizer
    about = profile.about | {"threads": options.threads, "vocab": options.vocab}
    transport = "shared" if device.type == "cpu" and AVAILABLE else "group"
    changed = {"train": train, "about": about, "transport": transport}
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
    for place, link in enumerate(profile.links):
        lines.append(
            f"link {place} to {place + 1}: {link.latency_s * 1e6:.1f} us, "
            f"{link.bytes_per_s / 1e9:.3g} GB/s"
        )
    return "\n".join(lines)
