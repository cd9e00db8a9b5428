"""What cannot be done is said in one line: what must hold, what was got, what to do."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_helpers as cli
import pytest
from cli_helpers import Done, Shop
from safetensors import SafetensorError

from paci.train import checkpoint, summary

MANIFEST = checkpoint.MANIFEST


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("errors"))
    (shop.folder / "empty.txt").touch()
    (shop.folder / "short.txt").write_text("too short")
    (shop.folder / "latin1.txt").write_bytes(("caf\u00e9 " * 200).encode("latin-1"))
    (shop.folder / "file").touch()
    return shop


@pytest.fixture(scope="module")
def finished(shop: Shop) -> Path:
    """A run with checkpoints at 2 and 4."""
    out = shop.new("finished")
    shop.train(out=out, checkpoint_every=2)
    return out


@pytest.fixture(autouse=True)
def nothing_is_started(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bad request is refused before any process is started."""

    def start(*args: object) -> None:
        raise AssertionError("no process must be started")

    monkeypatch.setattr("paci.train.launch.elastic_launch", start)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    yield
    assert not cli.processes_of(shop.folder)


def require_refusal(done: Done, *words: str, code: int = 2) -> None:
    """One line, with what must hold, what was got, and what to do."""
    assert done.code == code, done.err
    assert all(word in done.error for word in (" must ", ", got ", "; ")) or all(
        word in done.error for word in (" needs ", ", got ", "; ")
    ), done.error
    for word in words:
        assert word in done.error, done.error


# --- options ------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"accumulation": 0}, ("accumulation", "1", "'0'")),
    ({"accumulation": -3}, ("accumulation", "'-3'")),
    ({"accumulation": 3}, ("batch_size", "3 micro-batches", "16")),
    ({"stages": 7}, ("num_stages", "7 stages", "6 layers")),
    ({"stages": 1, "layers": 0}, ("layers", "'0'")),
    ({"updates": "ten"}, ("updates", "integer", "'ten'")),
    ({"batch_size": 2.5}, ("batch_size", "integer", "'2.5'")),
    ({"learning_rate": "fast"}, ("learning_rate", "number", "'fast'")),
    ({"learning_rate": 0}, ("learning_rate", "greater than 0")),
    ({"learning_rate": "nan"}, ("learning_rate", "'nan'")),
    ({"learning_rate": "inf"}, ("learning_rate", "finite", "'inf'")),
    ({"weight_decay": -1}, ("weight_decay", "'-1'")),
    ({"dropout": 1}, ("dropout", "less than 1", "'1'")),
    ({"beta1": 1}, ("beta1", "less than 1", "'1'")),
    ({"beta2": 1.5}, ("beta2", "'1.5'")),
    ({"warmup": 2}, ("warmup", "'2'")),
    ({"seed": -1}, ("seed", "'-1'")),
    ({"seed": 2**64}, ("seed", str(2**64))),
    ({"timeout": "inf"}, ("timeout", "'inf'")),
    ({"timeout": 0}, ("timeout", "'0'")),
    ({"port": 70000}, ("port", "65535", "'70000'")),
    ({"threads": 0}, ("threads", "'0'")),
    ({"size": "huge"}, ("size", "tiny", "gpt2-xl", "'huge'")),
    ({"heads": 5}, ("width", "num_heads", "32", "5")),
    ({"tie_embeddings": True}, ("tie_embeddings", "4 stages", "--stages 1")),
    ({"schedule": "dream"}, ("schedule", "1f1b, gated, gpipe, paci", "'dream'")),
    ({"schedule": "paci:slack=-1"}, ("slack", "-1")),
    ({"schedule": "paci:slack=x"}, ("slack", "'x'")),
    ({"schedule": "paci:color=1"}, ("slack", "'color=1'")),
    ({"weights": "old"}, ("current", "recompute", "stash", "'old'")),
    ({"precision": "fp8"}, ("precision", "fp32", "bf16", "'fp8'")),
    ({"device": "cuda"}, ("cuda", "0 GPUs", "--device cpu")),
    ({"device": "tpu"}, ("device", "auto, cpu or cuda", "'tpu'")),
    ({"tokenizer": "words"}, ("tokenizer", "'words'")),
    ({"tokenizer": "bpe:9"}, ("tokenizer", "'bpe:9'")),
    ({"val_fraction": 0}, ("fraction", "0")),
    ({"data": "/no/such/corpus"}, ("corpus", "'/no/such/corpus'")),
    ({"data": "empty.txt"}, ("corpus", "empty.txt")),
    ({"data": "short.txt"}, ("corpus", "context", "32")),
    ({"data": "latin1.txt"}, ("corpus", "UTF-8", "latin1.txt", "byte 3", "iconv")),
    ({"context": 30000}, ("part of the corpus", "30000", "smaller context")),
]


