"""The evaluation command: `confu evaluate run.yaml`, or with options, which may follow a file; `--help` lists them."""

import shlex
import sys
from dataclasses import fields
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

from ..common.option_files import read_option_file
from .arguments import EvaluationArguments
from .figures import comparisons_of
from .measure import measure
from .report import conclusion, markdown, write_report
from .tables import speed_table


def main(argv: list[str] | None = None) -> None:
    """Measure what is not measured yet, say what it shows, and write the report if asked for."""
    argv = sys.argv[1:] if argv is None else argv
    command = f"confu evaluate {shlex.join(argv)}"
    parser = HfArgumentParser(EvaluationArguments, allow_abbrev=False)
    (options,) = read_option_file(argv, {option.name: option.type for option in fields(EvaluationArguments)})
    (arguments,) = parser.parse_args_into_dataclasses(options, look_for_args_file=False)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()  # of loading; the measurement has its own
    file = measure(arguments, command)
    comparisons = comparisons_of([file])
    print(f"\n{markdown(speed_table(comparisons))}\n")
    print(*map(conclusion, comparisons), sep="\n\n")
    if arguments.report is not None:
        print(f"\nReport: {write_report([file], Path(arguments.report))}")
