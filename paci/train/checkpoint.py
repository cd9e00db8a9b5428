"""Checkpoints: safetensors and JSON, written whole or not at all.

::

    checkpoints/update-00000200/
        stage-00000.safetensors    weights/NAME, buffers/NAME, policy/NAME, optimizer/NAME KEY
        ...                        (metadata: optimizer groups, scheduler, version, name of the
                                   policy, plain values)
        manifest.json              what run this is of, and the SHA-256 of every other file

Each process writes the stages it holds into a hidden folder beside; when all are done, one writes
the manifest and renames the folder. So a folder with this name is complete, and a truncated or
changed file in it is found by its digest. Nothing is pickled. Processes on several hosts need one
file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paci.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_ENTRIES = {"update", "files", "options", "model", "corpus", "num_micro_batches"}


def save_stage(folder: Path, index: int, state: Mapping[str, Any]) -> dict[str, str]:
    """Write one stage's state into ``folder``; return ``{file name: SHA-256}``.

    Raises:
        CheckpointError: the file cannot be written whole.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {key: state[key] for key in ("version", "lr_scheduler", "policy_name")}
    for part in ("weights", "buffers", "policy"):
        tensors |= {f"{part}/{name}": tensor for name, tensor in state[part].items()}
    plain["param_groups"] = state["optimizer"]["param_groups"]
    plain["optimizer"] = {}
    for name, values in state["optimizer"]["state"].items():
        plain["optimizer"][name] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name} {key}"] = value
            else:
                plain["optimizer"][name][key] = value
    path = folder / f"stage-{index:05d}.safetensors"
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with _written_whole(path):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(own, path, metadata={"state": json.dumps(plain)})
        _sync(path)
        return {path.name: _sha256(path)}


def load_stage(folder: Path, index: int) -> dict[str, Any]:
    """Read the state that ``save_stage`` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / f"stage-{index:05d}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "buffers": {}, "policy": {}}
    optimizer: dict[str, dict[str, Any]] = plain["optimizer"]
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            name, _, entry = name.rpartition(" ")
            optimizer.setdefault(name, {})[entry] = tensor
        else:
            parts[part][name] = tensor
    return {
        **parts,
        "optimizer": {"state": optimizer, "param_groups": plain["param_groups"]},
        "lr_scheduler": plain["lr_scheduler"],
        "version": plain["version"],
        "policy_name": plain.get("policy_name"),  # older files have none
    }


def pending_folder(root: Path, update: int) -> Path:
    """Where a checkpoint's files are written before it is complete."""
    return root / f".update-{update:08d}"


def commit(root: Path, update: int, files: Mapping[str, str], about: Mapping[str, Any]) -> Path:
    """Make a checkpoint complete, once every process has written its stages.

    Args:
        root: the folder of checkpoints.
        update: how many updates have been applied.
        files: all that ``save_stage`` returned, on all processes.
        about: what else the manifest holds.

    Raises:
        CheckpointError: the manifest cannot be written whole, or the folder not be renamed.
    """
    pending, final = pending_folder(root, update), root / pending_folder(root, update).name[1:]
    manifest = {"format": FORMAT, "update": update, "files": dict(sorted(files.items())), **about}
    with _written_whole(pending / MANIFEST):
        (pending / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(pending / MANIFEST)
    with _written_whole(final):
        for each in pending.iterdir():
            if each.name not in {MANIFEST, *files}:
                each.unlink()  # left by a process that was killed in the midst of a file
        if final.exists():
            shutil.rmtree(final)
        pending.rename(final)
    return final


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what was left of broken ones."""
    for folder in root.glob(".update-*"):
        shutil.rmtree(folder)
    for folder in _complete(root)[:-keep]:
        shutil.rmtree(folder)


def is_there(root: Path) -> bool:
    """Whether there is a complete checkpoint."""
    return bool(_complete(root))


def newest(root: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    folders = _complete(root)
    if not folders:
        raise CheckpointError(
            f"a run to resume or read must have a checkpoint, got none in {root}; start it without "
            f"--resume, or name another folder"
        )
    return folders[-1]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: the manifest is missing or damaged, or of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / MANIFEST, str(error)) from error
    if known != FORMAT:
        raise CheckpointError(
            f"a checkpoint must be of format {FORMAT}, got {known} in {folder}; read it with the "
            f"version of paci that wrote it"
        )
    if missing := sorted(_ENTRIES - manifest.keys()):
        raise _damaged(folder / MANIFEST, f"it does not say {missing[0]}")
    return manifest


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` unless all files are there, with the digests they must have."""
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise _damaged(path, "another digest" if path.is_file() else "no such file")


def require_same(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` unless what shaped a checkpoint is what shapes this run."""
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise CheckpointError(
                f"a checkpoint must be of a run with the same {key}, got {theirs.get(key)!r} in "
                f"{folder} and {ours[key]!r} here; resume with the options it was made with"
            )


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All stages' weights and buffers by name, in one model."""
    manifest = read_manifest(folder)
    verify(folder, manifest)
    weights: dict[str, Tensor] = {}
    for index in range(len(manifest["files"])):
        state = load_stage(folder, index)
        weights |= state["weights"] | state["buffers"]
    return weights


def _complete(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob("update-*") if folder.is_dir())


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[None]:
    """Say which file it was that a full disk, a quota or a limit on file sizes cut short.

    Python ignores SIGXFSZ, so the limit is an error of the write, as a full disk is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        failed = CheckpointError(
            f"a checkpoint must be written whole, got {cause!r} for {path}; make room for it "
            f"(disk, quota, ulimit -f), then go on with --resume"
        )
        failed.exit_code = 1  # the request was sound: it failed at run time
        raise failed from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"a checkpoint's files must be whole, got a damaged {path} ({why}); remove the folder "
        f"{path.parent} to go on from the one before"
    )
