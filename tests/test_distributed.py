"""Pipelines over several processes (gloo): the same bits as one process, and how they fail."""

from __future__ import annotations

import functools
import itertools
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_helpers as ranks_of
import pytest
from distributed_helpers import Run, Vee, make_stage, steps, train
from launching import LAUNCH_S, Rank, end_session, is_alive, launch, values
from launching import __file__ as launching_file

import paci
from paci.runtime import failures
from paci.runtime.failures import SOMEBODY, Complaint, first_failure
from paci.runtime.weights.policy_registry import prepare_weight_policies, weight_policies
from paci.runtime.world import hosted_stages
from paci.schedule.check import check
from paci.schedule.registry import schedules

N = 4
STEPS = {1: 9, 2: 6, 8: 3}
POLICIES = tuple(weight_policies())
SIZES = (2, 3, 4)


# --- the same bits ------------------------------------------------------------------------------


def registered(accumulation: int) -> list[paci.Schedule]:
    """One of each schedule there is that takes this accumulation."""
    found = []
    for cls in schedules().values():
        try:
            found.append(cls(N, accumulation))  # type: ignore[call-arg]
        except paci.ConfigError:
            continue
    return found


def goes(policy: str, schedule: paci.Schedule) -> bool:
    """Whether the two have a meaning together."""
    try:
        return bool(prepare_weight_policies(policy, schedule))
    except paci.ConfigError:
        return False


def matrix() -> dict[str, Run]:
    runs = {}
    for a, num_steps in STEPS.items():
        for schedule, policy in itertools.product(registered(a), POLICIES):
            if goes(policy, schedule):
                runs[f"{schedule.name}-{a}-{policy}"] = Run(schedule, steps(num_steps), policy)
        for slack in (1, 2):
            runs[f"slack-{slack}-{a}"] = Run(paci.PACI(N, a, slack), steps(num_steps))
    for policy in POLICIES:
        late = next(s for s in (paci.PACI(N, 2), paci.PACI(N, 3)) if goes(policy, s))
        runs[f"bf16-{policy}"] = Run(late, steps(6), policy, "bf16")
        vee = next(s for s in (Vee(N, 2), Vee(N, 8)) if goes(policy, s))
        runs[f"vee-{policy}"] = Run(vee, steps(8), policy)
        runs[f"boundary-{policy}"] = Run(late, steps(6), policy, model="many")
    runs["boundary-bf16"] = Run(paci.GPipe(N, 2), steps(6), "current", "bf16", "many")
    runs["boundary-vee"] = Run(Vee(N, 1), steps(8), model="many")
    return runs


def stretches() -> dict[str, Run]:
    """Runs that are drained often, in all ways."""
    chance = random.Random(1)
    drain, shapes = (("drain", 0),), (1, 2, 3, 5)
    many = [steps(chance.randint(1, 7), chance.choice(shapes)) + drain for _ in range(30)]
    asks = [("drift", 0), ("trace", 0), ("evaluate", 2), ("evaluate", 5), ("reload", 0)]
    busy = [(*steps(chance.randint(1, 4), chance.choice(shapes)), ask) for ask in asks * 2]
    runs = {}
    for a in (1, 2):
        runs[f"one-step-a-stretch-{a}"] = Run(paci.PACI(N, a), (steps(1) + drain) * 8)
        runs[f"many-stretches-{a}"] = Run(paci.PACI(N, a, 1), tuple(itertools.chain(*many)))
        runs[f"questions-{a}"] = Run(paci.PACI(N, a), tuple(itertools.chain(*busy)))
    runs["questions-flush"] = Run(paci.OneFOneBFlush(N, 2), tuple(itertools.chain(*busy)), "stash")
    runs["questions-recompute"] = Run(paci.PACI(N, 2), tuple(itertools.chain(*busy)), "recompute")
    for policy in ("double_buffer", "pipemare", "predict"):  # which go on from state of their own
        schedule = paci.PACI(N, 3)
        runs[f"questions-{policy}"] = Run(schedule, tuple(itertools.chain(*busy)), policy)
    several = steps(3) + steps(2, 5) + steps(1, 1) + steps(7, 3) + steps(1, 4) + steps(1, 2)
    for policy in ("current", "recompute", "stash"):
        runs[f"shapes-{policy}"] = Run(paci.PACI(N, 2), several, policy, model="many")
    runs["shapes-flush"] = Run(paci.OneFOneBFlush(N, 2), several)
    runs["shapes-vee"] = Run(Vee(N, 1), several)
    runs["questions-vee"] = Run(Vee(N, 2), tuple(itertools.chain(*busy)))
    runs["no-step"] = Run(paci.PACI(N, 2), (("evaluate", 3), ("drain", 0), ("drift", 0)))
    for tags in (1, 3):
        runs[f"tags-{tags}"] = Run(
            paci.PACI(N, 1), (steps(9) + drain) * 2, model="many", most_tags=tags
        )
    return runs


