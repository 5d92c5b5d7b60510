"""Arms: the ways of decoding that are compared, and the settings under which they are."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from ..inference.knobs import ConFuKnobs
from .arguments import EvaluationArguments


PROMPT_LOOKUP_TOKENS = 10  # that it copies at most, the default of Transformers
TREE_KNOBS = ("tree_size", "depth", "branching")
_LOOKUPS = {"default": None, "without": False, "with": True}
BASELINE_NAMES = {
    "plain": "plain generate",
    "prompt_lookup": "prompt lookup",
    "other_layout": "plain generate, other layout",
    "assistant": "assistant model",
}


@dataclass(frozen=True)
class Setting:
    """What all arms of one comparison share: dtype of target and drafts, temperature (0 is greedy), limit."""

    dtype: str
    temperature: float
    max_new_tokens: int

    def __str__(self) -> str:
        return f"{self.dtype}, T = {self.temperature:g}, up to {self.max_new_tokens} tokens"


@dataclass(frozen=True)
class Arm:
    """
    One way of decoding, and a draft's knobs. Without the first three its rounds are automatic, and then without the
    last the number of contemplate rows, too.
    """

    kind: str  # a baseline, "assistant" or "draft"
    draft: str = ""  # its name
    tree_size: int | None = None
    depth: int | None = None
    branching: int | None = None
    contemplation: int | None = None
    lookup: bool = False  # whether tokens copied from the text join the tree

    @property
    def mode(self) -> str:
        """How the method is called: by kind, and by contemplate rows."""
        if self.kind != "draft":
            return BASELINE_NAMES[self.kind]
        if self.contemplation == 0:
            return "EAGLE-3 mode"
        if self.contemplation is None:
            return "ConFu"
        return f"ConFu, C = {'N' if self.contemplation == self.tree_size else self.contemplation}"

    @property
    def knobs(self) -> dict[str, int | bool]:
        """The knobs of decoding as entries of a generation config, but for what is so by itself."""
        values = {f"confu_{name}": getattr(self, name) for name in (*TREE_KNOBS, "contemplation")}
        values["confu_lookup"] = None if self.lookup is (self.tree_size is None) else self.lookup
        return {name: value for name, value in values.items() if value is not None}


def labels(arms: Iterable[Arm]) -> dict[Arm, str]:
    """Names that tell arms apart; draft, depth and branching are part of them only if they differ between arms."""
    names = {arm: arm.mode for arm in arms}
    drafted = [arm for arm in names if arm.kind == "draft"]
    varies = {name for name in ("draft", *TREE_KNOBS) if len({getattr(arm, name) for arm in drafted} - {None}) > 1}
    for arm in drafted:
        parts = [arm.mode, "automatic" if arm.tree_size is None else f"N = {arm.tree_size}"]
        if arm.tree_size is not None:
            parts += [f"{name} {getattr(arm, name)}" for name in ("depth", "branching") if name in varies]
        parts += ["with lookup"] if arm.lookup else []
        names[arm] = (f"{arm.draft}: " if "draft" in varies else "") + ", ".join(parts)
    return names


def drafts_of(arguments: EvaluationArguments) -> dict[str, str]:
    """Name of each draft of a measurement, as given (`name=source`) or the last part of the source -> its source."""
    drafts: dict[str, str] = {}
    for entry in arguments.drafts:
        name, _, source = entry.rpartition("=")
        name = name or Path(source).name
        if name in drafts:
            raise ValueError(f"More than one draft is called {name}; name them, as in `first={drafts[name]}`.")
        drafts[name] = source
    return drafts


def settings_of(arguments: EvaluationArguments) -> list[Setting]:
    """All combinations, in order."""
    values = itertools.product(arguments.dtypes, arguments.temperatures, arguments.max_new_tokens)
    return [Setting(*combination) for combination in dict.fromkeys(values)]


def arms_of(arguments: EvaluationArguments, own_knobs: dict[str, GenerationConfig]) -> list[Arm]:
    """
    The arms that run under each setting, in order. Equal ones (a budget that is cut at the tree's size, or the draft's
    own that is also asked for) run once. `own_knobs`: name of a draft -> its generation config.
    """
    arms = [Arm(kind) for kind in [*arguments.baselines, *(["assistant"] if arguments.assistant else [])]]
    sizes = [None if size == "own" else int(size) for size in arguments.tree_sizes]
    for tree in itertools.product(sizes, arguments.depths or [None], arguments.branchings or [None]):
        for draft in drafts_of(arguments):
            arms += _draft_arms(draft, tree, arguments, own_knobs[draft])
    return list(dict.fromkeys(arms))


def _draft_arms(
    draft: str, tree: tuple[int | None, ...], arguments: EvaluationArguments, own: GenerationConfig
) -> Iterator[Arm]:
    """
    The arms of one draft and tree (what is `None` is the draft's own), for each budget of contemplate rows, without or
    with lookups. With `confu_contemplation` 0 of its own a draft's future channel is not trained, and 0 is all that it
    can do.
    """
    if tree[0] is None and ConFuKnobs.resolve(own).automatic:
        if len(arguments.tree_sizes) == 1 and any(tree):
            raise ValueError(
                f"`depths` and `branchings` are of fixed trees, and {draft}'s own rounds are automatic; give "
                "`tree_sizes` a number of nodes."
            )
        tree = (None, None, None)
    given = {f"confu_{name}": value for name, value in zip(TREE_KNOBS, tree, strict=True) if value is not None}
    knobs = ConFuKnobs.resolve(GenerationConfig(**given), own)
    for budget in arguments.contemplations if getattr(own, "confu_contemplation", None) != 0 else ["0"]:
        if budget not in ("default", "full") and not budget.isdecimal():
            raise ValueError(f"`contemplations` holds {budget!r}; expected a number of rows, 'default' or 'full'.")
        named = {"full": knobs.tree_size, "default": knobs.contemplation}
        rows = named[budget] if budget in named else int(budget)
        if rows is None and knobs.future_gain <= 0:
            rows = 0  # which automatic rounds would choose by themselves
        if rows is not None and knobs.tree_size is not None:
            rows = min(rows, knobs.tree_size)
        for lookup in arguments.lookups:
            if lookup not in _LOOKUPS:
                raise ValueError(f"`lookups` holds {lookup!r}; expected one of {', '.join(_LOOKUPS)}.")
            looks_up = knobs.lookup if _LOOKUPS[lookup] is None else _LOOKUPS[lookup]
            yield Arm("draft", draft, knobs.tree_size, knobs.depth, knobs.branching, rows, looks_up)
