"""The knobs of decoding, and how they travel: as entries `confu_*` of a `GenerationConfig`."""

import difflib
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


@dataclass
class ConFuKnobs:
    r"""
    The knobs of decoding, entries `confu_<name>` of a `GenerationConfig`.

    Args:
        tree_size (`int`): Nodes of the tree, the root included, N.
        depth (`int`): Longest path of drafted tokens.
        branching (`int`): Nodes expanded per level, and children of each.
        contemplation (`int`, *optional*): Contemplate rows per round, C: 0 is EAGLE-3 mode; as many as nodes, which is
            the paper, by default.
    """

    tree_size: int = 30
    depth: int = 6
    branching: int = 10
    contemplation: int | None = None

    PREFIX = "confu_"

    def __post_init__(self):
        if self.contemplation is None:
            self.contemplation = self.tree_size
        for name, least in (("tree_size", 1), ("depth", 1), ("branching", 1), ("contemplation", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{self.PREFIX}{name}` is {value!r}; it must be an integer of at least {least}.")

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
