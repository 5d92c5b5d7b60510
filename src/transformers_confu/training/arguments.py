"""Arguments of ConFu training, beside those of `TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


STAGES = ["core", "warm_up", "joint"]


@dataclass
class ConFuTrainingArguments(TrainingArguments):
    r"""
    `TrainingArguments` with ConFu's own. Where a default differs from Transformers', the field is repeated here.

    A batch holds rows of similar length, as many as fit `tokens_per_batch`; `per_device_train_batch_size` is not used.
    """

    tokens_per_batch: int = field(
        default=2048,
        metadata={"help": "Tokens per training batch, padding included. Many small steps beat few large."},
    )
    ttt_steps: int = field(
        default=6, metadata={"help": "Steps that the draft is run on its own output; at least the depth in decoding."}
    )
    ttt_decay: float = field(
        default=0.8, metadata={"help": "Weight of TTT step s in the loss is this to the power s."}
    )
    stage: str = field(
        default="joint",
        metadata={
            "help": "core: the EAGLE-3 draft alone. warm_up: soft prompts and [con] alone learn to foresee, through "
            "the target's own head. joint: everything, as in the paper.",
            "choices": STAGES,
        },
    )
    weight_without_future: float = field(
        default=1.0, metadata={"help": "Weight in the loss of the rows that read no future prediction."}
    )
    replication: int = field(
        default=4, metadata={"help": "Rows behind an anchor that use its future prediction too (l of the paper)."}
    )
    max_lag: int | None = field(
        default=None,
        metadata={"help": "Greatest lag of the [con] router: depth of the tree in decoding plus 1; ttt_steps + 1."},
    )

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up: a share of all steps if below 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2; EAGLE-3's choice."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient clipping; EAGLE-3's choice."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between logs."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the columns feed the target, not the draft's forward."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_lag is None:
            self.max_lag = self.ttt_steps + 1
        if self.stage not in STAGES:
            raise ValueError(f"`stage` is {self.stage!r}; it must be one of {', '.join(STAGES)}.")
        if self.weight_without_future < 0:
            raise ValueError(f"`weight_without_future` is {self.weight_without_future}; it must not be negative.")
        for name, least in (("tokens_per_batch", 1), ("ttt_steps", 1), ("replication", 0), ("max_lag", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.ttt_decay <= 1:
            raise ValueError(f"`ttt_decay` is {self.ttt_decay}; it must be above 0 and at most 1.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: `input_ids` and `labels` feed the target.")
