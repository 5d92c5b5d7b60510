"""The ways into Transformers' `generate`."""

import functools
import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from .call_statistics import ConFuStatistics
from .decoding import confu_decode


class ConFuGenerationMixin(GenerationMixin):
    """What a ConFu draft does in `generate`: the target's call ends in [`~ConFuGenerationMixin.confu_decode`]."""

    last_statistics: ConFuStatistics | None = None

    def confu_decode(self, target: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """The decoding method that `target.generate(..., assistant_model=self)` runs. See `decoding`."""
        return confu_decode(self, target, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any):
        # A generation config marked as derived from the model's would lose its ConFu knobs when it is loaded.
        self.generation_config._from_model_config = False
        return super().save_pretrained(*args, **kwargs)

    def load_custom_generate(self, *args: Any, **kwargs: Any):
        # Asked for when a draft is loaded with its own code: the repository's `custom_generate` is for the target, and
        # put in the place of the method below it would answer in riddles. Transformers takes OSError for "there is
        # none".
        raise OSError("The `custom_generate` of a draft's repository is for the target's `generate`.")

    def generate(self, *args: Any, **kwargs: Any):
        raise TypeError(
            "A ConFu draft generates nothing by itself: call `target.generate(**inputs, assistant_model=draft)`. If "
            "that call led here, either the draft was given inside another module, as `torch.compile(draft)` makes "
            "(give the draft itself, compiled by `draft.compile()`), or this version of Transformers has a decoding "
            "loop that the installed ConFu does not know: use `target.generate(**inputs, "
            "custom_generate=ConFuGenerate(draft))`, or upgrade the package."
        )


class ConFuGenerate:
    r"""
    A ConFu decoding method for `generate(custom_generate=...)`, Transformers' documented way to replace its loop.

    ```python
    >>> target.generate(**inputs, custom_generate=ConFuGenerate(draft))
    ```

    Transformers drops streamer, tokenizer and stop strings on this way, so they are bound here.

    Args:
        draft ([`ConFuDraftModel`]): The draft.
        streamer ([`BaseStreamer`], *optional*): Gets the prompt, then each token, then `end()`.
        stop_strings (`str` or `list[str]`, *optional*), tokenizer ([`PreTrainedTokenizerBase`], *optional*): Stop
            when one of the strings is generated; needs the target's tokenizer.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        streamer: BaseStreamer | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if stop_strings is not None and tokenizer is None:
            raise ValueError("`stop_strings` without `tokenizer`: pass the target's tokenizer too.")
        self.draft = draft
        self.streamer = streamer
        self.stop_criteria = [] if stop_strings is None else [StopStringCriteria(tokenizer, stop_strings)]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        return self.draft.confu_decode(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=StoppingCriteriaList([*stopping_criteria, *self.stop_criteria]),
            generation_config=generation_config,
            streamer=self.streamer,
            **model_kwargs,
        )


ASSISTED_DECODING_PARAMETERS = [
    *("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"),
    *("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer", "model_kwargs"),
]
VALIDATION_PARAMETERS = ["self", "generation_mode", "generation_config", "generation_mode_kwargs"]


def install_dispatch() -> bool:
    r"""
    Let `generate(assistant_model=draft)` run the draft's own decoding method.

    Transformers keeps no registry of assisted-decoding methods. So `GenerationMixin._assisted_decoding` is wrapped
    once: an assistant whose class defines `confu_decode` decodes with that, whatever copy of this module it comes
    from; every other assistant goes through untouched. `GenerationMixin._validate_generation_mode` is wrapped too, as
    it refuses every assistant of a target with recurrent layers, which a ConFu draft can serve; see
    [`_let_states_pass`].

    Returns:
        Whether the dispatch is in place. It is not, and nothing is changed, if the method has parameters that are not
        the known ones; a draft's `generate`, which Transformers then reaches, says so.
    """
    assisted_decoding = GenerationMixin._assisted_decoding
    if getattr(assisted_decoding, "dispatches_confu", False):
        return True
    if list(inspect.signature(assisted_decoding).parameters) != ASSISTED_DECODING_PARAMETERS:
        return False

    @functools.wraps(assisted_decoding)
    def dispatch(self: GenerationMixin, *args: Any, **kwargs: Any):
        assistant_model = kwargs.get("assistant_model")
        if hasattr(type(assistant_model), "confu_decode"):
            return assistant_model.confu_decode(self, *args, **kwargs)
        return assisted_decoding(self, *args, **kwargs)

    setattr(dispatch, "dispatches_confu", True)  # noqa: B010 - a function has no such attribute to a type checker
    GenerationMixin._assisted_decoding = dispatch
    _let_states_pass()
    return True


def _let_states_pass() -> None:
    """Let a ConFu draft assist a stateful target; which of them it cannot serve, `checks.check_target` says."""
    validate = GenerationMixin._validate_generation_mode
    if list(inspect.signature(validate).parameters) != VALIDATION_PARAMETERS:
        return

    @functools.wraps(validate)
    def validate_others(self: GenerationMixin, generation_mode: Any, generation_config: Any, mode_kwargs: Any) -> None:
        if self._is_stateful and hasattr(type(mode_kwargs.get("assistant_model")), "confu_decode"):
            generation_mode = GenerationMode.GREEDY_SEARCH  # the check of states is for `ASSISTED_GENERATION` alone
        validate(self, generation_mode, generation_config, mode_kwargs)

    GenerationMixin._validate_generation_mode = validate_others


install_dispatch()
