"""Summary of the rounds of a fit: what they cost, what they did, and one line of advice; as text and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

TREND = 4  # least number of rounds in each of the halves that are compared
GROWTH = 2.0  # factor that makes a trend; rounds differ by chance, mostly by less than a half
RARE = 0.05  # fraction of the rounds in which something may go wrong before it is the most urgent
TINY = 4_000  # bytes of gradients, beside which the messages of some hundred bytes before each sync count
SHARE = 0.1  # fraction of the time that syncs may take, as in `local_steps_that_pay` of `costs`

History = Sequence[Mapping[str, float]]


def ddp_bytes(local_steps: float, gradient_bytes: float, num_workers: int) -> float:
    """Bytes that a worker would have sent in data-parallel training: an all-reduce of all gradients per step.

    Args:
        local_steps: Number of steps of a worker.
        gradient_bytes: Bytes of all gradients.
        num_workers: Number of workers, K >= 1.

    Example:
        >>> ddp_bytes(100, gradient_bytes=4e6, num_workers=4)
        600000000.0
    """
    from lightning_lopt.costs import all_reduce  # a command, too, which the package must not have imported

    return local_steps * all_reduce(gradient_bytes, num_workers).bytes_sent


def growth(history: History, name: str) -> float | None:
    """Median of a metric in the second half of the rounds, divided by that in the first half without the first rounds.

    The first quarter of the rounds is left out, in which most runs change fast. None where there are too few rounds, or
    rounds of unequal length, whose norms cannot be compared.

    Example:
        >>> rounds = [{"rounds/local_steps": 4.0, "rounds/drift": 1.0 + i} for i in range(16)]
        >>> growth(rounds, "rounds/drift")
        1.8
    """
    late = history[len(history) // 4 :]
    half = len(late) // 2
    if half < TREND or len({row["rounds/local_steps"] for row in late}) > 1:
        return None
    first, second = (median(row[name] for row in rows) for rows in (late[:half], late[-half:]))
    return second / first if first > 0 and math.isfinite(second) else None


def advise(history: History) -> str:
    """Most urgent advice that the rounds give, in one line.

    Workers that are left out and steps that are refused come first, then a pseudo-gradient or a drift that grows, then
    the number of local steps H for which syncs take a tenth of the time, if it is far from the present one.

    Args:
        history: Metrics of each round of the fit, see `RoundMonitor`.
    """
    last, steps = history[-1], max(1.0, median(row["rounds/local_steps"] for row in history))
    refused, left_out = int(last["rounds/fell_back"]), int(last["rounds/left_out"])
    if refused + left_out > RARE * len(history):
        what = f"{left_out} workers were left out and {refused} outer steps refused"
        return f"{what}: lower the local learning rate, or look for faulty data."
    for name, what in (("pseudo_grad_norm", "pseudo-gradient"), ("drift", "drift")):
        if not math.isfinite(last[f"rounds/{name}"]):
            return f"The {what} is not finite: lower the local learning rate."
        factor = growth(history, f"rounds/{name}")
        if factor is not None and factor > GROWTH:
            return f"The {what} grows ({factor:.1f} times): lower the local learning rate{' or H' * (name == 'drift')}."
    sync = median(row["rounds/sync_seconds"] for row in history)
    step = median(row["rounds/seconds"] - row["rounds/sync_seconds"] for row in history) / steps
    wanted = max(1, math.ceil(sync * (1 - SHARE) / SHARE / step)) if step > 0 else 1
    if wanted > 1.5 * steps:
        outer = median(row["rounds/outer_seconds"] for row in history)
        way = "mostly the outer step" if outer > sync / 2 else "or try overlap_steps or compression"
        return f"H could be larger: with H = {wanted} syncs would take a tenth of the time; {way}."
    if wanted < steps / 2:
        return f"H could be smaller: with H = {wanted} syncs would take a tenth of the time."
    return "None: syncs take about a tenth of the time."


def summarize(history: History, gradient_bytes: float, num_workers: int) -> str:
    """Describe the rounds of a fit in six lines.

    Args:
        history: Metrics of each round of the fit, at least one, see `RoundMonitor`.
        gradient_bytes: Bytes of all gradients.
        num_workers: Number of workers, K >= 1.

    Example:
        >>> row = dict(local_steps=16, bytes_sent=4e6, seconds=2.0, sync_seconds=0.3, transfer_seconds=0.1)
        >>> row |= dict(waited_seconds=0.1, outer_seconds=0.2, pseudo_grad_norm=1.0, drift=0.01)
        >>> row |= dict(fell_back=0, left_out=0)
        >>> print(summarize([{f"rounds/{name}": x for name, x in row.items()}], 4e6, num_workers=2))
        1 rounds of 16 local steps on each of 2 workers, in 2 s
          sent     4 MB by each process, 1/16 of what DDP sends in as many steps
          seconds  0.106 per local step, 0.2 per outer step
          syncs    15 % of the time: waiting 5 %, outer steps 10 %
          drift    0.01
          advice   H could be larger: with H = 26 syncs would take a tenth of the time; mostly the outer step.
    """
    steps = sum(row["rounds/local_steps"] for row in history)
    names = ("seconds", "sync_seconds", "waited_seconds", "outer_seconds")
    seconds, syncs, waited, outer = (sum(row[f"rounds/{name}"] for row in history) for name in names)
    sent = history[-1]["rounds/bytes_sent"]
    less = ddp_bytes(steps, gradient_bytes, num_workers) / sent if sent else 0.0
    sending = f"{_number(sent / 1e6)} MB by each process"
    if less:
        share = f"1/{_number(less)} of" if less >= 1 else f"{_number(1 / less)} times"
        sending += f", {share} what DDP sends in as many steps"
    if 0 < less < 1 and gradient_bytes < TINY:
        sending += ": the model is smaller than the messages around its syncs"
    step = (seconds - syncs) / max(steps, 1)
    lengths = sorted({int(row["rounds/local_steps"]) for row in history})
    drifts = dict.fromkeys(f"{history[i]['rounds/drift']:.3g}" for i in (0, len(history) // 2, -1))
    shares = f"waiting {waited / seconds:.0%}, outer steps {outer / seconds:.0%}".replace("%", " %")
    return "\n".join(
        [
            f"{len(history)} rounds of {'-'.join(map(str, sorted({lengths[0], lengths[-1]})))} local steps on each of "
            f"{num_workers} workers, in {_number(seconds)} s",
            f"  sent     {sending}",
            f"  seconds  {_number(step)} per local step, {_number(outer / len(history))} per outer step",
            f"  syncs    {100 * syncs / seconds:.0f} % of the time: {shares}",
            f"  drift    {' → '.join(drifts)}",
            f"  advice   {advise(history)}",
        ]
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw(history: History, gradient_bytes: float, num_workers: int, path: Path) -> None:
    """Draw norms, bytes, times and lengths of the rounds.

    Args:
        history: Metrics of each round of the fit, see `RoundMonitor`.
        gradient_bytes: Bytes of all gradients.
        num_workers: Number of workers, K >= 1.
        path: File of the plot, with the extension of its format.
    """
    from matplotlib.figure import Figure  # an extra

    column = {name: [row[name] for row in history] for name in history[0]}
    rounds = column["rounds/round"]
    steps = [sum(column["rounds/local_steps"][: i + 1]) for i in range(len(history))]
    figure = Figure(figsize=(9, 6), layout="constrained")
    (norms, sent), (times, lengths) = figure.subplots(2, 2)
    norms.plot(rounds, column["rounds/pseudo_grad_norm"], label="norm of the pseudo-gradient")
    norms.plot(rounds, column["rounds/drift"], label="drift")
    norms.set(yscale="log")
    sent.plot(rounds, [x / 1e6 for x in column["rounds/bytes_sent"]], label="sent")
    sent.plot(rounds, [ddp_bytes(x, gradient_bytes, num_workers) / 1e6 for x in steps], "--", label="DDP")
    sent.set(yscale="log" if column["rounds/bytes_sent"][-1] else "linear", ylabel="MB by each process")
    syncs, waited, outer = (column[f"rounds/{name}_seconds"] for name in ("sync", "waited", "outer"))
    local = [whole - sync for whole, sync in zip(column["rounds/seconds"], syncs, strict=True)]
    rest = [max(0.0, sync - w - o) for sync, w, o in zip(syncs, waited, outer, strict=True)]
    times.stackplot(
        rounds, local, waited, outer, rest, labels=["local steps", "waiting", "outer step", "rest of the sync"]
    )
    times.set(ylabel="seconds")
    lengths.step(rounds, column["rounds/local_steps"], where="mid", label="local steps, H")
    lengths.set(ylim=(0, None))
    for axes in (norms, sent, times, lengths):
        axes.set(xlabel="round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