@pytest.mark.parametrize(
    ("options", "words"),
    REFUSED,
    ids=[" ".join(cli.flags(options)) for options, _ in REFUSED],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_option_is_refused_in_one_line(
    shop: Shop, options: dict[str, Any], words: tuple[str, ...], workers: int
):
    out = shop.new()
    if str(options.get("data", "")).endswith(".txt"):
        options = {"data": shop.folder / options["data"]}
    done = shop.call(*shop.options(out=out, workers=workers, **options))
    require_refusal(done, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--colour", "red"], ("paci train --help", "'--colour red'")),
        (["train", "now"], ("paci train --help", "'now'")),
        (["generate", "x", "--colour"], ("paci generate --help", "'--colour'")),
    ],
)
def test_an_unknown_option_is_refused_in_one_line(
    shop: Shop, arguments: list[str], words: tuple[str, ...]
):
    require_refusal(shop.call(*arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], ("'fly'", "train", "generate", "schedules")),
        (["train", "--seed"], ("--seed", "paci train --help")),
        (["schedules", "paci", "--stages", "x"], ("--stages", "'x'")),
    ],
)
def test_what_is_no_command_line_is_refused_in_one_line(
    shop: Shop, arguments: list[str], words: tuple[str, ...]
):
    done = shop.call(*arguments)
    assert done.code == 2
    for word in words:
        assert word in done.error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 'red'", ("'colour'",)),
        ("[model]\nwidth = 3", ("'model'",)),
        ("updates = 'ten'", ("updates", "integer", "'ten'")),
        ("updates = '10'", ("updates", "integer", "'10'")),
        ("updates = 3.0", ("updates", "integer", "3.0")),
        ("dropout = true", ("dropout", "number", "True")),
        ("seed = [1]", ("seed", "[1]")),
        ("data = 3", ("data", "string", "3")),
        ("resume = 'yes'", ("resume", "boolean", "'yes'")),
        ("precision = 'fp8'", ("precision", "'fp8'")),
        ("updates = ", ("TOML",)),
        ("updates = 1\nupdates = 2", ("TOML",)),
        (b"data = '\xff'", ("TOML",)),
        (None, ("readable file", "No such file")),
    ],
)
def test_a_bad_file_of_options_is_refused_in_one_line(
    shop: Shop, text: str | bytes | None, words: tuple[str, ...]
):
    file = shop.new("options").with_suffix(".toml")
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    out = shop.new()
    require_refusal(shop.call(*shop.options(out=out), "--config", file), *words)
    assert not out.exists()


def test_more_workers_than_stages_are_refused_in_one_line(shop: Shop):
    done = shop.call(*shop.options(out=shop.new(), stages=2, workers=3))
    require_refusal(done, "workers", "(2)", "3", "--stages")


def test_a_port_in_use_is_refused_in_one_line(shop: Shop):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        out = shop.new()
        done = shop.call(*shop.options(out=out, workers=2, port=port))
    require_refusal(done, "port", str(port), "--port")
    assert not (out / "metrics.jsonl").exists()


