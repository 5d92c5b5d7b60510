"""What a measurement is: the options of `confu evaluate`."""

from dataclasses import dataclass, field, fields

from ..common.loading import TargetOptions, default_dtype
from ..common.option_files import json_option


BASELINES = ("plain", "prompt_lookup")


@dataclass(kw_only=True)
class EvaluationArguments(TargetOptions):
    """Which arms answer which questions, how often, and where the records and the report go."""

    output: str = field(metadata={"help": "JSONL file of the records; an interrupted measurement goes on in it."})
    drafts: list[str] = field(
        default_factory=list, metadata={"help": "ConFu drafts: folders or Hub ids, or `name=folder` to name them."}
    )
    eagle3_drafts: list[str] = field(
        default_factory=list,
        metadata={"help": "Drafts without a trained future channel, which run in EAGLE-3 mode only; as `drafts`."},
    )
    target: str = field(default="demo", metadata={"help": "Target: a folder, a Hub id, or 'demo'."})
    assistant: str | None = field(
        default=None, metadata={"help": "A small model with the target's vocabulary, for vanilla assisted generation."}
    )
    baselines: list[str] = field(
        default_factory=lambda: list(BASELINES), metadata={"help": f"Of {', '.join(BASELINES)}; plain must be there."}
    )
    questions: str | None = field(
        default=None,
        metadata={
            "help": "JSONL of `question_id`, `category`, `turns`, or of `prompt`; .txt of prompts; or a URL of either "
            "(https://, hf://). Spec-Bench as its authors publish it if not given."
        },
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Options of the target's chat template, as JSON: '{\"enable_thinking\": false}'."},
    )
    num_per_group: int | None = field(default=None, metadata={"help": "Questions of each group; all if not given."})
    max_turns: int | None = field(default=None, metadata={"help": "Turns of a conversation at most."})
    runs: int = field(default=3, metadata={"help": "Timed passes over the questions; more can be added later."})
    dtypes: list[str] = field(
        default_factory=lambda: [default_dtype()],
        metadata={"help": "Dtypes of target and drafts; bfloat16 where the hardware computes in it."},
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "0 is greedy; else sampling, seeded alike for all arms."}
    )
    max_new_tokens: list[int] = field(default_factory=lambda: [128], metadata={"help": "Limits of each answer."})
    tree_sizes: list[str] = field(
        default_factory=lambda: ["own"],
        metadata={
            "help": "Nodes of the tree, root included, N; `own` is what the draft does without being told: the knobs "
            "of its generation_config.json, or automatic rounds."
        },
    )
    depths: list[int] | None = field(
        default=None, metadata={"help": "Depths of the tree (EAGLE's own count + 1); the draft's own if not given."}
    )
    branchings: list[int] | None = field(
        default=None,
        metadata={"help": "Nodes expanded per level, and children of each; the draft's own if not given."},
    )
    contemplations: list[str] = field(
        default_factory=lambda: ["0", "default", "full"],
        metadata={"help": "Contemplate rows, C: 0 is EAGLE-3 mode, `full` the paper, `default` the draft's own."},
    )
    one_factor: bool = field(
        default=False,
        metadata={
            "help": "Vary dtype, temperature, limit, tree size, depth and branching one at a time around the first "
            "value of each list, in place of all combinations."
        },
    )
    prompt_lookup_tokens: int = field(default=10, metadata={"help": "Tokens that prompt lookup copies at most."})
    costs: bool = field(default=True, metadata={"help": "Also time the parts of a round by themselves."})
    cost_context: int = field(default=256, metadata={"help": "Tokens of context for those timings."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of arms, of sampling and of the bootstrap."})
    report: str | None = field(
        default=None, metadata={"help": "Folder for the report: HTML, Markdown, CSV, pictures."}
    )

    def __post_init__(self):
        super().__post_init__()
        for option in fields(self):
            value = getattr(self, option.name)
            # YAML gives what is written: one value for a list, a number for a text.
            if "list" in str(option.type) and value is not None and not isinstance(value, list):
                value = [value]
                setattr(self, option.name, value)
            if isinstance(value, list) and len(set(map(str, value))) < len(value):
                raise ValueError(f"`{option.name}` is {value}; leave out what comes twice.")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json_option("chat_template_kwargs", self.chat_template_kwargs)
        self.contemplations = [str(budget) for budget in self.contemplations]
        self.tree_sizes = [str(size) for size in self.tree_sizes]
        if wrong := [size for size in self.tree_sizes if size != "own" and not size.isdecimal()]:
            raise ValueError(f"`tree_sizes` holds {wrong[0]!r}; expected a number of nodes, or 'own'.")
        for name in (
            "dtypes",
            "temperatures",
            "max_new_tokens",
            "contemplations",
            "tree_sizes",
            "depths",
            "branchings",
        ):
            if getattr(self, name) == []:
                raise ValueError(f"`{name}` is empty; give at least one value.")
        least = {"runs": 1, "num_per_group": 1, "max_turns": 1, "cost_context": 8, "prompt_lookup_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"`{name}` is {value}; expected at least {bound}.")
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
