"""
Decode with the ConFu draft of a repository, by its name alone:

```python
>>> target.generate(**inputs, custom_generate="org/draft-repository", trust_remote_code=True)
```

Transformers runs this file of that repository (or local folder) in place of its own `generate`. It loads the draft at
the first call, keeps it, and calls the target's `generate` with it: same text, same arguments, same return value. A
folder in which a file has changed is loaded again; what a branch on the Hub has got since is not, before the process
ends.

Arguments besides those of `generate`: `confu_*` knobs as plain keywords, and `revision`, `token`, `cache_dir` and
`local_files_only`, which go to the loading of the draft. An `assistant_model` is used in place of the repository's
draft. The draft is put where the target is, in the target's dtype.
"""

import copy
import functools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import AutoModel, GenerationConfig, PreTrainedModel


# Id of the repository that this file was published to, written by `confu publish`.
REPOSITORY: str | None = None

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


def generate(model: PreTrainedModel, **arguments: Any) -> Any:
    r"""
    Args:
        model ([`PreTrainedModel`]): The target.
        arguments: Of `generate`; see above.

    Raises:
        ValueError: it cannot be told which draft to load, or the repository holds none.
    """
    hub_arguments = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
    draft = arguments.pop("assistant_model", None)
    if draft is None:
        draft = load_draft(repository_of(model, sys._getframe(1)), model, **hub_arguments)
    return type(model).generate(model, assistant_model=draft, **with_knobs_in_config(arguments))


def repository_of(model: PreTrainedModel, caller: FrameType) -> str:
    """What the user passed as `custom_generate`, which Transformers does not pass on; else the published id."""
    named = caller.f_locals.get("custom_generate") if caller.f_locals.get("self") is model else None
    repository = named if isinstance(named, str) else REPOSITORY
    if repository is None:
        raise ValueError(
            "Which draft to load is not known: call `target.generate(..., custom_generate=<repository or folder>, "
            "trust_remote_code=True)`, or pass a loaded draft as `assistant_model`."
        )
    return repository


def load_draft(repository: str, model: PreTrainedModel, **hub_arguments: Any) -> PreTrainedModel:
    """The draft of a repository or folder, for a target. Kept; a folder's is loaded again if a file of it changes."""
    folder = Path(repository)
    files: tuple[tuple[str, int], ...] = ()
    if folder.is_dir():
        repository = str(folder.resolve())
        files = tuple((file.name, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.*")))
    # An offloaded target has its weights on `meta`; one in 8 bits has no dtype that a draft could compute in.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    dtype = model.dtype if model.dtype.itemsize > 1 else "auto"
    return _load_draft(repository, files, device, dtype, tuple(sorted(hub_arguments.items())))


@functools.lru_cache(maxsize=4)
def _load_draft(repository: str, files: tuple, device: torch.device, dtype: Any, hub: tuple) -> PreTrainedModel:
    # That this file runs at all means that the user trusts the code of its repository.
    draft = AutoModel.from_pretrained(repository, trust_remote_code=True, dtype=dtype, **dict(hub)).to(device)
    if not hasattr(type(draft), "confu_decode"):
        raise ValueError(f"{repository} holds a {type(draft).__name__}, which is no ConFu draft.")
    return draft


def with_knobs_in_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that `generate` takes: `confu_*` keywords, which it refuses, moved into the generation config."""
    knobs = {name: value for name, value in arguments.items() if name.startswith("confu_")}
    if not knobs:
        return arguments
    config = copy.deepcopy(arguments.pop("generation_config", None) or GenerationConfig())
    vars(config).update(knobs)
    # The other options join them, since `generate` takes either a config or options. One that is None (say, no EOS) it
    # would fill from the target's own config there; as a keyword besides, it stays None.
    unset = {name: None for name, value in arguments.items() if value is None and name not in knobs}
    return {**config.update(**arguments), **unset, "generation_config": config}