def coded() -> dict[str, Run]:
    """Runs under codecs: rounding at random both ways, residuals, forms that change, drains."""
    specs = {
        "bf16": "bf16",
        "int8": "int8:stochastic=all",
        "int4": "int4:stochastic=all,block=2",
        "lowrank": "lowrank:rank=3",
        "topk": "topk:share=0.4,feedback=all",
        "pair": "int8+topk:share=0.2,feedback=gradients",
    }
    asks = [("evaluate", 2), ("drain", 0), ("reload", 0), ("trace", 0)]
    busy = tuple(itertools.chain(*((*steps(3, 1 + k % 3), ask) for k, ask in enumerate(asks * 2))))
    runs = {f"codec-{name}": Run(paci.PACI(N, 2), busy, codec=spec) for name, spec in specs.items()}
    for name in ("int8", "topk"):
        spec = specs[name]
        runs[f"codec-{name}-many"] = Run(paci.PACI(N, 2), busy, model="many", codec=spec)
        runs[f"codec-{name}-vee"] = Run(Vee(N, 2), busy, codec=spec)
        runs[f"codec-{name}-flush"] = Run(
            paci.OneFOneBFlush(N, 2), busy, "recompute", "bf16", codec=spec
        )
    return runs


RUNS = matrix() | stretches() | coded()


def runs_of(size: int) -> dict[str, Run]:
    """Those that so many processes can share."""
    return {name: run for name, run in RUNS.items() if run.schedule.num_workers >= size}


@functools.cache
def alone(name: str) -> dict[str, Any]:
    return train(RUNS[name])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Rank]]:
    """The ranks of a world of a size, which did all runs; one launch a size. Three of them talk
    over gloo, the others share memory."""

    @functools.cache
    def run(size: int) -> list[Rank]:
        folder = tmp_path_factory.mktemp(f"world-{size}")
        return launch(folder, size, ranks_of.train_all, runs_of(size), size != 3)

    return run


def require_equal(run: Run, expected: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """What ranks found must be what one process found, each its part of it."""
    assert len(ranks) > 1
    for part in ("weights", "versions"):
        held = [index for found in ranks for index in found[part]]
        assert sorted(held) == list(range(run.schedule.num_stages))
        merged = {index: value for found in ranks for index, value in found[part].items()}
        assert merged == expected[part]
    for position, found in enumerate(ranks):
        stages = hosted_stages(run.schedule, position, len(ranks))
        assert tuple(found["weights"]) == stages
        assert found["num_micro_batches"] == expected["num_micro_batches"]
        assert found["bytes_sent"] == expected["bytes_sent"]
        for mine, wanted in zip(found["log"], expected["log"], strict=True):
            if isinstance(wanted, list) and run.schedule.num_stages - 1 not in stages:
                assert mine == []  # losses are known where the last stage is
            else:
                assert mine == wanted


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size in SIZES for name in runs_of(size)]
)
def test_many_processes_are_one_bit_for_bit(
    size: int, name: str, together: Callable[[int], list[Rank]]
):
    require_equal(RUNS[name], alone(name), [found[name] for found in values(together(size))])


def test_every_schedule_takes_part():
    assert set(schedules()) <= {run.schedule.name for run in RUNS.values()}
    check(Vee(N, 2))


