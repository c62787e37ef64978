"""Benchmarks of outer optimizers: training curves, seconds over slow links, and the speed of the code."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from examples.benchmarks.compare import finetune, heldout, paper, plot, qsr, regret, run, tune
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
    "regret": regret,
    "finetune": finetune,
    "wire": wire,
    "peers": peers,
    "outer-step": outer_step,
    "meta-speed": meta_speed,
    "overhead": overhead,
}


class Command(argparse.ArgumentParser):
    """Parser whose help has the choices and the default of each option."""

    @override
    def add_argument(self, *names: Any, help: str | None = None, **options: Any) -> argparse.Action:
        notes = [help] if help else []
        if "choices" in options:
            options["metavar"] = names[-1].strip("-").upper()
            notes.append(f"of {', '.join(map(repr, options['choices']))}")
        default = options.get("default")
        if default not in (None, argparse.SUPPRESS) and "default" not in (help or ""):
            several = isinstance(default, Sequence) and not isinstance(default, str)
            notes.append(f"default: {', '.join(map(repr, default)) if several else default}")
        return super().add_argument(*names, help="; ".join(notes), **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark.

    Args:
        argv: Arguments of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Command)
    for name, module in COMMANDS.items():
        description = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    args.main(args)


if __name__ == "__main__":
    try:
        main()
    except (UsageError, WeightsError, OSError) as error:  # a wrong argument, or a file or name that is not there
        raise SystemExit(str(error)) from error
