"""How the models of a measurement answer a question, and what is recorded of it."""

import copy
import random
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..common.answer_text import answer_text, end_token_ids
from ..common.loading import load_decoding_draft
from ..common.texts import first_difference
from ..common.weight_layout import copy_in_other_layout
from ..inference.knobs import confu_generation_config
from ..inference.target import input_device
from .arguments import EvaluationArguments
from .arms import PROMPT_LOOKUP_TOKENS, Arm, Setting, drafts_of
from .machine import synchronise
from .questions import Question


logger = logging.get_logger(__name__)

WARM_UP_TOKENS = 16
# Keyword arguments of `generate` for each arm.
Calls = dict[Arm, dict[str, Any]]
# Prompt ids and record of every turn.
Conversation = list[tuple[list[int], dict[str, Any]]]


@dataclass
class Models:
    """Target, tokenizer, and drafts by name (the assistant model under ""), to be asked under some options."""

    arguments: EvaluationArguments
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    assistants: dict[str, Any]
    in_other_layout: PreTrainedModel | None = None  # a second target, of the baseline `other_layout`

    @classmethod
    def load(cls, arguments: EvaluationArguments, dtype: str) -> "Models":
        """
        Load all of a measurement's models in one dtype; ValueError if one cannot be loaded, the assistant's vocabulary
        is not the target's, or Transformers has no such baseline for the target.
        """
        target, tokenizer = arguments.load(arguments.target, dtype)
        if target._is_stateful and ("prompt_lookup" in arguments.baselines or arguments.assistant is not None):
            raise ValueError(
                f"Transformers has neither prompt lookup nor assistant models for {type(target).__name__}, as some of "
                "its layers have states; give `--baselines plain` and no `assistant`."
            )
        device = input_device(target)
        assistants: dict[str, Any] = {
            name: load_decoding_draft(source, target) for name, source in drafts_of(arguments).items()
        }
        if arguments.assistant is not None:
            assistant = AutoModelForCausalLM.from_pretrained(arguments.assistant, dtype=target.dtype).to(device).eval()
            sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (assistant, target)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The assistant model has a vocabulary of {sizes[0]} tokens and the target one of {sizes[1]}; "
                    "give an assistant of the same family."
                )
            assistants[""] = assistant
        other = None
        if "other_layout" in arguments.baselines:
            if (device.type, target.dtype) != ("cpu", torch.float32):
                raise ValueError(
                    "The baseline other_layout is for float32 on a CPU, where weights may be packed; the target is in "
                    f"{target.dtype} on {device}. Leave it out."
                )
            other = copy_in_other_layout(target)
        return cls(arguments, target, tokenizer, assistants, other)

    def _target_of(self, arm: Arm) -> PreTrainedModel:
        return self.in_other_layout if arm.kind == "other_layout" else self.target

    @property
    def context_length(self) -> int:
        """Tokens that the target can read and write."""
        config = self.target.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 10**9

    def encode(self, *texts: str) -> list[int]:
        """Token ids of a conversation (user, assistant, user, ...) in the target's chat template, up to the answer."""
        messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
        options: Any = self.arguments.chat_template_kwargs or {}
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **options
            )
        except Exception as error:  # a template is a program of its own
            raise ValueError(
                f"The target's chat template cannot write the question ({type(error).__name__}: {error}); give a "
                "target that has one for a user's turns, or other `chat_template_kwargs`."
            ) from error

    def calls(self, setting: Setting, arms: list[Arm]) -> Calls:
        """How `generate` is called for each arm."""
        calls: Calls = {}
        for arm in arms:
            options: dict[str, Any] = {"max_new_tokens": setting.max_new_tokens, "do_sample": setting.temperature > 0}
            if setting.temperature > 0:
                # The plain law at that temperature: what targets cut off by themselves differs.
                options |= {"temperature": setting.temperature, "top_k": 0, "top_p": 1.0}
            if arm.kind == "prompt_lookup":
                options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
            calls[arm] = {"generation_config": confu_generation_config(self.target, **options, **arm.knobs)}
            if arm.kind in ("draft", "assistant"):
                calls[arm]["assistant_model"] = self.assistants[arm.draft]
        return calls

    def warm_up(self, calls: Calls) -> None:
        """What is allocated or compiled on first use is not timed."""
        ids = torch.tensor([self.encode("Hello")], device=input_device(self.target))
        for arm, kwargs in calls.items():
            config = copy.deepcopy(kwargs["generation_config"])
            config.max_new_tokens = min(WARM_UP_TOKENS, config.max_new_tokens)
            self._target_of(arm).generate(ids, **kwargs | {"generation_config": config})

    def answer(self, question: Question, run: int, setting: Setting, calls: Calls) -> dict[str, Any]:
        """
        Let every arm answer one question, in an order drawn from the seed: a "unit" of the record file, whose answers
        are in the order of `calls`.
        """
        seed = f"{self.arguments.seed}/{setting}/{run}/{question.id}"
        order = random.Random(seed).sample(list(calls), len(calls))
        conversations = {arm: self._converse(question, calls[arm], arm, seed) for arm in order}
        plain = conversations[Arm("plain")]
        num_turns = len(question.turns)
        if skipped := num_turns - len(plain):
            logger.warning(
                "Question %s: %d of its turns, with an answer of up to %d tokens, exceed the target's context of %d.",
                question.id, skipped, setting.max_new_tokens, self.context_length,
            )  # fmt: skip
        answers = [
            {
                "arm": asdict(arm),
                "order": order.index(arm),
                "turns": [turn for _, turn in conversations[arm]],
                "skipped_turns": num_turns - len(conversations[arm]),
                "departure": departure(plain, conversations[arm], self.target, setting.temperature == 0),
            }
            for arm in calls
        ]
        of_question = {"question_id": question.id, "category": question.category, "group": question.group}
        return {"kind": "unit", "run": run, "setting": asdict(setting), **of_question, "answers": answers}

    def _converse(self, question: Question, kwargs: dict[str, Any], arm: Arm, seed: str) -> Conversation:
        """Answer the turns of a question, with the arm's own answers in between."""
        texts: list[str] = []
        conversation: Conversation = []
        for text in question.turns:
            texts.append(text)
            prompt = self.encode(*texts)
            if len(prompt) + kwargs["generation_config"].max_new_tokens > self.context_length:
                break
            # All arms draw alike; each turn and run draws anew.
            torch.manual_seed(zlib.crc32(f"{seed}/{len(conversation)}".encode()))
            turn = answer_prompt(self._target_of(arm), prompt, kwargs, arm.kind)
            conversation.append((prompt, turn))
            texts.append(answer_text(self.tokenizer, turn["token_ids"], end_token_ids(self.target)))
        return conversation


