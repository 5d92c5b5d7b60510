"""Decoding at every evaluation: teacher-forced figures say how the draft learns, this says what it is worth."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..inference.knobs import confu_generation_config


class DecodingEvaluation(TrainerCallback):
    r"""
    Decodes a few prompts greedily with the draft and its own knobs at every evaluation.

    ```python
    >>> trainer.add_callback(DecodingEvaluation(trainer, prompts))
    ```

    Logged, and among the metrics that `metric_for_best_model` can name: `eval_decoding_tau`, the tokens emitted in
    rounds / rounds, over all prompts. Several processes share the prompts. Training's random numbers are left alone.

    Args:
        trainer ([`ConFuTrainer`]): The trainer that this is added to.
        prompts (`Sequence[list[int]]`): Token ids of the prompts, as the target reads them.
        max_new_tokens (`int`): Longest answer.
    """

    def __init__(self, trainer: Trainer, prompts: Sequence[list[int]], max_new_tokens: int = 64):
        if trainer.args.shard_target:
            raise ValueError("Decoding needs the whole target: leave out `DecodingEvaluation` with `shard_target`.")
        if not prompts:
            raise ValueError("`prompts` is empty; give at least one prompt to decode.")
        self.trainer, self.max_new_tokens = trainer, max_new_tokens
        self.prompts = [torch.tensor([ids]) for ids in prompts][trainer.args.process_index :: trainer.args.world_size]

    def on_evaluate(self, args, state, control, metrics: dict[str, float] | None = None, **kwargs: Any):
        result = {"eval_decoding_tau": self.tau()}
        if metrics is not None:
            metrics.update(result)
        self.trainer.log(result)

    def tau(self) -> float:
        """Of the draft as it is now."""
        draft, target = self.trainer.model, self.trainer.target_model
        config = confu_generation_config(target, do_sample=False, max_new_tokens=self.max_new_tokens)
        was_training = draft.training
        draft.eval()
        emitted = rounds = 0
        for prompt in self.prompts:
            ids = prompt.to(target.device)
            target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, assistant_model=draft)
            emitted += sum(draft.last_statistics.emitted)
            rounds += draft.last_statistics.rounds
        draft.train(was_training)
        sums = torch.tensor([emitted, rounds], device=self.trainer.args.device)
        emitted, rounds = self.trainer.accelerator.reduce(sums, reduction="sum").tolist()
        return round(emitted / max(rounds, 1), 4)
