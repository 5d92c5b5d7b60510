"""The knobs of decoding, and how they travel: as entries `confu_*` of a `GenerationConfig`."""

import difflib
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


@dataclass
class ConFuKnobs:
    r"""
    The knobs of decoding, entries `confu_<name>` of a `GenerationConfig`.

    Without `tree_size`, `depth` and `branching` the rounds are automatic: each is as large as pays on this machine.
    With one of them every round is as they say, and those not given are 30, 6 and 10.

    Args:
        tree_size (`int`, *optional*): Nodes of the tree, the root included, N.
        depth (`int`, *optional*): Longest path of drafted tokens.
        branching (`int`, *optional*): Nodes expanded per level, and children of each.
        contemplation (`int`, *optional*): Contemplate rows per round, C: 0 is EAGLE-3 mode. By default none where
            `future_gain` is 0 or less, else as many as nodes, which is the paper, and in automatic rounds as many as
            pay.
        lookup (`bool`, *optional*): Whether tokens that followed an earlier place of the text like its end join the
            tree (prompt lookup). By default in automatic rounds, where they do if they are likely enough. In rounds of
            a fixed size they take the place of up to three quarters of the drafted nodes.
        future_gain (`float`): How many tokens a node's own future prediction adds to the round after it: a fact about
            the draft, which `confu publish` measures. By default what the paper reports.
    """

    tree_size: int | None = None
    depth: int | None = None
    branching: int | None = None
    contemplation: int | None = None
    lookup: bool | None = None
    future_gain: float = 0.4  # tau 4.41 against 4.00: arXiv 2603.08899, Llama-3.2-3B, T = 0, 30 nodes

    PREFIX = "confu_"
    FIXED = {"tree_size": 30, "depth": 6, "branching": 10}
    MOST = 1024

    def __post_init__(self):
        if isinstance(self.future_gain, bool) or not isinstance(self.future_gain, (int, float)):
            raise ValueError(f"`{self.PREFIX}future_gain` is {self.future_gain!r}; it must be a number of tokens.")
        if self.lookup is None:
            self.lookup = self.automatic
        if not isinstance(self.lookup, bool):
            raise ValueError(f"`{self.PREFIX}lookup` is {self.lookup!r}; it must be True or False.")
        if not self.automatic:
            for name, default in self.FIXED.items():
                if getattr(self, name) is None:
                    setattr(self, name, default)
            if self.contemplation is None:
                self.contemplation = self.tree_size if self.future_gain > 0 else 0
        for name, least in (("tree_size", 1), ("depth", 1), ("branching", 1), ("contemplation", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"`{self.PREFIX}{name}` is {value!r}; it must be an integer of at least {least}.")
            if value is not None and name in self.FIXED and value > self.MOST:
                raise ValueError(
                    f"`{self.PREFIX}{name}` is {value}; it must be at most {self.MOST}, as larger rounds need more "
                    "memory than there is and save no time."
                )

    @property
    def automatic(self) -> bool:
        """Whether no knob fixes the size of rounds."""
        return all(getattr(self, name) is None for name in self.FIXED)

    def fixed(self) -> "ConFuKnobs":
        """Knobs for rounds that cannot be automatic."""
        if not self.automatic:
            return self
        contemplation = 0 if self.contemplation is None and self.future_gain <= 0 else self.contemplation
        fixed: dict[str, Any] = {**self.FIXED, "contemplation": contemplation, "future_gain": self.future_gain}
        return ConFuKnobs(**fixed)

    @classmethod
    def names(cls) -> list[str]:
        return [cls.PREFIX + name for name in cls.__dataclass_fields__]

    @classmethod
    def of(cls, config: GenerationConfig) -> dict[str, int]:
        """The knobs that a configuration sets, by their names in it."""
        return {name: getattr(config, name) for name in cls.names() if getattr(config, name, None) is not None}

    @classmethod
    def resolve(cls, *configs: GenerationConfig) -> "ConFuKnobs":
        """Each knob from the first configuration that has it. Unknown `confu_*` names are refused, not ignored."""
        values: dict[str, Any] = {}
        for config in configs:
            entries = {name: value for name, value in vars(config).items() if name.startswith(cls.PREFIX)}
            check_knob_names(entries)
            for name, value in entries.items():
                if value is not None:
                    values.setdefault(name.removeprefix(cls.PREFIX), value)
        return cls(**values)


def check_knob_names(names: Any) -> None:
    """Raise for a `confu_*` name that is none of the knobs: Transformers would keep it silently."""
    for name in names:
        if name.startswith(ConFuKnobs.PREFIX) and name not in ConFuKnobs.names():
            nearest = difflib.get_close_matches(name, ConFuKnobs.names(), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"`{name}` is no knob of ConFu; did you mean `{nearest}`? There are {', '.join(ConFuKnobs.names())}."
            )


def confu_generation_config(target: PreTrainedModel, **kwargs: Any) -> GenerationConfig:
    r"""
    A complete `GenerationConfig` for a target: its own defaults, with any generation option and ConFu knob replaced.

    ```python
    >>> config = confu_generation_config(target, max_new_tokens=128, confu_tree_size=16, confu_contemplation=4)
    >>> target.generate(**inputs, assistant_model=draft, generation_config=config)
    ```

    Bare keywords cannot carry knobs: `generate(confu_tree_size=16)` is refused by Transformers, which knows no such
    option.

    Raises:
        ValueError: an unknown knob or option, a value out of range, or a `None` that would not last.
    """
    check_knob_names(kwargs)
    unknown = [name for name in kwargs if name not in ConFuKnobs.names() and not hasattr(GenerationConfig(), name)]
    if unknown:
        raise ValueError(f"{', '.join(f'`{name}`' for name in unknown)}: no option of `generate`, no knob of ConFu.")
    own = target.generation_config.to_dict()
    if unset := [name for name, value in kwargs.items() if value is None and own.get(name) is not None]:
        raise ValueError(
            f"{', '.join(f'`{name}=None`' for name in unset)}: `generate` fills what is None in a `GenerationConfig` "
            "from the target's own; give it to `generate` itself, beside `generation_config`."
        )
    options = own | kwargs
    # A configuration marked as derived from the model's would drop the knobs without a word.
    options["_from_model_config"] = False
    config = GenerationConfig(**options)
    ConFuKnobs.resolve(config)
    return config
