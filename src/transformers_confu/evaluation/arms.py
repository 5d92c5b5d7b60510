"""Arms: the ways of decoding that are compared, and the settings under which they are."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..inference.knobs import ConFuKnobs, confu_generation_config
from .arguments import EvaluationArguments


@dataclass(frozen=True)
class Setting:
    r"""
    What all arms of one comparison share.

    Args:
        dtype (`str`): Of target and drafts.
        temperature (`float`): 0 is greedy.
        max_new_tokens (`int`): Limit of each answer.
    """

    dtype: str
    temperature: float
    max_new_tokens: int

    def __str__(self) -> str:
        return f"{self.dtype}, T = {self.temperature:g}, up to {self.max_new_tokens} tokens"


@dataclass(frozen=True)
class Arm:
    r"""
    One way of decoding.

    Args:
        kind (`str`): "plain", "prompt_lookup", "assistant" or "draft".
        draft (`str`): Name of the draft, of an arm of that kind; else empty.
        tree_size, depth, branching, contemplation (`int`): Its knobs; else 0.
        num_drafts (`int`): Drafts in the comparison: the label names the draft only if there is more than one.
    """

    kind: str
    draft: str = ""
    tree_size: int = 0
    depth: int = 0
    branching: int = 0
    contemplation: int = 0
    num_drafts: int = 1

    @property
    def mode(self) -> str:
        """How the method is called: by kind, and by contemplate rows."""
        if self.kind != "draft":
            return {"plain": "plain generate", "prompt_lookup": "prompt lookup", "assistant": "assistant model"}[
                self.kind
            ]
        if self.contemplation == 0:
            return "EAGLE-3 mode"
        return f"ConFu, C = {'N' if self.contemplation == self.tree_size else self.contemplation}"

    @property
    def name(self) -> str:
        """The mode, and the draft if there are several."""
        return f"{self.draft}: {self.mode}" if self.kind == "draft" and self.num_drafts > 1 else self.mode

    @property
    def label(self) -> str:
        return f"{self.name}, N = {self.tree_size}" if self.kind == "draft" else self.name


@dataclass(frozen=True)
class Draft:
    """A draft by name: its folder or Hub id, and whether its future channel is trained."""

    name: str
    source: str
    contemplates: bool


def drafts_of(arguments: EvaluationArguments) -> list[Draft]:
    """All drafts of a measurement. Names are given (`name=source`) or the last part of the source."""
    drafts = []
    for given, contemplates in ((arguments.drafts, True), (arguments.eagle3_drafts, False)):
        for entry in given:
            name, _, source = entry.rpartition("=")
            drafts.append(Draft(name or Path(source).name, source, contemplates))
    names = [draft.name for draft in drafts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"More than one draft is called {', '.join(sorted(twice))}; name them, as in "
            f"`first={drafts[names.index(min(twice))].source}`."
        )
    return drafts


def comparisons(arguments: EvaluationArguments, own_knobs: dict[str, GenerationConfig]) -> dict[Setting, list[Arm]]:
    r"""
    Which arms run under which settings, in order.

    All combinations, or with `one_factor` those in which at most one of dtype, temperature, limit and tree size is
    not the first of its list. Equal arms (a budget that is cut at the tree's size, or the draft's own that is also
    asked for) run once.

    Args:
        arguments ([`EvaluationArguments`]): The measurement.
        own_knobs (`dict[str, GenerationConfig]`): Name of a draft -> its own generation config.
    """
    sizes = arguments.tree_sizes or [None]
    plan: dict[Setting, list[Arm]] = {}
    factors: tuple[list[Any], ...] = (arguments.dtypes, arguments.temperatures, arguments.max_new_tokens, sizes)
    for dtype, temperature, max_new_tokens, tree_size in itertools.product(*factors):
        combination = (dtype, temperature, max_new_tokens, tree_size)
        varied = sum(value != values[0] for value, values in zip(combination, factors, strict=True))
        if arguments.one_factor and varied > 1:
            continue
        arms = plan.setdefault(Setting(dtype, temperature, max_new_tokens), baseline_arms(arguments))
        for draft in drafts_of(arguments):
            for arm in draft_arms(draft, tree_size, arguments, own_knobs[draft.name]):
                if arm not in arms:
                    arms.append(arm)
    return plan


def baseline_arms(arguments: EvaluationArguments) -> list[Arm]:
    return [Arm(kind) for kind in [*arguments.baselines, *(["assistant"] if arguments.assistant else [])]]


def draft_arms(
    draft: Draft, tree_size: int | None, arguments: EvaluationArguments, own: GenerationConfig
) -> list[Arm]:
    """The arms of one draft and tree size (its own for `None`), one for each budget."""
    num_drafts = len(drafts_of(arguments))
    given = {"tree_size": tree_size, "depth": arguments.depth, "branching": arguments.branching}
    call = GenerationConfig(**{f"confu_{name}": value for name, value in given.items() if value is not None})
    knobs = ConFuKnobs.resolve(call, own)
    arms = []
    for budget in arguments.contemplations if draft.contemplates else ["0"]:
        rows = {"full": knobs.tree_size, "default": knobs.contemplation}.get(budget)
        if rows is None:
            try:
                rows = int(budget)
            except ValueError:
                rows = -1
            if rows < 0:
                raise ValueError(f"`contemplations` holds {budget!r}; expected a number of rows, 'default' or 'full'.")
        rows = min(rows, knobs.tree_size)
        arms.append(Arm("draft", draft.name, knobs.tree_size, knobs.depth, knobs.branching, rows, num_drafts))
    return arms


def generate_kwargs(
    arm: Arm, setting: Setting, target: PreTrainedModel, assistants: dict[str, Any], prompt_lookup_tokens: int
) -> dict[str, Any]:
    r"""
    Keyword arguments of `target.generate` for an arm.

    Args:
        assistants (`dict`): Name of a draft, or "" for the assistant model -> the model.
    """
    options: dict[str, Any] = {"max_new_tokens": setting.max_new_tokens, "do_sample": setting.temperature > 0}
    if setting.temperature > 0:
        # The plain law at that temperature: what a target's own settings cut off differs from target to target.
        options |= {"temperature": setting.temperature, "top_k": 0, "top_p": 1.0}
    if arm.kind == "prompt_lookup":
        options["prompt_lookup_num_tokens"] = prompt_lookup_tokens
    if arm.kind == "draft":
        options |= {
            f"confu_{name}": getattr(arm, name) for name in ("tree_size", "depth", "branching", "contemplation")
        }
    kwargs = {"generation_config": confu_generation_config(target, **options)}
    if arm.kind in ("draft", "assistant"):
        kwargs["assistant_model"] = assistants[arm.draft]
    return kwargs
