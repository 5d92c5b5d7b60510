"""Arguments of ConFu training, beside those of `TrainingArguments`."""

import os
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..common.loading import default_dtype
from ..common.option_files import option


logger = logging.get_logger(__name__)

PARAMETER_GROUPS = ["core", "contemplate", "future"]
"""The EAGLE-3 draft; soft prompts and `[con]`; `[f]` with the projections of f."""

TAUGHT_BY_STAGE = {"core": ["core"], "contemplation": ["contemplate"], "joint": PARAMETER_GROUPS}
STAGES = list(TAUGHT_BY_STAGE)

NOT_SHARDED = (
    "the draft is small, and the target, which is not, would not be sharded by it. Start several processes (DDP), or "
    "one with a `device_map` for a target that one device cannot hold."
)
NOT_PUSHED = "leave it out, and upload the trained draft by `confu publish`, which checks it and adds card and code."

# Options of `TrainingArguments` that cannot be followed here, and why.
_NOT_SUPPORTED = {
    "activation_checkpointing": "the steps of the unrolled draft share keys and values, which a second forward would "
    "compute anew. For less memory lower `tokens_per_batch` and raise `gradient_accumulation_steps`, which gives the "
    "very same step.",
    "fsdp": NOT_SHARDED,
    "deepspeed": NOT_SHARDED,
    "fp16": "gradients of the head are made in the forward, before the scaling that keeps small ones from vanishing "
    "in float16. Use `bf16`, or neither, which trains in float32.",
    "push_to_hub": NOT_PUSHED,
}
_BATCHES_BY_TOKENS = "a batch holds as many rows as fit `tokens_per_batch`; set that"
# Those that would do nothing here, or harm.
_WITHOUT_EFFECT = {
    "per_device_train_batch_size": _BATCHES_BY_TOKENS,
    "per_device_eval_batch_size": _BATCHES_BY_TOKENS,
    "auto_find_batch_size": "lower `tokens_per_batch` instead",
    "data_seed": "the order of the rows follows from `seed`",
    "train_sampling_strategy": "rows of similar length share a batch",
    "dataloader_drop_last": "every row is trained on",
    "average_tokens_across_devices": "the loss is always divided by the rows of all processes",
    "label_smoothing_factor": "the target's distribution is the label",
    "neftune_noise_alpha": "the target's embeddings are read as they are",
    "use_liger_kernel": "its kernels are for models of Transformers, and the draft is none",
    "bf16_full_eval": "evaluation runs as the training does, and would leave the draft in bfloat16",
    "fp16_full_eval": "evaluation runs as the training does, and would leave the draft in float16",
    "remove_unused_columns": "the columns feed the target, not the draft's forward",
}


def parameter_group(name: str) -> str:
    """Which of `PARAMETER_GROUPS` a parameter of a draft belongs to, by its name."""
    if name.startswith(("future_channel.soft_prompts", "future_channel.contemplate_token.")):
        return "contemplate"
    return "future" if name.startswith("future_channel.") else "core"


