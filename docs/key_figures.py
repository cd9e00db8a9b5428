"""The table of figures in the README: a line per question, made of the rows of its result."""

from __future__ import annotations

from raw import BY_NAME, Result, by_micro_batches, measured, of_first_stage, row_of


def key_figures(found: dict[str, Result]) -> list[str]:
    """The lines of the table."""
    rows = [
        ("Speed over PyTorch's `Schedule1F1B`", *_speed_figure(found), "throughput"),
        ("The same, of the speed of the stages alone", *_limit_figure(found), "throughput"),
        ("Utilization", *_waiting_figure(found), "emulate"),
        ("Host time per micro-batch and stage", *_overhead_figure(found), "overhead"),
        ("Memory over 1F1B-flush", *_memory_figure(found), "memory"),
        ("Utilization, predicted and measured", *_prediction_figure(found), "throughput, emulate"),
        ("Validation loss against a flush's", *_loss_figure(found), "convergence"),
        ("Time to that loss, of 1F1B over PACI", *_accuracy_figure(found), "time-to-accuracy"),
        ("Seconds to that loss, of PyTorch's over ours", *_race_figure(found), "race"),
        ("`make train`'s seconds to a loss, of 1F1B over PACI", *_first_figure(found), "race"),
    ]
    lines = ["| | figure | of | `paci bench` |", "|---|---|---|---|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _speed_figure(found: dict[str, Result]) -> tuple[str, str]:
    by_size = by_micro_batches(found)
    ratios = (row_of(result, "torch", "Schedule1F1B")["time_ratio"] for result in by_size.values())
    ideal = ", ".join(f"{(m + 1) / m:.4g}" for m in by_size)
    sizes = ", ".join(map(str, by_size))
    return (
        "**" + ", ".join(f"{ratio:.2f}" for ratio in ratios) + "**",
        f"two real stages on two cores, {sizes} micro-batches per update (in theory {ideal})",
    )


def _limit_figure(found: dict[str, Result]) -> tuple[str, str]:
    by_size = by_micro_batches(found)
    shares = (row_of(result, "paci", "paci")["share_of_limit"] for result in by_size.values())
    return "**" + ", ".join(f"{share:.1%}" for share in shares) + "**", "the same runs"


def _waiting_figure(found: dict[str, Result]) -> tuple[str, str]:
    parts, ratios = [], []
    for name in ("emulate-8", "emulate-16"):
        parts.append(f"{row_of(found[name], 'paci', 'paci')['utilization']:.1%}")
        ratios.append(f"{row_of(found[name], 'torch', 'Schedule1F1B')['time_ratio']:.2f}")
    words = "8 and 16 workers whose stages wait; an update of `Schedule1F1B` takes "
    return f"**{', '.join(parts)}**", words + " and ".join(ratios) + " times as long"


def _overhead_figure(found: dict[str, Result]) -> tuple[str, str]:
    rows = found["overhead"]["rows"]
    sizes = list(dict.fromkeys(row["num_workers"] for row in rows))

    def figures(runtime: str, schedule: str) -> list[str]:
        arms = [r for r in rows if (r["runtime"], r["schedule"]) == (runtime, schedule)]
        return [
            f"{min(r['overhead_us'] for r in arms if r['num_workers'] == n):.0f}" for n in sizes
        ]

    ours, theirs = figures("paci", "paci"), figures("torch", "Schedule1F1B")
    return (
        f"**{', '.join(ours)} us**",
        f"empty stages, {' and '.join(map(str, sizes))} workers; PyTorch's {', '.join(theirs)} us",
    )


def _memory_figure(found: dict[str, Result]) -> tuple[str, str]:
    rows = [
        row
        for row in of_first_stage(found["memory"])
        if row["num_workers"] == 8 and row["precision"] in ("bf16", "autocast")
    ]
    totals = {(r["schedule"], r["precision"], r["weights"]): r["total_bytes"] for r in rows}
    flush = totals["1f1b", "bf16", "current"]
    ours = {totals["paci", "bf16", policy] / flush for policy in ("current", "lookahead")}
    stash = totals["paci", "bf16", "stash"] / flush
    autocast = totals["paci", "autocast", "current"] / flush
    return (
        f"**{', '.join(f'{each:.2f}' for each in sorted(ours))}**",
        f"stage 0 of 8 in bf16, looking ahead or not; a stash {stash:.2f}, autocast {autocast:.2f}",
    )


def _prediction_figure(found: dict[str, Result]) -> tuple[str, str]:
    errors = [
        abs(row["utilization"] - row["predicted_utilization"])
        for result in found.values()
        if result["bench"] in ("throughput", "emulate")
        for row in measured(result, "predicted_utilization")
    ]
    return (
        f"**{100 * max(errors):.1f} points apart** at most",
        f"all {len(errors)} rows of these results that have both",
    )


def _loss_figure(found: dict[str, Result]) -> tuple[str, str]:
    muon = BY_NAME["convergence"].summarize(found["convergence-long"]["rows"])
    adamw = BY_NAME["convergence"].summarize(found["convergence-adamw-long"]["rows"])
    without_trials = {row["accumulation"]: row for row in muon if _is_without_trials(row)}
    (ours,) = (row for row in adamw if row["method"] == "lookahead")
    told = ", ".join(_share_and_seeds(without_trials[a]) for a in (8, 4))
    return (
        f"**Muon: {told}; AdamW: {_share_and_seeds(ours)}**",
        "8 stages; Muon with 8 and 4 micro-batches after 3,000 updates, without trials; AdamW "
        "with 8 after 1,200, warm-up of a tenth",
    )


def _share_and_seeds(row: Result) -> str:
    seeds = row["num_seeds"]
    return f"{row['against_flush']:+.1%} ({seeds} seed{'s' * (seeds > 1)})"


def _is_without_trials(row: Result) -> bool:
    """Whether it is the default but for trials: a step is predicted anew only when the next update
    is due, so never in a full pipeline."""
    return str(row["method"]) == f"lookahead:lookahead:refresh={row['accumulation']}"


def _accuracy_figure(found: dict[str, Result]) -> tuple[str, str]:
    rows = BY_NAME["time-to-accuracy"].summarize(found["time-to-accuracy"]["rows"])
    by_size = {
        size: row
        for row in rows
        for size in [row["num_micro_batches"]]
        if row.get("run_updates") == 3000 and row["method"] == f"lookahead:lookahead:refresh={size}"
    }
    told = ", ".join(by_size[size]["1f1b"] for size in (8, 4))
    row = by_size[8]
    finer, fastest = (row[name].partition(" ")[0] for name in ("fastest 1f1b", "fastest of all"))
    return (
        f"**{told}**",
        f"the same runs with Muon, times simulated; at 8 micro-batches 1F1B with smaller ones "
        f"{finer}, zero bubble {row['torch-zero-bubble']}, the fastest of all {fastest}",
    )


def _race_figure(found: dict[str, Result]) -> tuple[str, str]:
    rows = BY_NAME["race"].summarize(found["race"]["rows"])
    theirs = [row for row in rows if row["runtime"] == "torch"]
    told = ", ".join(f"{row['time_ratio']:.2f}" for row in theirs)
    sizes = " and ".join(str(row["num_micro_batches"]) for row in theirs)
    return f"**{told}**", f"two real workers, {sizes} micro-batches per update, all costs in it"


def _first_figure(found: dict[str, Result]) -> tuple[str, str]:
    ours, flush = BY_NAME["race"].summarize(found["race-first"]["rows"])
    return (
        f"**{flush['time_ratio']:.2f}**",
        f"8 micro-batches per update, {ours['num_seeds']} seeds, all costs in it: updates "
        f"{1 / flush['speed_ratio']:.2f} times as fast, and at the end a loss of "
        f"{ours['val_loss']:.3f} instead of {flush['val_loss']:.3f}",
    )
