"""The conversion command: `confu convert in|out --help`."""

import argparse

from ..common.loading import dtype_named, load_draft
from .checkpoints import require_new
from .from_eagle3 import convert_eagle3
from .to_eagle3 import export_eagle3


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make a ConFu draft of an EAGLE-3 draft, or write a ConFu draft's EAGLE-3 part for other engines.",
    )
    directions = parser.add_subparsers(dest="direction", required=True)

    into = directions.add_parser(
        "in",
        help="EAGLE-3 draft -> ConFu draft",
        description="Make a ConFu draft of an EAGLE-3 draft in the form of SafeAILab, SGLang, SpecForge, speculators "
        "or DeepSpec. It decodes as the source does; its future channel is new and wants training.",
    )
    into.add_argument("source", help="folder or Hub id of the EAGLE-3 draft")
    into.add_argument("--target", required=True, help="folder or Hub id of the model that the draft was trained for")
    into.add_argument("--output", required=True, help="new folder for the ConFu draft")
    into.add_argument("--revision", help="branch, tag or commit of the source on the Hub")
    into.add_argument("--dtype", help="dtype of the result, such as bfloat16 (default: the source's)")
    into.add_argument(
        "--taps",
        type=int,
        nargs="+",
        metavar="INDEX",
        help="indices into the target's hidden_states (0 = embeddings, i = input of layer i) that the draft fuses, "
        "in place of what its config says",
    )
    for name, text in (
        ("norm_output", "features are fed back after the last norm"),
        ("norm_before_residual", "the residual starts with the normalised feature"),
    ):
        option = f"--{name.replace('_', '-')}"
        into.add_argument(
            option, action=argparse.BooleanOptionalAction, help=f"{text}, in place of what its config says"
        )
    into.add_argument("--num-soft-prompts", type=int, help="soft prompts of the new future channel")
    into.add_argument(
        "--rotate-soft-prompts",
        action="store_true",
        default=None,
        help="let them keep their distance to the text's end, by the target's RoPE",
    )

    out = directions.add_parser(
        "out",
        help="ConFu draft -> EAGLE-3 draft",
        description="Write the EAGLE-3 part of a ConFu draft, without its future channel, for SGLang or vLLM.",
    )
    out.add_argument("draft", help="folder or Hub id of the ConFu draft")
    out.add_argument("--output", required=True, help="new folder for the EAGLE-3 draft")
    out.add_argument("--format", choices=("sglang", "speculators"), required=True, help="speculators is vLLM's")
    out.add_argument("--target", help="folder or Hub id of the draft's target; needed for speculators")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = make_parser().parse_args(argv)
    if arguments.direction == "in":
        require_new(arguments.output)
        overrides = {
            "target_hidden_state_indices": arguments.taps,
            "norm_output": arguments.norm_output,
            "norm_before_residual": arguments.norm_before_residual,
            "num_soft_prompts": arguments.num_soft_prompts,
            "rotate_soft_prompts": arguments.rotate_soft_prompts,
        }
        draft = convert_eagle3(
            arguments.source,
            arguments.target,
            dtype=None if arguments.dtype is None else dtype_named(arguments.dtype),
            hub_arguments={"revision": arguments.revision} if arguments.revision else None,
            **{name: value for name, value in overrides.items() if value is not None},
        )
        draft.save_pretrained(arguments.output)
        print(
            f"{arguments.output}: taps {draft.config.target_hidden_state_indices}, draft vocabulary "
            f"{draft.config.draft_vocab_size} of {draft.config.vocab_size}. It decodes in EAGLE-3 mode; train its "
            "future channel next."
        )
    else:
        export_eagle3(load_draft(arguments.draft), arguments.output, arguments.format, arguments.target)
        print(f"{arguments.output}: an EAGLE-3 draft, without the future channel")