def test_bits_tell_runs_apart():
    """The comparison above means something: other weights give other bits."""
    names = ["paci-1-current", "paci-1-stash", "paci-1-recompute", "slack-1-1", "1f1b-1-current"]
    assert len({alone(name)["weights"][0] for name in names}) == len(names)
    assert alone("1f1b-2-current")["weights"] == alone("gpipe-2-current")["weights"]
    names = [name for name in coded() if name.count("-") == 1]
    assert len({alone(name)["weights"][0] for name in names}) == len(names)


def test_a_weight_that_is_handed_on_is_a_copy(tmp_path: Path):
    run = Run(paci.PACI(N, 1), steps(9), model="carry")
    found = values(launch(tmp_path, N, ranks_of.train_all, {"run": run}))
    require_equal(run, train(run), [each["run"] for each in found])


@pytest.mark.parametrize(
    "pipelines",
    [
        [((0, 1), Run(paci.PACI(2, 2), steps(6))), ((2, 3), Run(paci.PACI(2, 2), steps(6)))],
        [((0, 2), Run(Vee(4, 1), steps(6))), ((1, 3), Run(paci.PACI(4, 2, 1), steps(8)))],
        [((1,), Run(paci.PACI(1, 2), steps(3))), ((0, 2, 3), Run(paci.GPipe(4, 2), steps(4)))],
    ],
    ids=["equal", "interleaved", "uneven"],
)
def test_pipelines_side_by_side(tmp_path: Path, pipelines: list[tuple[tuple[int, ...], Run]]):
    found = values(launch(tmp_path, 4, ranks_of.train_side_by_side, pipelines))
    for held, run in pipelines:
        if len(held) > 1:
            require_equal(run, train(run), [found[rank] for rank in held])
        else:
            assert found[held[0]] == train(run)


def test_torchrun_starts_it(tmp_path: Path):
    run = RUNS["paci-2-current"]
    job = pickle.dumps((2, "env", ranks_of.train_all, ({"run": run},), None))
    (tmp_path / "job").write_bytes(job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*command, launching_file, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LAUNCH_S)
        finally:
            end_session(process.pid)
    assert process.returncode == 0, output
    found = [pickle.loads((tmp_path / f"{i}.value").read_bytes()) for i in range(2)]
    require_equal(run, train(run), [each["run"] for each in found])


# --- refusals -----------------------------------------------------------------------------------


def test_ranks_that_differ_are_told(tmp_path: Path):
    run = Run(paci.PACI(3, 2), ())
    usual: Any = (run, {}, None)
    cases = {
        "accumulation": [usual, usual, (Run(paci.PACI(3, 4), ()), {}, None)],
        "schedule": [(Run(paci.GPipe(3, 2), ()), {}, None), usual, usual],
        "precision": [usual, (run, {"precision": "bf16"}, None), usual],
        "seed": [usual, usual, (run, {"seed": 4}, None)],
        "weights": [usual, (run, {"weights": "stash"}, None), usual],
        "codec": [usual, usual, (run, {"codec": "int8"}, None)],
        "too many ranks": (Run(paci.PACI(2, 2), ()), {}, [make_stage("block", 0, 2)]),
        "too many stages": (run, {}, [make_stage("block", i, 3) for i in range(2)]),
    }
    found = values(launch(tmp_path, 3, ranks_of.disagree, list(cases.values())))
    told = dict(zip(cases, found[0], strict=True))
    assert found[1][:7] == found[2][:7] == found[0][:7]  # all ranks are told the same
    for name, parts in {
        "accumulation": (
            "the schedule",
            "'PACI(num_stages=3, accumulation=2, slack=0, split_backward=False)' on rank 0",
            "'PACI(num_stages=3, accumulation=4, slack=0, split_backward=False)' on rank 2",
        ),
        "schedule": (
            "the schedule",
            "'GPipe(num_stages=3, num_micro_batches=2)' on rank 0",
            "PACI",
        ),
        "precision": ("precision", "'fp32' on rank 0", "'bf16' on rank 1"),
        "seed": ("the seed", "3 on rank 0", "4 on rank 2"),
        "weights": ("weights", "'Current()' on rank 0", "'Stash()' on rank 1"),
        "codec": ("the codec", "activation=None", "Int8(stochastic='gradients')", "on rank 2"),
        "too many ranks": ("at most", "workers (2)", "got 3"),
        "too many stages": ("must hand over the stages [0]", "got 2 stages"),
    }.items():
        assert all(part in told[name] for part in parts), (name, told[name])
    for rank in (1, 2):
        assert f"must hand over the stages [{rank}]" in found[rank][-1]


