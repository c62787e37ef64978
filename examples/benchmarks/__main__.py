"""Benchmarks of outer optimizers: training curves, seconds over slow links, and the speed of the code."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from examples.benchmarks.compare import finetune, heldout, paper, plot, qsr, run, tune
from examples.benchmarks.report import UsageError
from examples.benchmarks.speed import meta_speed, outer_step, overhead
from examples.benchmarks.wire import peers, wire
from lightning_lopt import WeightsError

COMMANDS = {
    "paper": paper,
    "run": run,
    "tune": tune,
    "plot": plot,
    "qsr": qsr,
    "heldout": heldout,
    "finetune": finetune,
    "wire": wire,
    "peers": peers,
    "outer-step": outer_step,
    "meta-speed": meta_speed,
    "overhead": overhead,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark.

    Args:
        argv: Arguments of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    args.main(args)


if __name__ == "__main__":
    try:
        main()
    except (UsageError, WeightsError, OSError) as error:  # a wrong argument, or a file or name that is not there
        raise SystemExit(str(error)) from error
