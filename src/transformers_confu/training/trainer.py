"""`ConFuTrainer`: fine-tune a ConFu draft for a target, on Transformers' `Trainer`."""

import errno
import inspect
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..common.loading import default_dtype, load_target
from ..data.dataset import sequence_lengths
from ..inference.checks import check_target
from ..inference.configuration_confu import SPECIAL_TOKENS
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner
from ..publishing.publish import write_custom_generate
from .anchors import AnchorSampling
from .arguments import NOT_PUSHED, NOT_SHARDED, ConFuTrainingArguments, parameter_group
from .batch import TokenBatch, TokenBatchSampler, collate, draft_rows
from .checks import check_call, check_dataset, check_stage, check_tokenizer, draft_to_train
from .contemplation import compute_foresight
from .features import KeptFeatures
from .initialisation import is_channel_untrained
from .metrics import Counts, add_counts, metrics_of, no_counts
from .muon import MuonBeside, matrices_within
from .objective import Objective, compute_objective
from .teacher import freeze, teach


# What the override below relies on; `Trainer` calls it with what to train, and trains what it returns.
_WRAP_MODEL_PARAMETERS = ["self", "model", "training", "dataloader"]


class ObjectiveModule(nn.Module):
    """
    The objective of a batch as the forward of a module that holds the draft: what accelerate wraps, so that the
    gradients of several processes meet. The target is no part of it.
    """

    def __init__(
        self,
        draft: ConFuDraftModel,
        runner: TargetRunner,
        args: ConFuTrainingArguments,
        features: KeptFeatures | None,
    ):
        super().__init__()
        self.draft, self.args, self.features = draft, args, features
        self.runner = runner  # no module, so that its target is none of this one's

    def forward(self, batch: dict[str, Any]) -> Objective:
        """Loss and counts of a batch as the collator makes it, with `anchors` besides, except in stage core."""
        texts, anchors = TokenBatch.of(batch), batch.get("anchors")
        if self.args.stage == "contemplation":
            return compute_foresight(self.draft, self.runner, texts, anchors)
        if self.features is None:
            teaching = teach(self.draft, self.runner, texts, anchors)
        else:
            teaching = self.features.teach(texts, anchors)
        how = (self.args.ttt_steps, self.args.ttt_decay)
        return compute_objective(self.draft, self.runner.embed, texts, teaching, anchors, *how)


class KeepSpecialTokens(TrainerCallback):
    """Undoes what Trainer does at the start: a draft's special tokens are its target's, not its tokenizer's."""

    def __init__(self, draft: ConFuDraftModel):
        self.kept = [
            (config, {name: getattr(config, name, None) for name in SPECIAL_TOKENS})
            for config in (draft.config, draft.generation_config)
        ]

    def on_train_begin(self, args, state, control, **kwargs):
        for config, tokens in self.kept:
            for name, value in tokens.items():
                setattr(config, name, value)


