"""
The command line, `confu`: a table of commands, each the `main(argv)` of a module that is imported only when it runs.
"""

import difflib
import dis
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from . import __version__
from .common.extras import advice


@dataclass(frozen=True)
class Command:
    """A module of this package with a `main(argv)`, one line on what it does, and a call that shows how."""

    module: str
    summary: str
    example: str


# A command of two words is a part of a group: `confu data` lists its parts.
COMMANDS = {
    "demo": Command(
        "commands.demo",
        "Plain generate and ConFu side by side on a small real model: same text, other speed.",
        "confu demo",
    ),
    "chat": Command(
        "commands.chat",
        "Chat in the terminal with a target and its draft, and watch tau.",
        "confu chat --target demo",
    ),
    "data prompts": Command(
        "data.prompts",
        "Build a set of prompts from public sources, without the questions of evaluation sets.",
        "confu data prompts --sources open --output prompts.jsonl",
    ),
    "data regenerate": Command(
        "data.regeneration",
        "Let the target answer prompts: a draft learns from its target's own answers.",
        "confu data regenerate --target demo --prompts prompts.jsonl --output answers.jsonl",
    ),
    "data serve-regenerate": Command(
        "data.served_regeneration",
        "The same through a server of vLLM or SGLang, at scale, and turn by turn.",
        "confu data serve-regenerate --server http://localhost:8000/v1 --tokenizer Qwen/Qwen3-4B "
        "--prompts prompts.jsonl --output answers.jsonl",
    ),
    "data publish": Command(
        "data.publication",
        "Add answers to a dataset folder for the Hub, with a card that counts them and names their sources.",
        "confu data publish --answers answers.jsonl --prompts prompts.jsonl --output confu-answers",
    ),
    "train": Command(
        "training.train",
        "Train a draft: EAGLE-3 core, contemplation, or everything jointly.",
        "confu train config.yaml",
    ),
    "evaluate": Command(
        "evaluation.command",
        "Measure accepted length and speed against plain generate, on questions of your own or a benchmark.",
        "confu evaluate --drafts runs/draft --questions questions.jsonl --output results.jsonl --report report",
    ),
    "report": Command(
        "evaluation.report",
        "Write the report on one or several measurements of confu evaluate: what to set, tables, plots.",
        "confu report results/base.jsonl results/tree_size.jsonl --output report",
    ),
    "convert in": Command(
        "conversion.from_eagle3",
        "Make a ConFu draft of an EAGLE-3 draft of SafeAILab, SGLang, SpecForge, speculators or DeepSpec.",
        "confu convert in org/eagle3-draft --target org/target --output runs/draft",
    ),
    "convert out": Command(
        "conversion.to_eagle3",
        "Write the EAGLE-3 part of a ConFu draft, without its future channel, for SGLang or vLLM.",
        "confu convert out runs/draft --format sglang --output runs/eagle3",
    ),
    "convert resize": Command(
        "conversion.resize",
        "Make a draft fit a target whose embeddings were resized, where ids still mean what they did.",
        "confu convert resize runs/draft --vocab_size 32768 --output runs/resized",
    ),
    "convert mean": Command(
        "conversion.mean",
        "Make the mean of a draft and of drafts that learned on from it, which can be better than each.",
        "confu convert mean runs/draft runs/a runs/b --output runs/mean",
    ),
    "check": Command(
        "publishing.compatibility",
        "Say whether a draft fits a target, and what to do if not; no weights of the target are read.",
        "confu check org/target runs/draft",
    ),
    "publish": Command(
        "publishing.publish",
        "Check a draft, write its model card and push it to the Hub; --dry-run only writes the folder.",
        "confu publish runs/draft org/target org/confu-draft --dry-run out",
    ),
}

DESCRIPTION = "ConFu speculative decoding for Transformers: drafts that see where the target is heading."
HELP_FLAGS = ("-h", "--help", "help")


def main(argv: list[str] | None = None) -> int:
    """
    Run the command that `argv` (default: the process's arguments) names; its exit status. What this package refuses is
    one sentence on stderr and status 1. With `--traceback`, anywhere, it also says where it came from.
    """
    argv = sys.argv[1:] if argv is None else argv
    show_traceback = "--traceback" in argv
    argv = [argument for argument in argv if argument != "--traceback"]
    if not argv or argv[0] in HELP_FLAGS:
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"transformers-confu {__version__}")
        return 0
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return run(name, argv[words:], show_traceback)
    group = {name for name in COMMANDS if name.startswith(f"{argv[0]} ")}
    if group and (len(argv) == 1 or argv[1] in HELP_FLAGS):
        print(overview(group))
        return 0
    print(unknown(argv, group), file=sys.stderr)
    return 2


def run(name: str, arguments: list[str], show_traceback: bool = False) -> int:
    # The name that parsers of options take for the program's, in their help and errors.
    sys.argv = [f"confu {name}", *arguments]
    try:
        return import_module(f"{__package__}.{COMMANDS[name].module}").main(arguments) or 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = refusal(error)
        if sentence is None or show_traceback:
            raise
        print(sentence, file=sys.stderr)
        return 1


def refusal(error: Exception) -> str | None:
    """
    What an error says to the user, if it is one that the user can mend: a `raise` statement of this package, a file
    that this package could not open, a package that an extra installs. `None` for any other: its traceback is needed.
    """
    if isinstance(error, ModuleNotFoundError) and (sentence := advice(error)):
        return sentence
    entry = innermost = error.__traceback__
    while (entry := entry.tb_next) is not None:
        if not _is_standard_library(entry.tb_frame.f_code.co_filename):
            innermost = entry
    code = innermost.tb_frame.f_code
    if not Path(code.co_filename).is_relative_to(Path(__file__).parent):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # without the number of the error
    # Python itself raises such errors too: an unpacking that does not fit is a ValueError, and a fault of the program.
    by_statement = code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return str(error) if by_statement and isinstance(error, (ValueError, RuntimeError, OSError)) else None


def _is_standard_library(file: str) -> bool:
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return file.startswith("<frozen") or (path.is_relative_to(sysconfig.get_path("stdlib")) and not installed)


def overview(names: set[str] | None = None) -> str:
    """Help on some commands, or all."""
    lines = [] if names else [DESCRIPTION, ""]
    lines += ["usage: confu COMMAND [options], and confu COMMAND --help for the options", ""]
    for name, command in COMMANDS.items():
        if names is None or name in names:
            lines += [f"  {name}"]
            lines += textwrap.wrap(command.summary, 90, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines += [f"      $ {command.example}"]
    return "\n".join(lines)


def unknown(argv: list[str], group: set[str]) -> str:
    given = " ".join(argv[: 2 if group else 1])
    choices = sorted(group or {name for names in COMMANDS for name in (names, names.split()[0])})
    nearest = difflib.get_close_matches(given, choices, n=1, cutoff=0.0)[0]
    return f"confu: there is no command `{given}`; did you mean `confu {nearest}`? `confu --help` lists all."


if __name__ == "__main__":
    sys.exit(main())
