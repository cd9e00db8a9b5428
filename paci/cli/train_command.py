"""``paci train``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import typing
from typing import Any, NoReturn

from paci.train.config import TrainConfig, load_config

_GROUPS = {
    "model": "model",
    "data": "data",
    "pipeline": "pipeline",
    "optimization": "optimization (linear warm-up, then a cosine)",
    "run": "run",
    "machine": "machine",
}


def add_parser(commands: Any) -> None:
    """Add the command, an option for each field of ``TrainConfig``."""
    parser = commands.add_parser(
        "train",
        help="train a GPT through a pipeline",
        description="Train a GPT through a pipeline, in one process or in many. The weights it "
        "ends with depend on the options alone, not on the number of processes.",
        epilog="On one host: paci train --workers 2 --stages 2. On several: torchrun ... -m paci "
        "train ... on each, without --workers.",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of options (batch_size = 64)")
    groups = {key: parser.add_argument_group(title) for key, title in _GROUPS.items()}
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        group, flag = groups[str(extra["group"])], "--" + name.replace("_", "-")
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
            continue
        if field.default is not None:
            text += f" (default {field.default})"
        group.add_argument(
            flag, metavar=_metavar(field.annotation), default=argparse.SUPPRESS, help=text
        )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train here, or start the workers that do."""
    given = {key: value for key, value in vars(options).items() if key in TrainConfig.model_fields}
    config = load_config(options.config, given)
    if "WORLD_SIZE" in os.environ:
        _run_worker(config)
    # Torch is imported from here on: bad options are refused without it.
    from paci.train.launch import launch
    from paci.train.run import choose_folder, claim_folder, prepare_all, train
    from paci.train.setup import require_devices

    if config.workers == 1:
        train(config, _say)
        return 0
    choose_folder(config)
    require_devices(config, config.workers)
    prepare_all(config)
    folder = claim_folder(config)
    # The last --out counts. It is settled here: a default made by each worker might differ.
    _say(f"starting {config.workers} workers; run folder {folder}")
    launch([*arguments, "--out", str(folder)], config.workers, config.port)
    return 0


def _run_worker(config: TrainConfig) -> NoReturn:
    """One process of many, started by ``launch`` or torchrun."""
    from paci.errors import ConfigError, PaciError
    from paci.train.launch import end_with_launcher, is_launched
    from paci.train.run import train

    world_size = int(os.environ["WORLD_SIZE"])
    if config.workers not in (1, world_size):
        raise ConfigError(
            f"the world must be of the size of --workers ({config.workers}), got {world_size}; "
            f"start as many processes, or leave --workers out"
        )
    end_with_launcher()
    try:
        train(config.model_copy(update={"workers": world_size}), _say)
        sys.stdout.flush()
        sys.stderr.flush()
        # All is written, and every channel is closed. An interpreter that winds up beside PyTorch's
        # own threads has been seen to abort, and a run that went well would count as failed.
        os._exit(0)
    except PaciError as error:
        line = f"paci: error: rank {os.environ['RANK']}: {error}\n"
        print(line, end="", file=sys.stderr, flush=True)  # one write: others write there too
        os._exit(error.exit_code)  # threads and connections of a broken world could hold us up
    except KeyboardInterrupt:
        if is_launched():
            os._exit(130)  # the launcher says so for all
        raise
    except BrokenPipeError:
        os._exit(1)  # nobody reads our output any more
    except OSError as error:
        sys.stderr.write(f"paci: error: rank {os.environ['RANK']}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _metavar(annotation: object) -> str:
    """Return in one word what an option takes."""
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    text = str(annotation)
    for kind, word in (("float", "X"), ("int", "N")):
        if kind in text:
            return word
    return "TEXT"


def _say(line: str) -> None:
    print(line, flush=True)
