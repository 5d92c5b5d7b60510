"""The model card of a draft: plain facts in, a [`ModelCard`] out. The facts live in a `card.yaml` beside the draft."""

import difflib
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..inference.configuration_confu import ConFuConfig
from ..inference.modeling_confu import ConFuDraftModel


CARD_FILE = "card.yaml"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["speculative-decoding", "draft-model", "confu", "eagle3", "custom_code", "custom_generate"]
# No value of the Hub's means "draft". This one says what matters: weights that work only beside the base model. Left
# out, the Hub guesses from the files, and has taken drafts for fine-tuned models.
RELATION = "adapter"


@dataclass
class Measurement:
    r"""
    One arm of an evaluation. A figure is a number, or `[median, lowest, highest]` over runs.

    Args:
        arm (`str`): What was measured, such as `"ConFu"`.
        tau, speed_up, speed_up_mean (`float` or `list[float]`, *optional*): As the card defines them.
        contemplation (`int`, *optional*): Contemplate rows per round, C.
        others (`bool`): Another method, for comparison: in the table, but not among this draft's results.
    """

    arm: str
    tau: float | list[float] | None = None
    speed_up: float | list[float] | None = None
    speed_up_mean: float | list[float] | None = None
    contemplation: int | None = None
    others: bool = False

    def __post_init__(self):
        for name in ("tau", "speed_up", "speed_up_mean"):
            figure = getattr(self, name)
            figures = figure if isinstance(figure, list) and len(figure) == 3 else [0.0 if figure is None else figure]
            if not all(isinstance(value, int | float) for value in figures):
                raise ValueError(
                    f"`{name}` of {self.arm!r} is {figure!r}; expected a number or [median, lowest, highest]."
                )

    def cell(self, name: str) -> str:
        """A figure as the table shows it."""
        figure = getattr(self, name)
        if isinstance(figure, list):
            median, low, high = (f"{value:.3f}" for value in figure)
            return f"{median} [{low}, {high}]"
        if figure is None or not math.isfinite(figure):
            return ""
        return f"{figure:.3f}" if isinstance(figure, float) else str(figure)

    def figure(self, name: str) -> float | None:
        """A figure as metadata: one finite number, or none."""
        figure = getattr(self, name)
        value = figure[0] if isinstance(figure, list) else figure
        return None if value is None or not math.isfinite(value) else float(value)


@dataclass
class Evaluation:
    r"""
    Arms that were measured together.

    Args:
        dataset (`str`), dataset_id (`str`): The questions' name, and their id on the Hub or a short one.
        setting (`str`): How many questions, temperature, dtype, machine, N and depth; without a full stop.
        rows (`list[Measurement]`).
        note (`str`, *optional*): How figures were made from runs, and the command.
    """

    dataset: str
    dataset_id: str
    setting: str
    rows: list[Measurement]
    note: str = ""

    def results(self) -> list[EvalResult]:
        """For the card's `model-index`."""
        names = {"tau": "tau", "speed_up": "speed-up, total", "speed_up_mean": "speed-up, mean of questions"}
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=self.dataset_id,
                dataset_name=self.dataset,
                # Results that differ in nothing else would be merged into one.
                dataset_config=self.setting,
                metric_type=metric,
                metric_name=f"{name} ({row.arm}{'' if row.contemplation is None else f', C = {row.contemplation}'})",
                metric_value=row.figure(metric),
            )
            for row in self.rows
            if not row.others
            for metric, name in names.items()
            if row.figure(metric) is not None
        ]


