"""
The mean of a draft and of drafts that learned on from it, which can be better than each of them (model soups, arXiv
2203.05482; what it gave the draft of this repository is in docs/experiment.md, fifth round).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import HfArgumentParser

from ..common.files import differences, share
from ..common.loading import load_draft
from ..common.option_files import option
from ..inference.modeling_confu import ConFuDraftModel
from .checkpoints import require_new


# Entries of a configuration that say nothing of what a draft computes.
_ORIGIN = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version"}


@torch.no_grad()
def mean_of_drafts(drafts: Sequence[ConFuDraftModel]) -> ConFuDraftModel:
    """
    A draft with the mean of all weights, computed in float64, in form and dtype of the first, whose knobs it has too.

    ValueError if there are fewer than two, or if they differ in configuration or draft vocabulary.
    """
    first, *others = drafts
    if not others:
        raise ValueError("A mean wants at least two drafts, and got one.")
    form, *forms = [
        {name: value for name, value in draft.config.to_dict().items() if name not in _ORIGIN} for draft in drafts
    ]
    for number, (draft, other_form) in enumerate(zip(others, forms, strict=True), start=2):
        if changed := differences(form, other_form):
            raise ValueError(f"Draft {number} is of another form than the first ({changed}), so they have no mean.")
        if not torch.equal(draft.draft_token_ids, first.draft_token_ids):
            raise ValueError(
                f"Draft {number} proposes other tokens than the first, so they have no mean: both must have learned "
                "on from one draft."
            )
    mean = ConFuDraftModel._from_config(first.config, dtype=first.dtype)
    mean.load_state_dict(first.state_dict())
    of_all = zip(mean.parameters(), *(draft.parameters() for draft in drafts), strict=True)
    for parameter, *weights in of_all:
        parameter.copy_(torch.stack([weight.double() for weight in weights]).mean(dim=0))
    mean.generation_config = first.generation_config
    return mean.eval()


@dataclass
class MeanOptions:
    """Options of `confu convert mean`."""

    output: str = option("New folder for the draft.", ...)


def main(argv: list[str] | None = None) -> None:
    """`confu convert mean`: write the mean of drafts."""
    parser = HfArgumentParser(
        MeanOptions,
        allow_abbrev=False,
        description="Make the mean of a draft and of drafts that learned on from it, in form and dtype of the first.",
    )
    parser.add_argument("drafts", nargs="+", help="folders or Hub ids of the ConFu drafts, two or more")
    options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    require_new(options.output)
    mean = mean_of_drafts([load_draft(draft) for draft in positional.drafts])
    mean.save_pretrained(options.output)
    share(options.output)
    print(f"{options.output}: the mean of {len(positional.drafts)} drafts")