def test_a_state_that_one_rank_refuses_is_taken_over_by_none(tmp_path: Path):
    found = values(launch(tmp_path, 2, ranks_of.load_differing, Run(paci.PACI(2, 2), ())))
    for rank, (told, kept) in enumerate(found):
        other = "" if rank else "rank 1 refused: "
        assert told[0].startswith(f"{other}the state must hold the stages [1]"), told
        assert "number of micro-batches" in told[1], told
        assert "0 on rank 0" in told[1], told
        assert "4 on rank 1" in told[1], told
        assert kept


def test_no_loss_is_lost_to_a_drain_between_steps():
    """A V knows some losses only when it is drained, which asking for the drift does."""
    run = RUNS["questions-vee"]
    told = [
        loss for each in alone("questions-vee")["log"] if isinstance(each, list) for loss in each
    ]
    assert len(told) == sum(what == "step" for what, _ in run.plan)


def test_evaluation_batches_are_counted_first(tmp_path: Path):
    for told in values(launch(tmp_path, 2, ranks_of.evaluate_unevenly, Run(paci.PACI(2, 2), ()))):
        assert "agree on the number of evaluation batches, got 1 on rank 0 and 2 on rank 1" in told


def test_a_rank_that_evaluates_what_is_no_pair_is_named(tmp_path: Path):
    run = Run(paci.PACI(2, 2), ())
    first, last = values(launch(tmp_path, 2, ranks_of.evaluate_what_is_no_pair, run))
    words = "ConfigError: a batch must be a pair (inputs, targets), got tuple"
    assert last.startswith(words)
    assert first.startswith(f"WorkerError: rank 1 failed first: {words}")


def test_a_group_must_hold_the_process(tmp_path: Path):
    run = Run(paci.PACI(2, 2), ())
    for rank, told in enumerate(
        values(launch(tmp_path, 2, ranks_of.build_with_a_foreign_group, run))
    ):
        assert f"without rank {rank}" in told


# --- failures -----------------------------------------------------------------------------------

TROUBLED = Run(paci.PACI(N, 2), ())


def require_ended(ranks: list[Rank], began: Path, first: int) -> None:
    """All ranks must have failed, soon after the trouble began, and left nothing behind."""
    for rank in ranks:
        assert rank.exit_code != 0, rank.output
        assert rank.end_s - float(began.read_text()) < 30
        assert not is_alive(rank.pid)
    for number, rank in enumerate(ranks):
        if number != first:
            assert f"rank {first}" in rank.output, (number, rank.output)


@pytest.mark.parametrize(("culprit", "store"), [(0, "tcp"), (1, "tcp"), (3, "file")])
def test_an_exception_ends_all_ranks_and_is_named(tmp_path: Path, culprit: int, store: str):
    began = tmp_path / "began"
    found = launch(
        tmp_path,
        N,
        ranks_of.train_into_trouble,
        *(TROUBLED, culprit, "raise", 60.0, began),
        store=store,
    )
    require_ended(found, began, culprit)
    assert "\nValueError: the sky is falling" in found[culprit].output
    for number, rank in enumerate(found):
        if number != culprit:
            cause = f"rank {culprit} failed first: ValueError: the sky is falling"
            assert f"WorkerError: {cause}" in rank.output


