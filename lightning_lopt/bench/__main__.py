"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_lopt.bench import meta_speed, outer_step, overhead, paper, plot, qsr, run, sparse, tune, wire

COMMANDS = {
    "meta-speed": meta_speed,
    "outer-step": outer_step,
    "overhead": overhead,
    "paper": paper,
    "qsr": qsr,
    "run": run,
    "sparse": sparse,
    "tune": tune,
    "plot": plot,
    "wire": wire,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark.

    Args:
        argv: the arguments; default: those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_lopt.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    args.main(args)


if __name__ == "__main__":
    main()
