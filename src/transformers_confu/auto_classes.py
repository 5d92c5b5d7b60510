"""Drafts in Transformers' automatic classes: `AutoModel.from_pretrained(draft)`, and a pipeline's string, ask nothing.

Where this package is not imported, Transformers has to ask whether the code of a draft's repository may run. With
`trust_remote_code=True` that code runs in any case, as a repository may need another version than the installed one.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


CONFIGURATIONS = "transformers.models.auto.configuration_auto"
"""Where Transformers keeps its table of configurations."""


class ConFuEntry:
    """What the table holds for drafts: `ConFuConfig`, imported when the first draft is read."""

    # Transformers prefers a class that is registered from elsewhere to a repository's own, trusted or not.
    __module__ = "transformers.models.confu"

    def __getattr__(self, name: str) -> Any:
        import transformers

        from .inference.configuration_confu import ConFuConfig
        from .inference.modeling_confu import ConFuDraftModel

        transformers.AutoModel.register(ConFuConfig, ConFuDraftModel, exist_ok=True)
        # A pipeline looks there for the architecture that a configuration names.
        transformers.ConFuDraftModel = ConFuDraftModel
        return getattr(ConFuConfig, name)


def register(configurations: ModuleType) -> None:
    """Add the entry to the table of an imported `CONFIGURATIONS`."""
    configurations.CONFIG_MAPPING.register("confu", ConFuEntry(), exist_ok=True)


class RegisterOnImport(MetaPathFinder):
    """Registers as soon as the table is there: to import it now would make every command wait for torch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Register at once if Transformers' table is loaded, else as soon as it is."""
    if CONFIGURATIONS in sys.modules:
        register(sys.modules[CONFIGURATIONS])
    else:
        sys.meta_path.insert(0, RegisterOnImport())
