"""ConFu speculative decoding for Hugging Face Transformers (arXiv 2603.08899).

With a draft, `target.generate(**inputs, assistant_model=draft)` runs the ConFu engine; every other use of Transformers
is untouched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .candidate_generator_confu import ConFuCandidateGenerator as ConFuCandidateGenerator
    from .configuration_confu import ConFuConfig as ConFuConfig
    from .generation_confu import ConFuGenerate as ConFuGenerate
    from .generation_confu import ConFuStatistics as ConFuStatistics
    from .generation_confu import confu_generation_config as confu_generation_config
    from .modeling_confu import ConFuDraftModel as ConFuDraftModel


__version__ = "0.1.0"

# Public name -> its module, loaded when the name is first asked for: `confu --help` need not wait for torch.
_MODULES = {
    "ConFuCandidateGenerator": "candidate_generator_confu",
    "ConFuConfig": "configuration_confu",
    "ConFuDraftModel": "modeling_confu",
    "ConFuGenerate": "generation_confu",
    "ConFuStatistics": "generation_confu",
    "confu_generation_config": "generation_confu",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