@pytest.mark.parametrize("culprit", [2, 0])
def test_a_killed_rank_is_named(tmp_path: Path, culprit: int):
    """Rank 0 keeps the store, through which the others would tell each other."""
    began = tmp_path / "began"
    args = (TROUBLED, culprit, "kill", 60.0, began)
    found = launch(tmp_path, N, ranks_of.train_into_trouble, *args, plain=True)
    require_ended(found, began, culprit)
    assert found[culprit].exit_code == -9
    for number, rank in enumerate(found):
        if number != culprit:
            assert "paci.errors.WorkerError: " in rank.output or "LinkError: " in rank.output
        if abs(number - culprit) == 1:
            assert f"a broken connection: rank {culprit} is gone" in rank.output


def test_a_rank_that_stops_is_named(tmp_path: Path):
    began = tmp_path / "began"
    args = (TROUBLED, 2, "sleep", 3.0, began)
    found = launch(tmp_path, N, ranks_of.train_into_trouble, *args)
    require_ended(found, began, 2)
    assert "paci: error: rank 2 ends: rank 2 failed first: rank " in found[2].output
    words = {
        1: "rank 1 (stage 1) must receive the gradient of micro-batch",
        3: "rank 3 (stage 3) must receive the activation of micro-batch",
    }
    for number, words_of_rank in words.items():
        assert words_of_rank in found[number].output
        assert "from rank 2 (stage 2), got nothing for 3 s" in found[number].output
    assert "WorkerError: rank 2 failed first: " in found[0].output


def test_one_rank_that_hands_over_too_much_ends_all(tmp_path: Path):
    began = tmp_path / "began"
    found = launch(tmp_path, 3, ranks_of.hand_over_too_much, Run(paci.PACI(3, 2), ()), began)
    for rank in found:
        assert rank.exit_code != 0
        assert rank.end_s - float(began.read_text()) < 30
        assert "must hand over the stages [2]" in rank.output
    assert "ConfigError: rank 2 refused: " in found[0].output


def test_who_failed_first():
    own = Complaint(3, 3, "ValueError: x")
    blames_3, blames_1, blames_somebody = (
        Complaint(2, 3, "rank 3 is gone"),
        Complaint(0, 1, "nothing for 3 s"),
        Complaint(4, SOMEBODY, "a collective failed"),
    )
    assert first_failure([blames_3, blames_somebody, own]) is own
    assert first_failure([own, Complaint(1, 1, "later")]) is own
    # 1 is silent; 2 and 0 only waited for those who waited
    chain = [Complaint(3, 2, ""), Complaint(2, 0, ""), blames_1]
    for order in itertools.permutations(chain):
        assert first_failure(order) is blames_1
    assert first_failure([blames_somebody, blames_1]) is blames_1
    assert first_failure([blames_somebody]) is blames_somebody
    assert str(own) == "rank 3 failed first: ValueError: x"
    assert str(blames_1) == "rank 1 failed first: nothing for 3 s"


def test_what_a_collective_failed_of_is_said_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(failures.dist, "get_rank", lambda: 0)
    error = failures.collective_error(RuntimeError("connection closed\nby somebody"))
    assert str(error) == (
        "rank 0 must hear from all ranks, got connection closed; look at the other ranks' logs"
    )
    assert failures.collective_error(error) is error
    board = object.__new__(failures.FailureBoard)
    board._rank = 0
    assert board._complaint(error) == Complaint(0, SOMEBODY, str(error))


# --- the transport itself -----------------------------------------------------------------------


def test_a_channel_without_a_name_or_a_connection_goes_over_gloo_at_both_ends(tmp_path: Path):
    run = Run(paci.PACI(2, 2), steps(3))
    first, second = values(launch(tmp_path, 2, ranks_of.meet_in_vain, run, tmp_path))
    # Rank 0 has no name to wait at; rank 1 has one, to which rank 0 came.
    assert first[0] == {"activation": "GlooSender", "gradient": "SharedReceiver"}
    assert second[0] == {"activation": "GlooReceiver", "gradient": "SharedSender"}
    assert first[2] == {"activation": "SharedSender", "gradient": "GlooReceiver"}
    assert second[2] == {"activation": "SharedReceiver", "gradient": "GlooSender"}
    for each in (1, 3):
        require_equal(run, train(run), [first[each], second[each]])
    assert first[4] == second[4] == []
