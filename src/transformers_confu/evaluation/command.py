"""The evaluation command: `python -m transformers_confu.evaluation.command --help`, or with a YAML file of options."""

import sys

from transformers import HfArgumentParser
from transformers.utils import logging

from .aggregation import Comparison, settings_of
from .arguments import EvaluationArguments
from .runner import measure
from .tables import speed_table


def main(argv: list[str] | None = None) -> None:
    """Measure what is not measured yet, print the main table of each setting, write the report if asked for."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(EvaluationArguments)
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        (arguments,) = parser.parse_yaml_file(argv[0])
    else:
        (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.set_verbosity_warning()
    file = measure(arguments)
    for setting in settings_of(file.answers):
        comparison = Comparison(setting, file.answers, arguments.seed)
        print(f"\n{setting}; {len(comparison.questions)} questions, {len(comparison.runs)} runs\n")
        print(speed_table(comparison).markdown())


if __name__ == "__main__":
    main()
