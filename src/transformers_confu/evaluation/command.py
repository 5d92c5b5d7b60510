"""The evaluation command: `confu evaluate run.yaml`, or with options, which may follow a file; `--help` lists them."""

import shlex
import sys
from dataclasses import fields
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

from ..common.option_files import read_option_file
from .aggregation import Comparison, settings_of
from .arguments import EvaluationArguments
from .plots import matplotlib_pyplot
from .report import write_report
from .runner import measure
from .tables import speed_table


def main(argv: list[str] | None = None) -> None:
    """Measure what is not measured yet, print the main table of each setting, write the report if asked for."""
    argv = sys.argv[1:] if argv is None else argv
    command = f"confu evaluate {shlex.join(argv)}"
    parser = HfArgumentParser(EvaluationArguments, allow_abbrev=False)
    (options,) = read_option_file(argv, {option.name: option.type for option in fields(EvaluationArguments)})
    (arguments,) = parser.parse_args_into_dataclasses(options, look_for_args_file=False)
    if options is not argv:
        command += f"\n\n# {argv[0]}\n{Path(argv[0]).read_text(encoding='utf-8').rstrip()}"
    if arguments.report is not None:
        matplotlib_pyplot()  # a missing package shows before the work, not after it
    logging.set_verbosity_warning()
    logging.disable_progress_bar()  # of loading; the measurement has its own
    file = measure(arguments, command)
    for setting in settings_of(file.answers):
        comparison = Comparison(setting, file.answers, arguments.seed)
        print(f"\n{setting}. Questions: {len(comparison.questions)}. Runs: {len(comparison.runs)}.\n")
        print(speed_table(comparison).markdown())
    if arguments.report is not None:
        print(f"\nReport: {write_report(file, Path(arguments.report), command, arguments.seed)}")
