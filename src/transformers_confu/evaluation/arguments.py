"""What a measurement is: the options of `confu evaluate`."""

from dataclasses import dataclass

from ..common.loading import TargetOptions, default_dtype
from ..common.option_files import json_option, option


BASELINES = ("plain", "prompt_lookup", "other_layout")


@dataclass(kw_only=True)
class EvaluationArguments(TargetOptions):
    """Which arms answer which questions, how often, and where the records and the report go."""

    output: str = option("JSONL file of the records; an interrupted measurement goes on in it.", ...)
    drafts: list[str] = option(
        "ConFu drafts: folders or Hub ids, or `name=folder` to name them. One whose future channel is not trained, so "
        "that its own `confu_contemplation` is 0, runs in EAGLE-3 mode only.",
        list,
    )
    target: str = option("Target: a folder, a Hub id, or 'demo'.", "demo")
    assistant: str | None = option("A small model with the target's vocabulary, for vanilla assisted generation.")
    baselines: list[str] = option(
        f"Of {', '.join(BASELINES)}; plain must be there. The last is plain generation by a second copy of the "
        "target, on a CPU, with packed weights if those of the first are not, else with plain ones.",
        lambda: ["plain", "prompt_lookup"],
    )
    questions: str | None = option(
        "JSONL of `question_id`, `category`, `turns`, or of `prompt`; .txt of prompts; or a URL of either (https://, "
        "hf://). Spec-Bench as its authors publish it if not given."
    )
    chat_template_kwargs: dict | str | None = option(
        "Options of the target's chat template, as JSON: '{\"enable_thinking\": false}'."
    )
    num_per_group: int | None = option("Questions of each group; all if not given.")
    runs: int = option("Timed passes over the questions; more can be added later.", 3)
    dtypes: list[str] = option(
        "Dtypes of target and drafts; bfloat16 where the hardware computes in it.", lambda: [default_dtype()]
    )
    temperatures: list[float] = option("0 is greedy; else sampling, seeded alike for all arms.", lambda: [0.0])
    max_new_tokens: list[int] = option("Limits of each answer.", lambda: [128])
    tree_sizes: list[str] = option(
        "Nodes of the tree, root included, N; `own` is what the draft does without being told: the knobs of its "
        "generation_config.json, or automatic rounds.",
        lambda: ["own"],
    )
    depths: list[int] | None = option(
        "Depths of the tree (EAGLE's own count + 1), but of automatic rounds; the draft's own if not given."
    )
    branchings: list[int] | None = option(
        "Nodes expanded per level, and children of each, but of automatic rounds; the draft's own if not given."
    )
    contemplations: list[str] = option(
        "Contemplate rows, C: 0 is EAGLE-3 mode, `full` the paper, `default` the draft's own.",
        lambda: ["0", "default", "full"],
    )
    lookups: list[str] = option(
        "Whether tokens copied from the text join the tree: `with`, `without`, or `default`, the draft's own.",
        lambda: ["default"],
    )
    costs: bool = option("Also time the mixtures of experts, and the target's forward by rows.", True)
    seed: int = option("Seed of the order of arms and of sampling.", 0)
    report: str | None = option("Folder for the report: HTML, Markdown, pictures.")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json_option("chat_template_kwargs", self.chat_template_kwargs)
        if wrong := [size for size in self.tree_sizes if size != "own" and not size.isdecimal()]:
            raise ValueError(f"`tree_sizes` holds {wrong[0]!r}; expected a number of nodes, or 'own'.")
        for name in ("runs", "num_per_group"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected at least 1.")
        if min(self.temperatures) < 0 or min(self.max_new_tokens) < 2:
            raise ValueError(
                f"`temperatures` is {self.temperatures} and `max_new_tokens` {self.max_new_tokens}; expected "
                "temperatures of 0 or above and limits of at least 2 tokens."
            )
        if "plain" not in self.baselines or not set(self.baselines) <= set(BASELINES):
            raise ValueError(
                f"`baselines` is {self.baselines}; expected 'plain', which every speed-up refers to, and of the "
                f"others any of {', '.join(BASELINES[1:])}."
            )
