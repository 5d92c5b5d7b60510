"""`ConFuTrainer`: fine-tune a ConFu draft for a target, on Transformers' `Trainer`."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data.dataset import sequence_lengths
from ..inference.checks import check_target
from ..inference.configuration_confu import SPECIAL_TOKENS
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner
from .anchors import Anchors, draft_rows, sample_anchors
from .arguments import NOT_SHARDED_BY, PARAMETER_GROUPS, ConFuTrainingArguments, parameter_group
from .batch import Texts
from .batching import ConFuDataCollator, LengthGroupedTokenBatchSampler, PackedTokenBatchSampler, TokenBatchSampler
from .checks import check_dataset, check_tokenizer
from .features import CachedFeatures, FixedAnchors
from .hub_uploads import PublishingTrainer
from .initialisation import is_channel_untrained
from .objective import Objective, Recipe, compute_live
from .running_metrics import Counts, warn_of_collapse
from .targets import freeze, load_frozen_target, shard
from .warm_up import compute_foresight


class ObjectiveModule(nn.Module):
    r"""
    The objective of a batch as the forward of a module that holds the draft.

    It is what accelerate wraps, so that the gradients of several processes meet; the target is no part of it.

    Args:
        draft ([`ConFuDraftModel`]): Trained.
        target ([`PreTrainedModel`]): Frozen.
        args ([`ConFuTrainingArguments`]).
        features ([`CachedFeatures`], *optional*): What the target says, where it need not be asked again.
    """

    def __init__(
        self,
        draft: ConFuDraftModel,
        target: PreTrainedModel,
        args: ConFuTrainingArguments,
        features: CachedFeatures | None = None,
    ):
        super().__init__()
        self.draft = draft
        self.args = args
        self.features = features
        self._target = (target,)  # in a tuple, torch does not take it for a submodule

    def forward(self, batch: dict[str, Any]) -> Objective:
        """Loss and counts of a batch as the collator makes it, with `anchors` besides, except in stage core."""
        (target,) = self._target
        runner = TargetRunner(target, self.draft.config, self.draft.future_channel)
        texts, args = Texts.of(batch), self.args
        if args.stage == "warm_up":
            return compute_foresight(self.draft, runner, texts, batch["anchors"])
        recipe = Recipe(args.ttt_steps, args.ttt_decay, args.loss, args.weight_without_future)
        if self.features is not None:
            return self.features.compute(texts, batch["row_ids"].tolist(), recipe)
        return compute_live(self.draft, runner, texts, batch.get("anchors"), recipe)


class KeepSpecialTokens(TrainerCallback):
    """Undoes what Trainer does at the start: a draft's special tokens are its target's, not its tokenizer's."""

    def __init__(self, draft: ConFuDraftModel):
        self.kept = [
            (config, {name: copy.copy(getattr(config, name, None)) for name in SPECIAL_TOKENS})
            for config in (draft.config, draft.generation_config)
        ]

    def on_train_begin(self, args, state, control, **kwargs):
        for config, tokens in self.kept:
            for name, value in tokens.items():
                setattr(config, name, copy.copy(value))


def token_batches(dataset: Any, args: ConFuTrainingArguments, shuffle: bool) -> TokenBatchSampler:
    """This process's batches of a dataset; ValueError where it cannot be dealt out as `args` say."""
    settings: dict[str, Any] = {
        "lengths": sequence_lengths(dataset),
        "tokens_per_batch": args.tokens_per_batch,
        "seed": args.seed,
        "shuffle": shuffle,
        "num_processes": args.world_size,
        "process_index": args.process_index,
    }
    if args.packed_length is None:
        return LengthGroupedTokenBatchSampler(**settings)
    return PackedTokenBatchSampler(packed_length=args.packed_length, **settings)


