"""ConFu speculative decoding for Hugging Face Transformers (arXiv 2603.08899).

Importing the package makes `target.generate(**inputs, assistant_model=draft)` run the ConFu engine; every other use of
Transformers is untouched.
"""

from .candidate_generator_confu import ConFuCandidateGenerator
from .configuration_confu import ConFuConfig
from .generation_confu import ConFuGenerate, ConFuStatistics, confu_generation_config
from .modeling_confu import ConFuDraftModel


__version__ = "0.1.0"

__all__ = [
    "ConFuCandidateGenerator",
    "ConFuConfig",
    "ConFuDraftModel",
    "ConFuGenerate",
    "ConFuStatistics",
    "confu_generation_config",
]
