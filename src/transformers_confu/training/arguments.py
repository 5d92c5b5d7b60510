"""Arguments of ConFu training, beside those of `TrainingArguments`."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ..common.loading import default_dtype
from .losses import LOSSES


logger = logging.get_logger(__name__)

PARAMETER_GROUPS = ["core", "contemplate", "future"]
"""The EAGLE-3 draft; soft prompts and `[con]`; `[f]` with its projections."""

TAUGHT_BY_STAGE = {"core": ["core"], "warm_up": ["contemplate"], "joint": PARAMETER_GROUPS}
STAGES = list(TAUGHT_BY_STAGE)


NOT_SHARDED_BY = (
    "{} is not supported: the draft is small, and the target, which is not, would not be sharded by it. Start several "
    "processes (DDP) and set `shard_target=True`."
)


def parameter_group(name: str) -> str:
    """Which of `PARAMETER_GROUPS` a parameter of a draft belongs to, by its name."""
    if name.startswith(("future_channel.soft_prompts", "future_channel.contemplate_token.")):
        return "contemplate"
    return "future" if name.startswith("future_channel.") else "core"


@dataclass
class ConFuTrainingArguments(TrainingArguments):
    r"""
    `TrainingArguments` with ConFu's own. Where a default differs from Transformers', the field is repeated here.

    A batch of one process holds as many rows as fit `tokens_per_batch`; `per_device_train_batch_size` is not used.

    Parameters are in three groups, each with a learning rate of its own if wanted: `core`, the EAGLE-3 draft;
    `contemplate`, soft prompts and `[con]`; `future`, `[f]` and the projections of f. A stage teaches some of them,
    `frozen` excepts some of those.
    """

    tokens_per_batch: int = field(
        default=2048,
        metadata={"help": "Tokens per batch and process, padding included. Many small steps beat few large."},
    )
    packed_length: int | None = field(
        default=None,
        metadata={
            "help": "Pack rows of all lengths into sequences of so many tokens, at least the longest row; without it "
            "a batch holds rows of similar length, padded."
        },
    )
    stage: str = field(
        default="joint",
        metadata={
            "help": "core: the EAGLE-3 draft alone. warm_up: soft prompts and [con] alone learn to foresee, through "
            "the target's own head. joint: everything, as in the paper.",
            "choices": STAGES,
        },
    )
    loss: str = field(
        default="kl",
        metadata={"help": "Between target and draft: kl is the paper's; see `losses.py`.", "choices": list(LOSSES)},
    )
    ttt_steps: int = field(
        default=6,
        metadata={
            "help": "Steps that the draft is run on its own output. `confu train` makes them its `confu_depth`, the "
            "depth in decoding; only the warm-up leaves that as it is."
        },
    )
    ttt_decay: float = field(
        default=0.8, metadata={"help": "Weight of TTT step s in the loss is this to the power s."}
    )
    weight_without_future: float = field(
        default=1.0, metadata={"help": "Weight in the loss of the rows that read no future prediction."}
    )
    replication: int = field(
        default=4, metadata={"help": "Rows behind an anchor that use its future prediction too (l of the paper)."}
    )
    anchors_per_sequence: int | None = field(
        default=None,
        metadata={
            "help": "At most so many anchors in a sequence (K of the paper), less memory for less coverage; one for "
            "every `replication + 1` rows if not given."
        },
    )
    max_lag: int | None = field(
        default=None,
        metadata={"help": "Greatest lag of the [con] router: depth of the tree in decoding plus 1; ttt_steps + 1."},
    )

    contemplate_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of soft prompts and [con]; `learning_rate`."}
    )
    future_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of [f] and the projections of f; `learning_rate`."}
    )
    frozen: list[str] = field(
        default_factory=list,
        metadata={"help": "Groups that the stage would teach and shall not: core, contemplate, future."},
    )

    target_dtype: str = field(
        default_factory=default_dtype,
        metadata={
            "help": "Dtype of the frozen target, if it is loaded by name; bfloat16 where the hardware computes in it."
        },
    )
    target_device_map: dict | str | None = field(
        default=None,
        metadata={"help": "`device_map` of a target that is loaded by name, such as auto; this process's device."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps what the target says about the data, so that it reads every row once and not "
            "once an epoch. For stage core, and for joint with `frozen: [contemplate]`."
        },
    )
    shard_target: bool = field(
        default=False,
        metadata={"help": "Shard the target's layers over the processes (FSDP2), where one device cannot hold it."},
    )

    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "The target's id on the Hub, for the model card, if it is loaded from elsewhere."},
    )

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up: a share of all steps if below 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2; EAGLE-3's choice."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient clipping; EAGLE-3's choice."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between logs."})
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={
            "help": "Which tokens the logs count, and tell the speed of: non_padding, all or no. With `no` the logs "
            "hold no times either."
        },
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the columns feed the target, not the draft's forward."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "tau_greedy, where a best checkpoint is asked for."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "The draft's buffers, its vocabulary, never change."}
    )

    def __post_init__(self):
        if self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.save_strategy in (SaveStrategy.BEST, SaveStrategy.BEST.value)
        ):
            self.metric_for_best_model = "tau_greedy"
        trackers: Any = vars(self)["report_to"]
        if isinstance(trackers, str) and "," in trackers:  # several, as a command line can give them
            setattr(self, "report_to", trackers.split(","))  # noqa: B010 - its type is lost on mypy
        super().__post_init__()
        if self.max_lag is None:
            self.max_lag = self.ttt_steps + 1
        if isinstance(self.target_device_map, str) and self.target_device_map.startswith("{"):
            self.target_device_map = json.loads(self.target_device_map)
        self._check_recipe()
        self._check_trainer()

    @property
    def taught(self) -> list[str]:
        """Parameter groups that this run teaches."""
        return [group for group in TAUGHT_BY_STAGE[self.stage] if group not in self.frozen]

    @property
    def learning_rates(self) -> dict[str, float]:
        """Initial learning rate of each parameter group."""
        own = {"contemplate": self.contemplate_learning_rate, "future": self.future_learning_rate}
        return {group: self.learning_rate if own.get(group) is None else own[group] for group in PARAMETER_GROUPS}

    def _check_recipe(self) -> None:
        for name, choices in (("stage", STAGES), ("loss", list(LOSSES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        for name in ("weight_without_future", "contemplate_learning_rate", "future_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must not be negative.")
        for name, least in (
            ("tokens_per_batch", 1),
            ("packed_length", 1),
            ("ttt_steps", 1),
            ("replication", 0),
            ("anchors_per_sequence", 1),
            ("max_lag", 1),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.ttt_decay <= 1:
            raise ValueError(f"`ttt_decay` is {self.ttt_decay}; it must be above 0 and at most 1.")
        if unknown := sorted(set(self.frozen) - set(PARAMETER_GROUPS)):
            raise ValueError(
                f"`frozen` names {', '.join(map(repr, unknown))}; the groups are {', '.join(PARAMETER_GROUPS)}."
            )
        if self.feature_cache is not None and "contemplate" in self.taught:
            raise ValueError(
                f"`feature_cache` keeps what never changes, and stage {self.stage!r} teaches soft prompts and [con], "
                "which change what the target says: freeze them with `frozen: [contemplate]` where they are trained, "
                "or leave `feature_cache` out."
            )
        if self.feature_cache is not None and self.shard_target:
            raise ValueError(
                "`feature_cache` and `shard_target` do not go together: the target reads what a process lacks, and a "
                "sharded one needs all processes for that. Keep features with a target on one device each."
            )
        if self.feature_cache is not None and self.packed_length is not None and self.stage == "joint":
            raise ValueError(
                "`feature_cache` keeps the future predictions of rows that stand alone; leave `packed_length` out of "
                "stage 'joint' with it."
            )
        if not self.taught:
            raise ValueError(
                f"Nothing is left to train: stage {self.stage!r} teaches {', '.join(TAUGHT_BY_STAGE[self.stage])}, "
                f"and `frozen` is {self.frozen}."
            )

    def _check_trainer(self) -> None:
        """Options of `TrainingArguments` that mean something else here, or nothing."""
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: `input_ids` and `labels` feed the target.")
        if self.activation_checkpointing:
            raise ValueError(
                "`activation_checkpointing` (`gradient_checkpointing`) is not supported: the steps of the unrolled "
                "draft share keys and values, which a second forward would compute anew. For less memory lower "
                "`tokens_per_batch` and raise `gradient_accumulation_steps`, which gives the very same step."
            )
        if self.fsdp or self.deepspeed:
            raise ValueError(NOT_SHARDED_BY.format("`fsdp`" if self.fsdp else "`deepspeed`"))
        for name, why in (
            ("data_seed", "the order of the rows follows from `seed`"),
            ("train_sampling_strategy", "rows of similar length share a batch, or those that `packed_length` packs"),
            ("dataloader_drop_last", "every row is trained on"),
            ("average_tokens_across_devices", "the loss is always divided by the rows of all processes"),
            ("neftune_noise_alpha", "the target's embeddings are read as they are"),
            ("bf16_full_eval", "evaluation runs as the training does, and would leave the draft in bfloat16"),
            ("fp16_full_eval", "evaluation runs as the training does, and would leave the draft in float16"),
        ):
            if getattr(self, name) != (default := type(self).__dataclass_fields__[name].default):
                raise ValueError(f"`{name}` has no effect here: {why}; leave it at {default!r}.")
        if self.bf16 and self.device.type == "cpu" and default_dtype("cpu") != "bfloat16":
            logger.warning(
                "`bf16` is set, but torch finds no instructions for it in this CPU: steps can take ten times as long "
                "as in float32. Leave it out (`--bf16 false`)."
            )
        if self.auto_find_batch_size:
            raise ValueError("`auto_find_batch_size` has no effect here: lower `tokens_per_batch` instead.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no effect here: the target's distribution is the label.")
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy='{self.hub_strategy.value}'` would publish optimiser state and pickles beside the "
                "draft; use 'every_save' or 'end'."
            )
