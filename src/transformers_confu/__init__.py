"""ConFu speculative decoding for Hugging Face Transformers (arXiv 2603.08899).

With a draft, `target.generate(**inputs, assistant_model=draft)` runs the ConFu engine; every other use of Transformers
is untouched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto_classes import register_when_loaded


if TYPE_CHECKING:
    from .common.int8_weights import use_int8_weights as use_int8_weights
    from .common.weight_layout import use_packed_weights as use_packed_weights
    from .inference.call_statistics import ConFuStatistics as ConFuStatistics
    from .inference.candidate_generator_confu import ConFuCandidateGenerator as ConFuCandidateGenerator
    from .inference.configuration_confu import ConFuConfig as ConFuConfig
    from .inference.generation_confu import ConFuGenerate as ConFuGenerate
    from .inference.knobs import confu_generation_config as confu_generation_config
    from .inference.modeling_confu import ConFuDraftModel as ConFuDraftModel


__version__ = "0.1.0"

# Public name -> its module, loaded when the name is first asked for: `confu --help` need not wait for torch.
_MODULES = {
    "ConFuCandidateGenerator": "inference.candidate_generator_confu",
    "ConFuConfig": "inference.configuration_confu",
    "ConFuDraftModel": "inference.modeling_confu",
    "ConFuGenerate": "inference.generation_confu",
    "ConFuStatistics": "inference.call_statistics",
    "confu_generation_config": "inference.knobs",
    "use_int8_weights": "common.int8_weights",
    "use_packed_weights": "common.weight_layout",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


register_when_loaded()
