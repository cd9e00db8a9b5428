"""Hosts on one machine, joined by slow links: what links do, and what training does over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_helpers as ranks_of
import pytest
from launching import PORT, Rank, launch, values

from paci.bench.hosts.bed import Bed
from paci.bench.hosts.host import missing_rights, tcp_settings
from paci.bench.hosts.network import MTU, Wire, between_all, in_sites
from paci.bench.hosts.packets import num_bytes_on_wire
from paci.errors import ConfigError

NUM = ranks_of.NUM_STAGES
STEPS = 120
WITHOUT = missing_rights()
needs_hosts = pytest.mark.skipif(WITHOUT is not None, reason=WITHOUT or "")


def wires(num: int, wire: Wire) -> Any:
    return between_all(num, lambda source, target: wire)


# --- links --------------------------------------------------------------------------------------


def test_what_no_wire_can_be_is_refused():
    for options, words in (
        ({"latency_s": -1.0}, "the latency of a link in seconds must be"),
        ({"jitter_s": float("nan")}, "the jitter of a link in seconds must be"),
        ({"bits_per_s": 0.0}, "the rate of a link must be above 0 bits a second, got 0; leave"),
        ({"loss": 1.0}, "the loss of a link must be a share from 0 to below 1, got 1; pass"),
    ):
        with pytest.raises(ConfigError) as error:
            Wire(**options)
        assert words in str(error.value)


def test_hosts_of_a_site_are_near():
    near, far = Wire(1e-5), Wire(0.04, 2e8)
    found = in_sites(4, 2, near, far)
    assert len(found) == 12
    assert [found[0, other] for other in (1, 2, 3)] == [near, far, far]
    assert found[3, 2] is near


def test_packets_in_one_piece_have_a_header_each():
    def piece(size: int, kind: int = 1, headers: int = 40, content: int = MTU - 40) -> bytes:
        about = [b"\0", bytes([kind]), headers.to_bytes(2, "little"), content.to_bytes(2, "little")]
        return b"".join(about) + bytes(4) + bytes(size)

    assert num_bytes_on_wire(piece(1500, kind=0)) == 1500
    assert num_bytes_on_wire(piece(40 + 1460)) == 1500
    assert num_bytes_on_wire(piece(40 + 1461)) == 1541
    assert num_bytes_on_wire(piece(40 + 3 * 1460)) == 3 * 1500


@needs_hosts
def test_a_link_takes_the_time_and_the_rate_that_are_asked_for(tmp_path: Path):
    sizes = [1] * 5 + [1_000_000] * 3
    with Bed(wires(2, Wire(0.03, 1e8)), 2) as bed:
        seconds, _ = values(launch(tmp_path, 2, ranks_of.ping, sizes, place=bed.place))
        carried, num_lost = bed.carried()
    # The first message waits for the receive besides. A busy machine makes all of it longer.
    assert 0.06 <= min(seconds[:5]) < 0.3
    assert 0.06 + 0.08 <= min(seconds[5:]) < 0.6
    assert num_lost == 0
    assert 3.1e6 < carried[0, 1] < 4.5e6  # with headers, and what came before
    assert carried[1, 0] < 1e6


@needs_hosts
def test_hosts_have_names_and_a_folder_of_their_own(tmp_path: Path):
    own = tcp_settings("reno", "tcp_slow_start_after_idle=0")
    with Bed(wires(2, Wire()), 2, own) as bed:
        found = values(launch(tmp_path, 2, ranks_of.about_host, place=bed.place))
        folder = Path(bed.place.folder)
        assert list((folder / "tmp").iterdir()) == []  # what is in it is seen on the host alone
    assert not folder.exists()
    for rank, (name, is_found, files, tcp) in enumerate(found):
        assert (name, is_found, files) == (f"host{rank}", True, ["hosts", f"own-{rank}"])
        assert tcp == ("reno", "0")


@needs_hosts
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("tcp_congestion_control=zip", "congestion must be one of .*reno.*, got 'zip'; choose"),
        ("tcp_zip=1", "settings of TCP must be NAME=VALUE.*, got 'tcp_zip=1'; write"),
        ("tcp_sack", "got 'tcp_sack'; write"),
        ("../ipv4/tcp_sack=1", "got '../ipv4/tcp_sack=1'; write"),
    ],
)
def test_settings_that_no_host_can_have_are_refused(settings: str, words: str):
    with pytest.raises(ConfigError, match=words):
        Bed(wires(2, Wire()), 2, settings)


@needs_hosts
def test_torchrun_runs_on_hosts(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import functools, os, torch, torch.distributed as dist, paci
            from torch import nn
            dist.init_process_group("gloo")
            make = functools.partial(torch.optim.SGD, lr=0.1)
            torch.manual_seed(0)
            with paci.Pipeline(nn.Linear(4, 4), paci.PACI(2, 2), make, nn.MSELoss()) as pipeline:
                for _ in range(3):
                    pipeline.step((torch.ones(2, 4), torch.zeros(2, 4)))
                losses = pipeline.drain().losses
                kinds = {type(end).__name__ for end in pipeline._engine.transport._senders.values()}
            print("rank", dist.get_rank(), sorted(kinds), len(losses))
            """
        )
    )
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=host0:29400", "--rdzv-id=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *rendezvous]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Bed(wires(2, Wire(0.005)), 2) as bed:
        hosts = [
            bed.start(
                host,
                [*torchrun, str(script)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for host in range(2)
        ]
        said = [host.communicate(timeout=150)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert all("['GlooSender']" in each for each in said), said


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of weights that were trained in one process."""
    folder = tmp_path_factory.mktemp("alone")
    ((found, _, _),) = values(launch(folder, 1, ranks_of.train, folder, STEPS, 60.0))
    return dict(found)


def trained(
    folder: Path, bed: Bed, at_half: Callable[[], None] = lambda: None, timeout_s: float = 60.0
) -> list[Rank]:
    """Train on hosts; do ``at_half`` when the first has come to the middle."""
    done: list[bool] = []

    def meanwhile() -> None:
        if not done and ranks_of.step_of(folder, 0) >= STEPS // 2:
            done.append(True)
            at_half()

    ranks = launch(
        folder,
        NUM,
        ranks_of.train,
        folder,
        STEPS,
        timeout_s,
        place=bed.place,
        meanwhile=meanwhile,
    )
    assert done
    return ranks


def same_weights(ranks: list[Rank], weights: dict[str, str]) -> bool:
    found = {name: value for part, _, _ in values(ranks) for name, value in part.items()}
    return found == weights


@needs_hosts
@pytest.mark.parametrize(
    "wire",
    [
        Wire(0.01, 2e8),
        Wire(0.01, jitter_s=0.005),
        Wire(0.01, loss=0.01),
    ],
    ids=["plain", "jitter", "loss"],
)
def test_the_bits_are_those_of_one_process(tmp_path: Path, weights: dict[str, str], wire: Wire):
    with Bed(wires(NUM, wire), NUM) as bed:
        ranks = trained(tmp_path, bed)
        assert (bed.carried()[1] > 0) == (wire.loss > 0)
    assert same_weights(ranks, weights)
    assert [rank.value[2] for rank in ranks] == [0] * NUM  # connections were never made anew


@needs_hosts
def test_a_silence_of_five_seconds_is_survived(tmp_path: Path, weights: dict[str, str]):
    with Bed(wires(NUM, Wire(0.01)), NUM) as bed:
        ranks = trained(tmp_path, bed, lambda: bed.silence([1], 5.0))
    assert same_weights(ranks, weights)
    assert all(rank.value[1] > 5.0 for rank in ranks)


@needs_hosts
@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_connections_that_are_reset_are_made_anew(
    tmp_path: Path, weights: dict[str, str], seconds: float
):
    """For a second even the new ones are reset."""
    with Bed(wires(NUM, Wire(0.01)), NUM) as bed:
        ranks = trained(tmp_path, bed, lambda: bed.reset(0, 1, seconds, [PORT]))
    assert same_weights(ranks, weights)
    num_anew = [rank.value[2] for rank in ranks]
    assert num_anew[0] > 0
    assert num_anew[1] > 0
    assert num_anew[2] == 0


@needs_hosts
def test_a_host_that_vanishes_is_named_within_the_time_out(tmp_path: Path):
    with Bed(wires(NUM, Wire(0.01)), NUM) as bed:
        ranks = trained(tmp_path, bed, lambda: bed.silence([2], 1e6), timeout_s=8.0)
    assert [rank.exit_code for rank in ranks] == [1] * NUM
    texts = [rank.output for rank in ranks]
    assert "from rank 2 (stage 2), got nothing for 8 s; look at that rank's log" in texts[1]
    # Rank 0 waits for rank 1, which waits for the lost one.
    assert "rank 1" in texts[0] or "rank 2" in texts[0]
    # The lost one knows of nobody, and that the store is out of reach.
    assert "the store of this job is gone too" in texts[2]
    assert all(rank.end_s - min(r.end_s for r in ranks) < 25.0 for rank in ranks)


_MODEL = "--stages 2 --layers 2 --width 32 --heads 1 --context 16 --accumulation 4 --batch-size 8"
_RUN = "--updates 12 --flush-first 0 --eval-every 12 --eval-sequences 4 --checkpoint-every 6"
_REST = "--sample-tokens 0 --timeout 60 --device cpu"
OPTIONS = f"{_MODEL} {_RUN} {_REST}".split()


def paci_train(bed: Bed, options: list[str], env: dict[str, str]) -> tuple[list[int], list[str]]:
    """Run ``paci train`` on every host, as a launcher would; return exit codes and outputs."""
    hosts = []
    for host in range(bed.num_hosts):
        own = {"RANK": str(host), "LOCAL_RANK": "0", "WORLD_SIZE": str(bed.num_hosts)}
        own |= {"MASTER_ADDR": "host0", "MASTER_PORT": str(PORT)}
        hosts.append(
            bed.start(
                host,
                [sys.executable, "-m", "paci", "train", *OPTIONS, *options],
                env={**os.environ, **env, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [host.communicate(timeout=150)[0] for host in hosts]
    return [host.returncode for host in hosts], said


@needs_hosts
def test_training_chooses_its_slack_and_keeps_it(tmp_path: Path, text: Path):
    env = {"PACI_CACHE": os.environ["PACI_CACHE"], "PYTHONPATH": os.pathsep.join(sys.path)}
    run = tmp_path / "run"
    options = ["--data", str(text), "--out", str(run), "--slack", "auto"]
    with Bed(wires(2, Wire(0.05)), 2) as bed:
        codes, said = paci_train(bed, options, env)
    assert codes == [0, 0], said
    assert "slack: a micro-batch takes the slowest stage" in said[0]
    kept = json.loads((run / "options.json").read_text())
    chosen = kept["schedule"]
    assert chosen.startswith("paci:slack=")
    assert int(chosen.partition("=")[2]) > 3  # 100 ms there and back, slots of some milliseconds
    assert kept["slack"] is None
    assert f"slack: {chosen.partition('=')[2]}: without it an update would take" in said[0]
    # The same slack, given, leads to the same weights in one process.
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "paci", "train", *OPTIONS, "--data", str(text)]
    command += ["--out", str(alone), "--slack", chosen.partition("=")[2]]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digests = [
        json.loads((folder / "summary.json").read_text())["weights_sha256"]
        for folder in (run, alone)
    ]
    assert digests[0] == digests[1]
    # To go on takes what was chosen, whatever links are like now.
    again = subprocess.run(
        [*command[:-4], "--out", str(run), "--slack", "auto", "--resume"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert "has all its 12 updates: nothing to do" in again.stdout
    assert "a micro-batch takes" not in again.stdout


@needs_hosts
def test_round_trips_are_few(tmp_path: Path):
    """What a start, an update, an evaluation and the like take on links of 100 ms."""
    with Bed(wires(NUM, Wire(0.1)), NUM) as bed:
        counts = values(launch(tmp_path, NUM, ranks_of.count_round_trips, 0.2, place=bed.place))
    longest = {what: max(count[what] for count in counts) for what in counts[0]}
    # In docs/slow-links.md are those of a quiet machine: 2.1, 1, 5.6, 9.2, 0 and 52. A busy one
    # adds time that is no round trip; a message that waits for an answer adds at least one to each.
    print(longest)
    assert longest["an update that is drained"] < 6
    assert longest["utilization"] < 4
    assert longest["evaluation"] < 12
    assert longest["trace"] < 18
    assert longest["close"] < 3
    assert longest["start"] < 100
