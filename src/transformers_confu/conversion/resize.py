"""A draft for a target whose table of tokens was made longer or shorter, while ids still mean what they did."""

from dataclasses import dataclass

import torch
from transformers import HfArgumentParser

from ..common.files import share
from ..common.loading import load_draft
from ..common.option_files import option
from ..inference.configuration_confu import ConFuConfig
from ..inference.modeling_confu import ConFuDraftModel
from .checkpoints import require_new


def resize_vocabulary(draft: ConFuDraftModel, vocab_size: int) -> ConFuDraftModel:
    """
    The draft for a target of `vocab_size` tokens; it proposes the tokens that it proposed before. ValueError if the
    target would not have one of these.

    New tokens are never proposed; a draft with embeddings of its own gives them the mean of the old ones. That they
    get a place among the proposals takes training with another draft vocabulary.
    """
    largest = int(draft.draft_token_ids.max())
    if largest >= vocab_size:
        raise ValueError(f"The draft proposes token {largest}, but a target of {vocab_size} tokens has none such.")
    values = draft.config.to_dict() | {"vocab_size": vocab_size, "draft_vocab_size": draft.config.draft_vocab_size}
    resized = ConFuDraftModel._from_config(ConFuConfig.from_dict(values), dtype=draft.dtype)
    weights = draft.state_dict()
    kept = min(vocab_size, draft.config.vocab_size)
    marks = torch.zeros(vocab_size, dtype=torch.bool)
    marks[:kept] = weights["t2d"][:kept]
    weights["t2d"] = marks
    if "embed_tokens.weight" in weights:
        table = weights["embed_tokens.weight"]
        new = table.mean(dim=0, keepdim=True).expand(vocab_size - kept, -1)
        weights["embed_tokens.weight"] = torch.cat([table[:kept], new])
    resized.load_state_dict(weights)
    resized.generation_config = draft.generation_config
    return resized.eval()


@dataclass
class ResizeOptions:
    """Options of `confu convert resize`."""

    vocab_size: int = option("Tokens of the target, as its config has them.", ...)
    output: str = option("New folder for the draft.", ...)


def main(argv: list[str] | None = None) -> None:
    """`confu convert resize`: write the draft for a target with a longer or shorter table of tokens."""
    parser = HfArgumentParser(
        ResizeOptions,
        allow_abbrev=False,
        description="Make a draft fit a target whose embeddings were resized, where ids still mean what they did.",
    )
    parser.add_argument("draft", help="folder or Hub id of the ConFu draft")
    options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    require_new(options.output)
    draft = resize_vocabulary(load_draft(positional.draft), options.vocab_size)
    draft.save_pretrained(options.output)
    share(options.output)
    print(f"{options.output}: a draft for a target of {options.vocab_size} tokens")