class ConFuTrainer(PublishingTrainer):
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
    step, however the rows are dealt out. A resumed run continues as if it had not been interrupted.

    Logged and evaluated beside the loss: see [`~metrics.Counts.metrics`]. `load_best_model_at_end=True` selects by
    `tau_greedy`. In the warm-up stage accuracy is that of the contemplate rows' own predictions, and rows are these.

    Args:
        model ([`ConFuDraftModel`]): The draft, in float32; see [`warm_start`].
        target_model ([`PreTrainedModel`], peft model or `str`): The target, on the device and in the dtype it shall
            run in; or its folder or Hub id, loaded as `args.target_dtype` and `args.target_device_map` say.
        args ([`ConFuTrainingArguments`]).
        processing_class ([`PreTrainedTokenizerBase`], *optional*): The target's tokenizer; saved with the draft.
        train_dataset, eval_dataset: From [`prepare_dataset`].
        kwargs: Whatever `Trainer` takes, except what it does with logits or for another loss, which has no place here:
            `compute_metrics`, `preprocess_logits_for_metrics`, `compute_loss_func`.
    """

    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: ConFuDraftModel,
        target_model: PreTrainedModel | nn.Module | str,
        args: ConFuTrainingArguments,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        if model is None or kwargs.get("model_init") is not None:
            raise ValueError("`model_init` is not supported: a draft is made for its target; give it as `model`.")
        if model.dtype != torch.float32:
            raise ValueError(
                f"The draft is in {model.dtype}; train it in float32 (`model.float()`) and set `bf16=True` for speed."
            )
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` has no effect here: losses are named by `loss`, and there are no logits to measure; "
                    "leave it out, and measure in a callback's `on_evaluate`."
                )
        if isinstance(target_model, str):
            target_model = load_frozen_target(target_model, args.target_dtype, args.device, args.target_device_map)
        self.target_model = freeze(target_model)
        check_target(self.target_model, model.config)
        if processing_class is not None:
            check_tokenizer(processing_class, self.target_model)
        steps = 1 if args.stage == "warm_up" else args.ttt_steps

        def checked(dataset: Dataset, name: str) -> Dataset:
            dataset = check_dataset(dataset, self.target_model, name, steps)
            try:
                token_batches(dataset, args, shuffle=False)
            except ValueError as error:
                raise ValueError(f"`{name}` makes no batches. {error}") from error
            return dataset

        if train_dataset is not None:
            train_dataset = checked(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            if (metric := args.metric_for_best_model) in ("tau_greedy", "tau_probabilistic", "loss"):
                raise ValueError(
                    f"`metric_for_best_model` is {metric!r}, and there are several evaluation sets: name one of them "
                    f"too, such as '{next(iter(eval_dataset), '')}_{metric}'."
                )
            eval_dataset = {
                name: checked(dataset, f"eval_dataset[{name!r}]") for name, dataset in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = checked(eval_dataset, "eval_dataset")
        if args.shard_target:
            if args.world_size == 1:
                raise ValueError("`shard_target` needs several processes; start them with `torchrun` or `accelerate`.")
            shard(self.target_model, args.device)
        # Several GPUs in one process would mean `DataParallel`, which splits a forward that training never calls and
        # scales the loss by their number.
        args._n_gpu = min(args.n_gpu, 1)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = ConFuDataCollator(model.config.pad_token_id, packed_length=args.packed_length)
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
            raise ValueError(NOT_SHARDED_BY.format("DeepSpeed" if self.is_deepspeed_enabled else "FSDP"))
        self.add_callback(KeepSpecialTokens(model))
        # The loss below is already divided by the number of rows of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        with self.accelerator.main_process_first():  # makes the files, which all share
            features = self._cached_features()
        self._objective = ObjectiveModule(model, self.target_model, args, features)
        self._counts = {"train": self._no_counts(), "eval": self._no_counts()}
        self._collapsed: set[str] = set()

    # Data

    def _cached_features(self) -> CachedFeatures | None:
        """The files of `args.feature_cache`; the rows of all datasets are numbered for them."""
        if self.args.feature_cache is None:
            return None
        numbered, first = [], 0

        def number(dataset: Dataset) -> Dataset:
            nonlocal first
            ids = range(first, first + len(dataset))
            first += len(dataset)
            numbered.append(dataset.add_column("row_ids", ids))
            return numbered[-1]

        if self.train_dataset is not None:
            self.train_dataset = number(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: number(dataset) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = number(self.eval_dataset)
        anchors = None
        if self.args.stage == "joint":
            args = self.args
            anchors = FixedAnchors(args.replication, args.max_lag, args.anchors_per_sequence, args.seed)
        if not numbered:
            raise ValueError("`feature_cache` keeps what the target says about datasets; give a `train_dataset`.")
        features = numbered[0].features
        for index, rows in enumerate(numbered):
            if rows.features != features:  # ids may be of several integer types
                numbered[index] = rows.select_columns(list(features)).cast(features)
        whole = concatenate_datasets(numbered)
        runner = TargetRunner(self.target_model, self.model.config, self.model.future_channel)
        return CachedFeatures(self.model, runner, whole, self.args.feature_cache, anchors)

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`; make one with `prepare_dataset`.")
        return self._token_batches(self.train_dataset, shuffle=True)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`; make one with `prepare_dataset`.")
        if self._objective.features is not None and "row_ids" not in dataset.column_names:
            raise ValueError(
                "`feature_cache` keeps the rows that the trainer was made with, and this dataset is none of them; "
                "give it as an `eval_dataset` of `ConFuTrainer`, or leave `feature_cache` out."
            )
        return self._token_batches(dataset, shuffle=False)

    def _token_batches(self, dataset: Any, shuffle: bool) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_sampler=token_batches(dataset, args, shuffle),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            # Every evaluation makes a loader of its own.
            persistent_workers=args.dataloader_persistent_workers and shuffle,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # The sampler already deals batches out to the processes.
        return prepare_data_loader(
            loader, device=self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """The batches of one step, with their anchors, and the number of rows that all processes train on in it."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        if self._draws_anchors:
            for number, batch in enumerate(batches):
                # A pure function of the step: a resumed run draws the same, and nothing else depends on it.
                place = (self.args.seed, self.state.global_step, number, self.args.process_index)
                batch["anchors"] = self._draw_anchors(batch["labels"], place)
        if self.args.stage == "warm_up":
            rows = sum(batch["anchors"].exists.sum() for batch in batches)
        else:
            rows = sum(draft_rows(batch["labels"]).sum() for batch in batches)
        return batches, self.accelerator.reduce(rows.to(device), reduction="sum")

    @property
    def _draws_anchors(self) -> bool:
        """Whether batches come with anchors; those of kept features are fixed."""
        return self.args.stage == "warm_up" or (self.args.stage == "joint" and self._objective.features is None)

    def _draw_anchors(self, labels: torch.LongTensor, place: tuple[int, ...]) -> Anchors:
        with torch.random.fork_rng(devices=[]):  # anchors are drawn on the CPU
            torch.default_generator.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
            return sample_anchors(
                labels, self.args.replication, self.args.max_lag, limit=self.args.anchors_per_sequence
            )

    # Optimisation

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._counts["train"] = self._no_counts()
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where a checkpoint of the last step is continued: Trainer looks only behind the next step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """What Trainer calls with a batch: never the draft itself, but the objective around it."""
        if not training:
            return self._objective
        return self.accelerator.prepare_model(self._objective) if model is self.model else model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, its parameters grouped so that each has the learning rate of its group."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            group_of = {parameter: parameter_group(name) for name, parameter in self.model.named_parameters()}
            optimizer.param_groups = [
                group | {"params": members, "lr": self.args.learning_rates[name]}
                for name in PARAMETER_GROUPS
                for group in optimizer.param_groups
                if (members := [parameter for parameter in group["params"] if group_of[parameter] == name])
            ]
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Objective]:
        with self.accelerator.autocast():
            objective: Objective = model(inputs)
        self._counts["train" if model.training else "eval"].add(objective)
        rows = objective.rows if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes; the loss is of the rows of all of them.
        copies = 1 if num_items_in_batch is None else self.args.world_size
        loss = objective.loss_sum * (copies / max(rows, 1))
        return (loss, objective) if return_outputs else loss

    # Evaluation and metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, None, None]:
        """Count one batch. Trainer would average the losses of batches, which are of unequal size."""
        inputs = self._prepare_inputs(inputs)
        if self._draws_anchors:
            place = (self.args.seed, self.args.process_index, self._evaluated)
            inputs["anchors"] = self._draw_anchors(inputs["labels"], place)  # the same at every evaluation
        self._evaluated += 1
        with torch.no_grad():
            self.compute_loss(model, inputs)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._counts["eval"] = self._no_counts()
        self._evaluated = 0
        # Iterating over a DataLoader spends one of training's random numbers.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        counts = self._counts["eval"].over_processes(self.accelerator)
        self._warn_of_collapse(counts)
        metrics = {"loss": counts.loss} | counts.metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            counts = self._counts["train"].over_processes(self.accelerator)
            self._counts["train"] = self._no_counts()
            self._warn_of_collapse(counts)
            logs = logs | counts.metrics()
        super().log(logs, *args, **kwargs)

    def _no_counts(self) -> Counts:
        return Counts(self.model.config, 1 if self.args.stage == "warm_up" else self.args.ttt_steps)

    def _warn_of_collapse(self, counts: Counts) -> None:
        for router in set(counts.collapsed_routers()) - self._collapsed:
            self._collapsed.add(router)
            warn_of_collapse(router, self.model.config)