@dataclass
class ConFuTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with ConFu's own. Where a default differs from Transformers', the field is repeated here.

    Parameters are in three groups: `core`, the EAGLE-3 draft; `contemplate`, soft prompts and `[con]`; `future`, `[f]`
    and the projections of f. A stage teaches some of them, `frozen` excepts some of those.
    """

    tokens_per_batch: int = option(
        "Tokens per batch and process, padding included. Many small steps beat few large.", 2048
    )
    stage: str = option(
        "core: the EAGLE-3 draft alone. contemplation: soft prompts and [con] alone learn to foresee, through the "
        "target's own head. joint: everything, as in the paper.",
        "joint",
        choices=STAGES,
    )
    ttt_steps: int = option(
        "Steps that the draft is run on its own output; levels of a tree beyond them it has not learned. The router "
        "of [con] lags up to one more.",
        6,
    )
    ttt_decay: float | None = option(
        "Weight of TTT step s in the loss is this to the power s (EAGLE-3: 0.8). By default a step weighs as much as "
        "it adds to the expected number of accepted tokens (D-PACE)."
    )
    replication: int = option("Rows behind an anchor that use its future prediction too (l of the paper).", 4)
    channel_learning_rate: float | None = option(
        "Initial learning rate of the future channel (contemplate and future); `learning_rate`."
    )
    frozen: list[str] = option("Groups that the stage would teach and shall not: core, contemplate, future.", list)
    feature_cache: str | None = option(
        "Folder that keeps what the target says about the data, so that it reads every row once and not once an "
        "epoch. For stage core, and for joint with `frozen: [contemplate]`."
    )
    learning_rate: float = option("Initial learning rate of AdamW; Muon's is twice that.", 3e-4)
    use_muon: bool = option(
        "Train the matrices inside of the draft by Muon; all else, and without it everything, by `optim`.", True
    )
    lr_scheduler_type: str = option("Learning-rate schedule.", "cosine")
    warmup_steps: float = option("Steps in which the learning rate rises: a share of all steps if below 1.", 0.02)
    adam_beta2: float = option("AdamW's beta2; EAGLE-3's choice.", 0.95)
    max_grad_norm: float = option("Gradient clipping; EAGLE-3's choice.", 0.5)
    logging_steps: float = option("Steps between logs.", 20)
    include_num_input_tokens_seen: str = option(
        "Which tokens the logs count, and tell the speed of: non_padding, all or no. With `no` the logs hold no "
        "times either.",
        "non_padding",
    )
    remove_unused_columns: bool | None = option("Must stay False.", False)
    metric_for_best_model: str | None = option("tau_greedy, where a best checkpoint is asked for.")
    ddp_broadcast_buffers: bool | None = option("The draft's buffers, its vocabulary, never change.", False)

    def __post_init__(self):
        if self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.save_strategy in (SaveStrategy.BEST, SaveStrategy.BEST.value)
        ):
            self.metric_for_best_model = "tau_greedy"
        trackers: Any = vars(self)["report_to"]
        if isinstance(trackers, str) and "," in trackers:  # several, as a command line can give them
            setattr(self, "report_to", trackers.split(","))  # noqa: B010 - its type is lost on mypy
        super().__post_init__()
        self._check_recipe()
        self._check_options_of_trainer()
        self._check_machine()

    @property
    def taught(self) -> list[str]:
        """Parameter groups that this run teaches."""
        return [group for group in TAUGHT_BY_STAGE[self.stage] if group not in self.frozen]

    @property
    def num_steps(self) -> int:
        """Steps that are counted: of TTT, or the one prediction of a contemplate row."""
        return 1 if self.stage == "contemplation" else self.ttt_steps

    @property
    def n_gpu(self) -> int:
        """At most 1: several would mean `DataParallel`, which splits a forward that training never calls."""
        return min(super().n_gpu, 1)

    def _check_recipe(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"`stage` is {self.stage!r}; it must be one of {', '.join(STAGES)}.")
        least_of = {"tokens_per_batch": 1, "ttt_steps": 1, "replication": 0, "channel_learning_rate": 0}
        for name, least in least_of.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.ttt_decay is not None and not 0 < self.ttt_decay <= 1:
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
        if not self.taught:
            raise ValueError(
                f"Nothing is left to train: stage {self.stage!r} teaches {', '.join(TAUGHT_BY_STAGE[self.stage])}, "
                f"and `frozen` is {self.frozen}."
            )

    def _check_options_of_trainer(self) -> None:
        for name, why in _WITHOUT_EFFECT.items():
            if getattr(self, name) != (default := type(self).__dataclass_fields__[name].default):
                raise ValueError(f"`{name}` has no effect here: {why}; leave it at {default!r}.")
        for name, why in _NOT_SUPPORTED.items():
            if getattr(self, name) or (name == "fp16" and self.mixed_precision == "fp16"):
                raise ValueError(f"`{name}` is not supported: {why}")

    def _check_machine(self) -> None:
        known = get_available_reporting_integrations()
        if missing := sorted({*self.report_to} - {*known, "none"}):
            raise ValueError(
                f"`report_to` names {', '.join(missing)}, of which no package is installed (installed are: "
                f"{', '.join(known) or 'none'}): install it, or use `report_to: none`."
            )
        if (started := int(os.environ.get("WORLD_SIZE", 1))) > self.world_size:
            raise ValueError(
                f"{started} processes were started (`WORLD_SIZE`), but each would train alone, into the same folder: "
                "on CPUs also give `--use_cpu true`; else start as many processes as there are GPUs, by `torchrun "
                "--nproc_per_node N -m transformers_confu.cli train` or `accelerate launch --multi_gpu`."
            )
        if self.bf16 and self.device.type == "cpu" and default_dtype("cpu") != "bfloat16":
            logger.warning(
                "`bf16` is set, but torch finds no instructions for it in this CPU: steps can take ten times as long "
                "as in float32. Leave it out (`--bf16 false`)."
            )
