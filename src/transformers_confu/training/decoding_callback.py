"""Real decoding at every evaluation: teacher-forced figures say how the draft learns, this says what it is worth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..inference.knobs import confu_generation_config


if TYPE_CHECKING:
    from .trainer import ConFuTrainer


logger = logging.get_logger(__name__)


class DecodingEvaluation(TrainerCallback):
    r"""
    Decodes a few prompts greedily with the draft at every evaluation, and compares with plain `generate`.

    ```python
    >>> trainer.add_callback(DecodingEvaluation(trainer, prompts, max_new_tokens=64, confu_tree_size=16))
    ```

    Logged, and among the metrics that `metric_for_best_model` can name:

    - `eval_decoding_tau`: tokens emitted in rounds / rounds, over all prompts.
    - `eval_decoding_mismatches`: texts that are not plain `generate`'s, token for token. In float32 none but at a tie
      of two scores; in bfloat16 some are usual (see the README), as kernels round differently by the number of rows.

    Several processes share the prompts. Training's random numbers are left alone.

    Args:
        trainer ([`ConFuTrainer`]): The trainer that this is added to.
        prompts (`Sequence[list[int]]`): Token ids of the prompts, as the target reads them.
        max_new_tokens (`int`): Longest answer.
        knobs: `confu_*` knobs of decoding; the draft's own generation config without them.
    """

    def __init__(self, trainer: "ConFuTrainer", prompts: Sequence[list[int]], max_new_tokens: int = 64, **knobs: Any):
        if trainer.args.shard_target:
            raise ValueError("Decoding needs the whole target: leave out `DecodingEvaluation` with `shard_target`.")
        if not prompts:
            raise ValueError("`prompts` is empty; give at least one prompt to decode.")
        options = {"do_sample": False, "max_new_tokens": max_new_tokens}
        self.trainer = trainer
        self.plain = confu_generation_config(trainer.target_model, **options)
        self.drafted = confu_generation_config(trainer.target_model, **options, **knobs)
        self.prompts = [torch.tensor([ids]) for ids in prompts][trainer.args.process_index :: trainer.args.world_size]
        self.answers: list[torch.LongTensor] | None = None
        """Plain `generate`'s: the target is frozen, so they are made once."""

    def on_evaluate(self, args, state, control, metrics: dict[str, float] | None = None, **kwargs):
        results = {f"eval_decoding_{name}": value for name, value in self.measure().items()}
        if metrics is not None:
            metrics.update(results)
        self.trainer.log(results)

    def measure(self) -> dict[str, float]:
        """`tau` and `mismatches` of the draft as it is now."""
        draft, target = self.trainer.model, self.trainer.target_model
        was_training = draft.training
        draft.eval()
        if self.answers is None:
            self.answers = [self._decode(prompt, self.plain) for prompt in self.prompts]
        emitted = rounds = mismatches = 0
        for prompt, expected in zip(self.prompts, self.answers, strict=True):
            answer = self._decode(prompt, self.drafted, assistant_model=draft)
            mismatches += not torch.equal(answer, expected)
            emitted += sum(draft.last_statistics.emitted)
            rounds += draft.last_statistics.rounds
        draft.train(was_training)
        sums = torch.tensor([emitted, rounds, mismatches], device=self.trainer.args.device)
        emitted, rounds, mismatches = self.trainer.accelerator.reduce(sums, reduction="sum").tolist()
        if mismatches and target.dtype in (torch.float32, torch.float64):
            logger.warning(
                "%d texts differ from plain `generate` in %s. Unless two scores were tied there, decoding is wrong: "
                "please report it.",
                mismatches,
                target.dtype,
            )
        return {"tau": round(emitted / max(rounds, 1), 4), "mismatches": mismatches}

    def _decode(self, prompt: torch.LongTensor, config: Any, **kwargs: Any) -> torch.LongTensor:
        ids = prompt.to(self.trainer.target_model.device)
        mask = torch.ones_like(ids)
        output = self.trainer.target_model.generate(ids, attention_mask=mask, generation_config=config, **kwargs)
        return output[0, ids.shape[1] :].cpu()
