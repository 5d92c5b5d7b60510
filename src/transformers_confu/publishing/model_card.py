"""The model card of a draft: facts from a `card.yaml` beside the draft, and what its config says, as Markdown."""

import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..inference.configuration_confu import ConFuConfig
from ..inference.modeling_confu import ConFuDraftModel


CARD_FILE = "card.yaml"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["speculative-decoding", "draft-model", "confu", "eagle3", "custom_code", "custom_generate"]
# No value of the Hub's means "draft". This one says what matters: weights that work only beside the base model. Left
# out, the Hub guesses from the files, and has taken drafts for fine-tuned models.
RELATION = "adapter"

# Measured figures of a row: key in card.yaml -> name in the Hub's index of results.
FIGURES = {"tau": "tau", "speed_up": "speed-up, total", "speed_up_mean": "speed-up, mean of questions"}
# Ids of the Hub that are not spelled as the licence is. Others are shown as they are.
LICENCES = {"mit": "MIT", "apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "cc0-1.0": "CC0-1.0"}
LICENCES |= dict.fromkeys((None, "unknown"), "not stated yet")


@dataclass
class Evaluation:
    """
    Arms that were measured together.

    Args:
        dataset (`str`), dataset_id (`str`): The questions' name, and their id on the Hub or a short one.
        setting (`str`): How many questions, temperature, dtype, machine, N and depth; without a full stop.
        rows (`list[dict]`): One for each arm: `arm` (its name), `contemplation` (contemplate rows per round, C),
            `tau`, `speed_up` and `speed_up_mean` as the card defines them, numbers; all but `arm` may be left out.
            `others: true` marks another method, for comparison: it stands in the table, but is no result of this
            draft.
        note (`str`, *optional*): How figures were made from runs, and the command.
    """

    dataset: str
    dataset_id: str
    setting: str
    rows: list[dict[str, Any]]
    note: str = ""

    def __post_init__(self):
        known = {"arm", "contemplation", "others", *FIGURES}
        for row in self.rows:
            if not isinstance(row, dict) or "arm" not in row or not row.keys() <= known:
                raise ValueError(
                    f"A row of the evaluation on {self.dataset} is {row!r}; expected `arm`, and of the others any of "
                    f"{', '.join(sorted(known - {'arm'}))}."
                )
            if wrong := [name for name in FIGURES if not isinstance(row.get(name, 0), int | float)]:
                raise ValueError(f"`{wrong[0]}` of {row['arm']!r} is {row[wrong[0]]!r}; expected a number.")

    def results(self) -> list[EvalResult]:
        """The draft's own figures, for the card's `model-index`."""
        results = []
        for row in self.rows:
            arm = row["arm"] + (f", C = {row['contemplation']}" if "contemplation" in row else "")
            for metric, name in FIGURES.items():
                if metric in row and not row.get("others"):
                    results.append(
                        EvalResult(
                            task_type="text-generation",
                            dataset_type=self.dataset_id,
                            dataset_name=self.dataset,
                            dataset_config=self.setting,  # results that differ in nothing else would be merged
                            metric_type=metric,
                            metric_name=f"{name} ({arm})",
                            metric_value=row[metric],
                        )
                    )
        return results


@dataclass
class CardFacts:
    """
    What a card tells that cannot be read from the draft itself. Texts are Markdown.

    Args:
        base_model (`str`, *optional*): Hub id of the target.
        license (`str`, *optional*): Id of the licence of the weights, as the Hub lists them; `"other"` with
            `license_name` and `license_link`.
        license_note (`str`): What else to say about it.
        language, datasets (`list[str]`): Language codes, such as `en`; Hub ids of the data the draft was trained on.
        summary (`str`): A sentence or two for the introduction.
        training (`str`): Data, procedure, compute: where the weights come from.
        evaluations (`list[Evaluation]`): Measurements of this draft.
        evaluation (`str`): What else to say about them.
        limits (`list[str]`): Known limits; that of the batch size is added.

    Raises:
        ValueError: a fact is of another type, or is none that the Hub takes.
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_note: str = ""
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    summary: str = ""
    training: str = ""
    evaluations: list[Evaluation] = field(default_factory=list)
    evaluation: str = ""
    limits: list[str] = field(default_factory=list)

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == list[str]:
                if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
                    raise ValueError(f"`{entry.name}` of the card is {value!r}; it must be a list of texts.")
            # YAML reads a bare `no` as False.
            elif entry.name != "evaluations" and not isinstance(value, get_args(entry.type) or str):
                raise ValueError(f"`{entry.name}` of the card is {value!r}; it must be a text.")
        if self.base_model is not None and (self.base_model.count("/") != 1 or not _is_hub_id(self.base_model)):
            raise ValueError(
                f"`base_model` of the card is {self.base_model!r}; expected the target's id on the Hub, such as "
                "'Qwen/Qwen3-4B'."
            )
        for name in self.datasets:
            if not _is_hub_id(name):
                raise ValueError(
                    f"`datasets` of the card names {name!r}; expected ids of the Hub, such as 'org/answers'. Describe "
                    "data that is not there in `training`."
                )
        for code in self.language:
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", code):
                raise ValueError(f"`language` of the card names {code!r}; expected codes such as 'en' or 'de'.")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError("`license: other` in the card needs `license_name` and `license_link` besides.")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CardFacts":
        """Read a `card.yaml`; the ValueError of a file that is none says what is wrong."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
            if not isinstance(values, dict):
                raise ValueError(f"expected names and values, got {values!r}.")
            names = [entry.name for entry in fields(cls)]
            if unknown := [name for name in values if name not in names]:
                raise ValueError(f"`{unknown[0]}` is not known; there are {', '.join(names)}.")
            values["evaluations"] = [Evaluation(**entry) for entry in values.get("evaluations", [])]
            return cls(**values)
        except TypeError as error:  # names the entry that is missing or unknown
            reason = str(error).removeprefix("Evaluation.__init__() ")
            raise ValueError(f"{path}: `evaluations`: {reason}.") from error
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write it as a `card.yaml`, without what is empty."""
        values = {name: value for name, value in asdict(self).items() if value}
        Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=119), encoding="utf-8")


def _is_hub_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name; a folder of this machine is none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.isdir(name)


def add_evaluation(folder: str | os.PathLike, evaluation: Evaluation) -> None:
    """Write a measurement into a draft's `card.yaml`, in place of one of the same questions and setting."""
    path = Path(folder, CARD_FILE)
    facts = CardFacts.load(path) if path.is_file() else CardFacts()
    same = evaluation.dataset_id, evaluation.setting
    others = [other for other in facts.evaluations if (other.dataset_id, other.setting) != same]
    replace(facts, evaluations=[*others, evaluation]).save(path)


def model_card(
    facts: CardFacts, config: ConFuConfig, repo_id: str, knobs: dict[str, int] | None = None, check: str = ""
) -> ModelCard:
    """
    The card of a draft.

    Args:
        repo_id: Where it is or will be published, for the snippets; or a folder.
        knobs: The `confu_*` entries of its generation config.
        check: What a check before publishing found, Markdown.
    """
    with torch.device("meta"):  # shapes without memory
        parameters = dict(ConFuDraftModel(config).named_parameters())
    channel = sum(p.numel() for name, p in parameters.items() if name.startswith("future_channel.")) / 1e6
    core = sum(p.numel() for p in parameters.values()) / 1e6 - channel
    results = [result for evaluation in facts.evaluations for result in evaluation.results()]
    data = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        base_model=facts.base_model,
        base_model_relation=RELATION if facts.base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        language=facts.language or None,
        datasets=facts.datasets or None,
        tags=TAGS,
        # A name alone would be a key of its own.
        model_name=repo_id.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        repo_id=repo_id,
        config=config,
        core=core,
        channel=channel,
        knobs=knobs or {},
        columns=("arm", "contemplation", *FIGURES),
        licences=LICENCES,
        check=check,
    )