def answer_prompt(target: PreTrainedModel, prompt: list[int], kwargs: dict[str, Any], kind: str) -> dict[str, Any]:
    """One timed call of `generate`, as a record."""
    device = input_device(target)
    ids = torch.tensor([prompt], device=device)
    counter = EmissionCounter() if kind in ("prompt_lookup", "assistant") else None
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    output = target.generate(ids, attention_mask=torch.ones_like(ids), streamer=counter, **kwargs)
    synchronise(device)
    seconds = time.perf_counter() - started
    rounds: dict[str, Any] | None = None
    if counter is not None:
        rounds = {"emitted": counter.sizes[2:]}
    elif kind == "draft":
        counted = kwargs["assistant_model"].last_statistics
        parts = ("prefill", "draft", "target", "walk", "compaction")
        names = ("emitted", "accepted", "tree_nodes", "contemplate_rows")
        caches = ("target_cache_bytes", "draft_cache_bytes", "transient_cache_bytes")
        rounds = {name: getattr(counted, name) for name in (*names, *caches)}
        rounds["seconds"] = {part: getattr(counted, f"{part}_seconds") for part in parts}
    return {
        "prompt_tokens": len(prompt),
        "token_ids": output[0, len(prompt) :].tolist(),
        "seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "rounds": rounds,
    }


class EmissionCounter(BaseStreamer):
    """Counts the tokens of each forward of Transformers' own assisted loop, which keeps no record of its rounds."""

    def __init__(self):
        self.sizes: list[int] = []  # first the prompt, then what prefill yields, then those of each round

    def put(self, value: torch.Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        """The text is over."""


def departure(
    plain: Conversation, other: Conversation, target: PreTrainedModel, greedy: bool
) -> dict[str, Any] | None:
    """Where a conversation leaves the plain one, as a record; `None` if it does not."""
    for number, ((prompt, expected), (_, turn)) in enumerate(zip(plain, other, strict=False)):
        mine, theirs = expected["token_ids"], turn["token_ids"]
        position = first_difference(mine, theirs)
        if position is None:
            continue
        gap = None
        if greedy and position < min(len(mine), len(theirs)):
            common = torch.tensor([prompt + mine[:position]], device=input_device(target))
            with torch.no_grad():
                logits = target(common, attention_mask=torch.ones_like(common)).logits[0, -1].float()
            gap = float((logits[mine[position]] - logits[theirs[position]]).abs())
        return {"turn": number, "position": position, "gap": gap}
    return None