@dataclass
class CardFacts:
    r"""
    What a card tells that cannot be read from the draft itself. Texts are Markdown.

    Args:
        base_model (`str`): Hub id of the target.
        license (`str`): Id of the licence of the weights, as the Hub lists them; `"other"` with `license_name` and
            `license_link`.
        license_note (`str`): What else to say about it.
        language, datasets (`list[str]`): Language codes; ids on the Hub of the data the draft was trained on.
        summary (`str`): A sentence or two for the introduction.
        training (`str`): Data, procedure, compute: where the weights come from.
        evaluations (`list[Evaluation]`): Measurements of this draft.
        evaluation (`str`): What else to say about them.
        limits (`list[str]`): Known limits; that of the batch size is added.
        untrained (`bool`): There are no weights yet.
        paper (`str`): Figures of the paper, which the card sets apart from the draft's own.
    """

    base_model: str
    license: str
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
    untrained: bool = False
    paper: str = ""

    def __post_init__(self):
        for name in ("base_model", "license"):
            # YAML reads a bare `no` as False.
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"`{name}` of the card is {getattr(self, name)!r}; it must be a text.")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == list[str] and not (
                isinstance(value, list) and all(isinstance(text, str) and text for text in value)
            ):
                raise ValueError(f"`{entry.name}` of the card is {value!r}; it must be a list of texts.")
        if self.base_model.count("/") != 1 or os.path.isdir(self.base_model):
            raise ValueError(
                f"`base_model` of the card is {self.base_model!r}; expected the target's id on the Hub, such as "
                "'Qwen/Qwen3-4B'."
            )
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError("`license: other` in the card needs `license_name` and `license_link` besides.")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CardFacts":
        r"""
        Read a `card.yaml`.

        Raises:
            ValueError: it is no such file: what is wrong, and what is expected.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist. A card needs at least\n\nbase_model: Qwen/Qwen3-4B  # the target\n"
                "license: apache-2.0\ntraining: |\n  Data, procedure and compute.\n"
            )
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return _build(cls, values)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write it as a `card.yaml`, without what is empty."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, "", [], False)}
        Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=119), encoding="utf-8")


def _build(cls: type, values: Any) -> Any:
    """A dataclass from what YAML gave; unknown and missing names are errors."""
    if not isinstance(values, dict):
        raise ValueError(f"expected names and values, got {values!r}.")
    names = {entry.name: entry for entry in fields(cls)}
    for name in values:
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"`{name}` is not known; did you mean `{nearest}`? There are {', '.join(names)}.")
    values = dict(values)
    for name, part in (("evaluations", Evaluation), ("rows", Measurement)):
        if name in names and name in values:
            if not isinstance(values[name], list):
                raise ValueError(f"`{name}` is {values[name]!r}; expected a list.")
            values[name] = [_build(part, entry) for entry in values[name]]
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(str(error).replace(f"{cls.__name__}.__init__()", f"a {cls.__name__} is").strip()) from error


def model_card(
    facts: CardFacts,
    config: ConFuConfig,
    repo_id: str,
    knobs: dict[str, int] | None = None,
    check: str = "",
) -> ModelCard:
    r"""
    The card of a draft.

    Args:
        facts ([`CardFacts`]).
        config ([`ConFuConfig`]): Of the draft.
        repo_id (`str`): Where it is or will be published, for the snippets; or a folder.
        knobs (`dict[str, int]`, *optional*): The `confu_*` entries of its generation config.
        check (`str`, *optional*): What a check before publishing found, Markdown.
    """
    results = [result for evaluation in facts.evaluations for result in evaluation.results()]
    data = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        base_model=facts.base_model,
        base_model_relation=RELATION,
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
        target_name=facts.base_model.rsplit("/", 1)[-1],
        description=describe(config, knobs or {}),
        licence=licence(facts),
        check=check,
    )


def licence(facts: CardFacts) -> str:
    """What the card says about the licence of the weights, Markdown."""
    if facts.license == "other":
        return f"[{facts.license_name}]({facts.license_link})."
    return f"{facts.license[0].upper()}{facts.license[1:]}."


def describe(config: ConFuConfig, knobs: dict[str, int]) -> list[tuple[str, str]]:
    """Rows of the card's table of what the draft is, all from its config."""
    with torch.device("meta"):  # shapes without memory
        parameters = dict(ConFuDraftModel(config).named_parameters())
    channel = sum(p.numel() for name, p in parameters.items() if name.startswith("future_channel."))
    core = sum(p.numel() for p in parameters.values()) - channel
    dtype = "" if config.dtype is None else f"; {str(config.dtype).removeprefix('torch.')}"
    embeddings = "an embedding table of its own" if config.has_own_embeddings else "its input embeddings"

    def listed(numbers: list[int]) -> str:
        return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])

    rotated = ", rotated to the root's position" if config.rotate_soft_prompts else ""
    rows = [
        (
            "parameters",
            f"{(core + channel) / 1e6:.1f} million: EAGLE-3 core {core / 1e6:.1f}, future channel "
            f"{channel / 1e6:.1f}{dtype}",
        ),
        (
            "core",
            f"one decoder layer (hidden size {config.hidden_size}, {config.num_attention_heads} query and "
            f"{config.num_key_value_heads} key/value heads), reads the target's hidden states "
            f"{listed(config.target_hidden_state_indices)} and {embeddings}",
        ),
        ("draft vocabulary", f"{config.draft_vocab_size:,} of the target's {config.vocab_size:,} tokens"),
        (
            "future channel",
            f"{config.num_soft_prompts} soft prompts per target layer{rotated}; mixtures of experts: "
            f"{config.num_contemplate_experts_per_token} of {config.num_contemplate_experts} active for `[con]`, "
            f"{config.num_future_experts_per_token} of {config.num_future_experts} for `[f]`; f is the contemplate "
            f"row's hidden states {listed(config.future_hidden_state_indices)}",
        ),
    ]
    if knobs:
        rows.append(("knobs it decodes with", ", ".join(f"`{name}={value}`" for name, value in knobs.items())))
    return rows
