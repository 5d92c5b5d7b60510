"""`ConFuTrainer`: fine-tune a ConFu draft for a target, on Transformers' `Trainer`."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..modeling_confu import ConFuDraftModel
from ..target_runner import check_target
from .anchors import sample_anchors
from .arguments import ConFuTrainingArguments
from .batching import ConFuDataCollator, LengthGroupedTokenBatchSampler
from .data import sequence_lengths
from .objective import Objective, compute_objective
from .warm_up import compute_foresight


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

    The target is in neither checkpoints nor optimiser, and its parameters stop requiring gradients. Logged beside the
    loss: accuracy by TTT step (`accuracy_0`, ...), `tau_greedy` (1 + expected number of leading right guesses of a
    chain, teacher-forced), `future_coverage` (share of draft rows that read a future prediction), and the least and
    the greatest share of one expert in what each router chose (`contemplate_load_min`, ...: a router has collapsed
    when they are 0 and 1/K). In the warm-up stage accuracy is that of the contemplate rows' own predictions.

    Args:
        model ([`ConFuDraftModel`]): The draft, in float32; see [`warm_start`].
        target_model ([`PreTrainedModel`]): The target, on the device and in the dtype it shall run in.
        args ([`ConFuTrainingArguments`]).
        train_dataset, eval_dataset: From [`prepare_dataset`].
        kwargs: Whatever `Trainer` takes.
    """

    def __init__(
        self,
        model: ConFuDraftModel,
        target_model: PreTrainedModel,
        args: ConFuTrainingArguments,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        check_target(target_model, model.config)
        if args.world_size > 1:
            raise ValueError(
                f"{args.world_size} processes: this version of ConFuTrainer trains in one; start it without launcher."
            )
        if model.dtype != torch.float32:
            raise ValueError(
                f"The draft is in {model.dtype}; train it in float32 (`model.float()`) and set `bf16=True` for speed."
            )
        # Several GPUs in one process would mean `DataParallel`, which splits a forward that training never calls and
        # scales the loss by their number.
        args._n_gpu = min(args.n_gpu, 1)
        kwargs.setdefault("data_collator", ConFuDataCollator(pad_token_id=model.config.pad_token_id))
        # Parameters that this stage cannot teach are left out of the optimiser, whose weight decay would shrink them.
        model.requires_grad_(args.stage != "warm_up")
        model.future_channel.requires_grad_(args.stage == "joint")
        model.future_channel.soft_prompts.requires_grad_(args.stage != "core")
        model.future_channel.contemplate_token.requires_grad_(args.stage != "core")
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        # The loss below is already divided by the number of answer tokens of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.target_model = target_model.eval().requires_grad_(False)
        self._counts = {"train": _Counts(), "eval": _Counts()}

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`; make one with `prepare_dataset`.")
        return self._token_batches(self.train_dataset, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`; make one with `prepare_dataset`.")
        return self._token_batches(dataset, shuffle=False)

    def _token_batches(self, dataset: Any, shuffle: bool) -> DataLoader:
        sampler = LengthGroupedTokenBatchSampler(
            sequence_lengths(dataset), self.args.tokens_per_batch, seed=self.args.seed, shuffle=shuffle
        )
        return self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Objective]:
        draft = self.accelerator.unwrap_model(model)
        anchors = None
        if self.args.stage != "core":
            anchors = sample_anchors(inputs["labels"], self.args.replication, self.args.max_lag)
        texts = (inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        if self.args.stage == "warm_up":
            objective = compute_foresight(draft, self.target_model, *texts, anchors)
        else:
            objective = compute_objective(
                draft,
                self.target_model,
                *texts,
                anchors,
                self.args.ttt_steps,
                self.args.ttt_decay,
                self.args.weight_without_future,
            )
        answer_tokens = (inputs["labels"] != -100).sum()
        self._counts["train" if model.training else "eval"].add(objective, answer_tokens)
        items = num_items_in_batch if num_items_in_batch is not None else answer_tokens
        loss = objective.loss_sum / max(items, 1)  # a batch without an answer teaches nothing, and must not give NaN
        return (loss, objective) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, _ = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._counts["eval"] = _Counts()
        # The same anchors at every evaluation, and none of training's random numbers spent on them; iterating over a
        # DataLoader alone would spend one. Anchors are drawn on the CPU.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.args.seed)
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Trainer's own average weighs a batch of few tokens like one of many.
        metrics = {"loss": self._counts["eval"].loss} | self._counts["eval"].metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = logs | self._counts["train"].metrics()
            self._counts["train"] = _Counts()
        super().log(logs, *args, **kwargs)


class _Counts:
    """Sums over batches of what the metrics are made of."""

    def __init__(self) -> None:
        self.counted = self.correct = self.correct_so_far = torch.zeros((), dtype=torch.long)
        self.loss_sum = torch.zeros(())
        self.answer_tokens = torch.zeros((), dtype=torch.long)
        self.rows = self.rows_with_future = 0
        self.loads: dict[str, torch.Tensor] = {}

    def add(self, objective: Objective, answer_tokens: torch.Tensor) -> None:
        self.loss_sum = self.loss_sum + objective.loss_sum.detach()
        self.answer_tokens = self.answer_tokens + answer_tokens
        self.counted = self.counted + objective.counted
        self.correct = self.correct + objective.correct
        self.correct_so_far = self.correct_so_far + objective.correct_so_far
        self.rows += objective.rows
        self.rows_with_future += objective.rows_with_future
        for name in ("contemplate_load", "future_load"):
            if (load := getattr(objective, name)) is not None:
                self.loads[name] = self.loads.get(name, 0) + load

    @property
    def loss(self) -> float:
        return float(self.loss_sum / self.answer_tokens.clamp(min=1))

    def metrics(self) -> dict[str, float]:
        if self.rows == 0:
            return {}
        counted = self.counted.clamp(min=1)
        metrics = {f"accuracy_{step}": round(value, 4) for step, value in enumerate((self.correct / counted).tolist())}
        metrics["tau_greedy"] = round(1 + float((self.correct_so_far / counted).sum()), 4)
        metrics["future_coverage"] = round(self.rows_with_future / self.rows, 4)
        for name, load in self.loads.items():
            shares = load / load.sum().clamp(min=1)
            metrics |= {f"{name}_min": round(float(shares.min()), 4), f"{name}_max": round(float(shares.max()), 4)}
        return metrics