# --- folders and checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    shop: Shop, finished: Path, workers: int
):
    def refused(**options: Any) -> Done:
        return shop.call(*shop.options(workers=workers, **options))

    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    require_refusal(refused(out=finished), str(finished), "--resume")
    file = shop.folder / "file"
    require_refusal(refused(out=file), str(file), "another --out")
    require_refusal(refused(out=file / "below"), str(file / "below"), "another --out")
    require_refusal(refused(resume=True), "--out")
    nothing = shop.new()
    require_refusal(refused(out=nothing, resume=True), "checkpoint", str(nothing))
    assert not nothing.exists()
    other = {"out": finished, "resume": True, "checkpoint_every": 2}
    require_refusal(refused(**other, width=64), "width", "32", "64")
    require_refusal(refused(**other, seed=1), "seed", "0", "1")
    require_refusal(refused(**other, stages=2), "stages", "4", "2")
    require_refusal(refused(**other, learning_rate=0.5), "learning_rate", "0.008", "0.5")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def truncate(folder: Path) -> None:
    stage = folder / "stage-00001.safetensors"
    stage.write_bytes(stage.read_bytes()[:-100])


def flip(folder: Path) -> None:
    stage = folder / "stage-00002.safetensors"
    content = bytearray(stage.read_bytes())
    content[-1] ^= 1
    stage.write_bytes(content)


def change_format(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (truncate, ("stage-00001.safetensors", "digest", "remove the folder")),
    "flipped": (flip, ("stage-00002.safetensors", "digest", "remove the folder")),
    "stage": (
        lambda folder: (folder / "stage-00000.safetensors").unlink(),
        ("stage-00000.safetensors", "no such file"),
    ),
    "manifest": (lambda folder: (folder / MANIFEST).unlink(), (MANIFEST, "No such file")),
    "half": (lambda folder: (folder / MANIFEST).write_text('{"format": 1, '), (MANIFEST,)),
    "list": (lambda folder: (folder / MANIFEST).write_text("[]"), (MANIFEST,)),
    "empty": (lambda folder: (folder / MANIFEST).write_text('{"format": 1}'), (MANIFEST,)),
    "format": (change_format, ("format 1", "99")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(shop: Shop, finished: Path, damage: str):
    out = shop.new(damage)
    shutil.copytree(finished, out)
    spoil, words = DAMAGES[damage]
    spoil(out / "checkpoints" / "update-00000004")
    options = {"out": out, "resume": True, "checkpoint_every": 2}
    for workers in (1, 2):
        done = shop.call(*shop.options(workers=workers, **options))
        require_refusal(done, "update-00000004", *words)
    require_refusal(shop.call("generate", out), "update-00000004", *words)
    # What the message says to do helps.
    shutil.rmtree(out / "checkpoints" / "update-00000004")
    assert shop.train(**options)["weights_sha256"] == cli.digest(finished)


def test_damaged_options_of_a_run_are_refused_in_one_line(shop: Shop, finished: Path):
    out = shop.new()
    shutil.copytree(finished, out)
    for text in ("{", "[1]", '{"colour": 1}'):
        (out / "options.json").write_text(text)
        done = shop.call("train", "--resume", "--out", out)
        assert done.code == 2
        assert "options.json" in done.error or "colour" in done.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "-1"], ("num_tokens", "-1")),
        (["--temperature", "-1"], ("temperature", "-1")),
        (["--temperature", "nan"], ("temperature", "nan")),
        (["--top-k", "0"], ("top_k", "0")),
    ],
)
def test_generate_refuses_in_one_line(
    shop: Shop, finished: Path, options: list[str], words: tuple[str, ...]
):
    require_refusal(shop.call("generate", finished, *options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere"], ("nowhere",)),
        (["--data", "stdlib", "--batches", 0], ("batches", "at least 1", "0")),
    ],
)
def test_evaluate_refuses_in_one_line(
    shop: Shop, finished: Path, options: list[object], words: tuple[str, ...]
):
    require_refusal(shop.call("evaluate", finished, *options), *words)


def test_export_refuses_in_one_line(shop: Shop, finished: Path):
    there = shop.folder / "there.safetensors"
    there.write_text("kept")
    require_refusal(shop.call("export", finished, there), "there", str(there))
    assert there.read_text() == "kept"
    require_refusal(shop.call("export", shop.folder / "nothing", shop.folder / "x"), "checkpoint")
    nowhere = shop.folder / "no" / "x.safetensors"
    require_refusal(shop.call("export", finished, nowhere), "folder", str(nowhere))