class ConFuTrainer(Trainer):
    r"""
    Trains a draft against its frozen target.

    ```python
    >>> trainer = ConFuTrainer(
    ...     model=draft,
    ...     target_model=target,
    ...     processing_class=tokenizer,
    ...     args=ConFuTrainingArguments(output_dir="runs/draft", num_train_epochs=1),
    ...     train_dataset=prepare_dataset(rows, tokenizer, max_length=512),
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    ```

    The target is in neither checkpoints nor optimiser, and its parameters stop requiring gradients. The loss of a step
    is the sum over the draft rows of all accumulated batches and all processes, divided by their number: the same
    step, however the rows are dealt out. A resumed run continues as if it had not been interrupted. For what is logged
    see [`~metrics.metrics_of`]; `load_best_model_at_end=True` selects by `tau_greedy`.

    Args:
        model ([`ConFuDraftModel`] or `str`): The draft, in float32; see [`warm_start`]. Or its folder or Hub id.
        target_model ([`PreTrainedModel`], peft model or `str`): The target, on the device and in the dtype it shall
            run in; or its folder or Hub id, loaded in bfloat16 where the hardware computes in it.
        args ([`ConFuTrainingArguments`]).
        processing_class ([`PreTrainedTokenizerBase`], *optional*): The target's tokenizer; saved with the draft.
        train_dataset, eval_dataset: From [`prepare_dataset`].
        kwargs: Whatever `Trainer` takes, except what it does with logits or for another loss, which has no place here:
            `compute_metrics`, `preprocess_logits_for_metrics`, `compute_loss_func`.
    """

    train_dataset: Any
    eval_dataset: Any
    optimizer: Any

    def __init__(
        self,
        model: ConFuDraftModel | str,
        target_model: PreTrainedModel | nn.Module | str,
        args: ConFuTrainingArguments,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        check_call(args, kwargs)
        if list(inspect.signature(Trainer._wrap_model).parameters) != _WRAP_MODEL_PARAMETERS:
            raise RuntimeError(
                "This version of Transformers wraps models in another way than the one known here, and would train "
                "without the target: install the version that this package asks for."
            )
        model = draft_to_train(model)
        if isinstance(target_model, str):
            target_model, _ = load_target(target_model, default_dtype(args.device), args.device, few_rows=False)
        self.target_model = freeze(target_model)
        check_target(self.target_model, model.config)
        check_stage(args.stage, self.target_model)
        if processing_class is not None:
            check_tokenizer(processing_class, self.target_model)
        train_dataset = self._checked(train_dataset, "train_dataset", args)
        eval_dataset = self._checked(eval_dataset, "eval_dataset", args)
        kwargs.setdefault("data_collator", collate)
        if {"contemplate", "future"} & set(args.taught) and is_channel_untrained(model):
            del model.generation_config.confu_contemplation  # from here on there is something to decode with
        # Parameters that this run shall not teach are left out of the optimiser, whose weight decay would shrink them.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_group(name) in args.taught)
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # by `accelerate launch` or its configuration file
            raise ValueError(f"FSDP or DeepSpeed is not supported: {NOT_SHARDED}")
        self.add_callback(KeepSpecialTokens(model))
        # The loss below is already divided by the number of rows of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sampling = AnchorSampling(args.replication, args.ttt_steps + 1, args.seed)
        runner = TargetRunner(self.target_model, model.config, model.future_channel)
        features = None
        if args.feature_cache is not None:
            sampling = self._sampling if args.stage == "joint" else None
            features = KeptFeatures(model, runner, args.feature_cache, sampling)
            features.check_room(dataset for dataset in (train_dataset, eval_dataset) if dataset is not None)
        self._objective = ObjectiveModule(model, runner, args, features)
        self._counts = {"train": self._no_counts(), "eval": self._no_counts()}

    # Data

    def _checked(self, dataset: Any, name: str, args: ConFuTrainingArguments) -> Dataset | None:
        """A dataset that can be trained on, without the rows that cannot, if there is one."""
        if dataset is not None:
            dataset = check_dataset(dataset, self.target_model, name, args.num_steps)
            self._sampler(dataset, args, shuffle=False)  # refuses too few rows
        return dataset

    @staticmethod
    def _sampler(dataset: Dataset, args: ConFuTrainingArguments, shuffle: bool) -> TokenBatchSampler:
        return TokenBatchSampler(
            sequence_lengths(dataset),
            args.tokens_per_batch,
            seed=args.seed,
            shuffle=shuffle,
            num_processes=args.world_size,
            process_index=args.process_index,
        )

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, shuffle=True)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            return self._loader(self.eval_dataset, shuffle=False)
        return self._loader(self._checked(eval_dataset, "eval_dataset", self.args), shuffle=False)

    def _loader(self, dataset: Dataset | None, shuffle: bool) -> DataLoader:
        if dataset is None:
            name = "train_dataset" if shuffle else "eval_dataset"
            raise ValueError(f"Give `{name}`; make one with `prepare_dataset`.")
        args = self.args
        loader = DataLoader(
            dataset,
            batch_sampler=self._sampler(dataset, args, shuffle),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            # Every evaluation makes a loader of its own.
            persistent_workers=args.dataloader_persistent_workers and shuffle,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # The sampler already deals batches out to the processes.
        return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """The batches of one step, with their anchors, and the number of rows that all processes train on in it."""
        if self.state.global_step >= self.state.max_steps:
            # A checkpoint of the last step is continued: Trainer itself checks only after one more step.
            self.control.should_training_stop = True
            return [], None
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        for batch in batches:
            self._add_anchors(batch, step=self.state.global_step + 1)
        if self.args.stage == "contemplation":
            rows = sum(batch["anchors"].exists.sum() for batch in batches)
        else:
            rows = sum(draft_rows(batch["labels"]).sum() for batch in batches)
        return batches, self.accelerator.reduce(rows.to(device), reduction="sum")

    def _add_anchors(self, batch: dict[str, Any], step: int) -> None:
        """Where a batch contemplates; always the same with kept features, whose future predictions are of step 0."""
        if self.args.stage != "core":
            if self._objective.features is not None:
                step = 0
            batch["anchors"] = self._sampling.draw(batch["labels"], TokenBatch.of(batch).row_keys, step)

    # Optimisation

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._counts["train"] = self._no_counts()
        try:
            return super().train(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            # A full disk is an internal error of torch's or of safetensors' writers.
            free = shutil.disk_usage(self.args.output_dir).free
            if free > sum(value.nbytes for value in self.model.state_dict().values()):
                raise
            raise OSError(
                errno.ENOSPC,
                f"no space for a checkpoint ({free / 1e6:.0f} MB are free); make room, or keep fewer with "
                "`save_total_limit`, and start again: the run goes on from its last whole checkpoint",
                self.args.output_dir,
            ) from error

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """What Trainer calls with a batch: never the draft itself, but the objective around it."""
        if not training:
            return self._objective
        return self.accelerator.prepare_model(self._objective) if model is self.model else model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, with the future channel at its learning rate, and Muon for the matrices."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.channel_learning_rate is not None:
            of_core = {
                parameter for name, parameter in self.model.named_parameters() if parameter_group(name) == "core"
            }
            optimizer.param_groups = [
                group | {"params": members, "lr": rate}
                for is_core, rate in ((True, self.args.learning_rate), (False, self.args.channel_learning_rate))
                for group in optimizer.param_groups
                if (members := [parameter for parameter in group["params"] if (parameter in of_core) is is_core])
            ]
        if is_new and self.args.use_muon:
            self.optimizer = MuonBeside(optimizer, matrices_within(self.model))
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Objective]:
        with self.accelerator.autocast():
            objective: Objective = model(inputs)
        mode = "train" if model.training else "eval"
        self._counts[mode] = add_counts(self._counts[mode], objective.counts)
        rows = objective.counts["rows"].clamp(min=1) if num_items_in_batch is None else num_items_in_batch.clamp(min=1)
        # Gradients are averaged over processes; the loss is of the rows of all of them.
        copies = 1 if num_items_in_batch is None else self.args.world_size
        loss = objective.loss_sum * (copies / rows)
        return (loss, objective) if return_outputs else loss

    # Evaluation and metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, None, None]:
        """Count one batch. Trainer would average the losses of batches, which are of unequal size."""
        self._add_anchors(inputs, step=0)  # the same at every evaluation
        with torch.no_grad():
            self.compute_loss(model, inputs)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._counts["eval"] = self._no_counts()
        # Iterating over a DataLoader spends one of training's random numbers.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        counts = self._counts_of_all("eval")
        metrics = {"loss": float(counts["loss"] / counts["rows"].clamp(min=1))} | metrics_of(counts)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = logs | metrics_of(self._counts_of_all("train"))
            self._counts["train"] = self._no_counts()
        super().log(logs, *args, **kwargs)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of [`Trainer`], but as it may be published: with `custom_generate`, without a pickle of the arguments."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            write_custom_generate(folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"`push_to_hub` is not supported: {NOT_PUSHED}")

    def _no_counts(self) -> Counts:
        return no_counts(self.model.config, self.args.num_steps)

    def _counts_of_all(self, mode: str) -> Counts:
        """The sums of all processes; every process must ask for them."""
        own = {name: value.to(self.accelerator.device) for name, value in self._counts[mode].items()}
        return {name: value.cpu() for name, value in self.accelerator.reduce(own, reduction="sum").items()}