def test_export_says_that_the_disk_is_full(
    shop: Shop, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    """What safetensors raises then is no OSError."""

    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(summary, "save_file", full)
    file = shop.folder / "full.safetensors"
    done = shop.call("export", finished, file)
    assert done.code == 1
    assert done.error == (
        f"paci: error: the file must be written whole, got 'I/O error: No space left on device (os "
        f"error 28)' for {file}; make room for it (disk, quota, ulimit -f), or name another"
    )
    assert not file.exists()


def test_generate_needs_a_run(shop: Shop, finished: Path):
    require_refusal(shop.call("generate", shop.folder / "nothing"), "checkpoint", "nothing")
    out = shop.new()
    shutil.copytree(finished, out)
    shutil.rmtree(out / "tokenizer")
    require_refusal(shop.call("generate", out), "tokenizer")


def test_schedules_refuses_in_one_line(shop: Shop):
    require_refusal(shop.call("schedules", "dream"), "'dream'")
    require_refusal(shop.call("schedules", "paci", "--stages", 0), "num_stages", "0")
    require_refusal(shop.call("schedules", "paci", "--accumulation", 0), "accumulation", "0")
    require_refusal(shop.call("schedules", "paci", "--updates", 0), "num_updates", "0")
    nowhere = shop.folder / "file" / "x.svg"
    require_refusal(shop.call("schedules", "paci", "--svg", nowhere), "svg", str(nowhere))
    env = {"PACI_SCHEDULE_PATH": "/no/such/folder"}
    require_refusal(shop.call("schedules", env=env), "PACI_SCHEDULE_PATH", "/no/such/folder")


# --- ranks --------------------------------------------------------------------------------------


def test_ranks_that_differ_are_all_refused(shop: Shop):
    """Each says so, as each is started by itself; nothing is made."""
    out = shop.new()
    differing = {"seed": 1, "dropout": 0.2, "out": shop.new(), "updates": 5}
    for key, value in differing.items():
        commands = [shop.options(out=out), shop.options(**{"out": out, key: value})]
        for rank, done in enumerate(shop.ranks(commands)):
            require_refusal(done, f"rank {rank}: ", f"agree on {key}", "on rank 1", str(value))
    bad = shop.options(out=out, data="/no/such/corpus")
    for done in shop.ranks([bad, bad]):
        require_refusal(done, "corpus", "'/no/such/corpus'")
    for done in shop.ranks([shop.options(out=out, workers=3)] * 2):
        require_refusal(done, "--workers (3)", "got 2")
    assert not out.exists()


@pytest.mark.parametrize(
    ("how", "log_every"), [("call", 1), ("call", 99), ("ranks", 1), ("ranks", 99), ("command", 99)]
)
def test_a_loss_that_is_not_finite_ends_the_run(shop: Shop, how: str, log_every: int):
    """Also where it is not looked at: the last sound checkpoint is never replaced."""
    out = shop.new()
    explosive = {"optimizer": "adamw", "learning_rate": 1e30, "checkpoint_every": 1}
    explosive |= {"keep_checkpoints": 1, "weights": "current"}
    arguments = shop.options(out=out, log_every=log_every, **explosive)
    if how == "command":
        with shop.command(*arguments, "--workers", 2) as command:
            done = command.wait()
        assert done.code == 1
        lines = done.err.splitlines()
        assert all(line.startswith("paci: error: ") for line in lines), done.err
        assert "finite" in lines[0]
        assert "all 2 workers must run to the end, got exit code 1" in lines[-1]
    else:
        ends = [shop.call(*arguments)] if how == "call" else shop.ranks([arguments] * 2)
        for done in ends:
            require_refusal(done, "finite", "learning rate", code=1)
    assert cli.checkpoints(out) == ["update-00000001"]
    newest = checkpoint.newest(out / "checkpoints")
    checkpoint.verify(newest, checkpoint.read_manifest(newest))
    assert not (out / "summary.json").exists()
