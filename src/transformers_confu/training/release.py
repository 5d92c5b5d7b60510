"""How a training run meets the Hub: it uploads the draft with its code and card, and nothing else, at its end."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..inference.knobs import ConFuKnobs
from ..publishing.model_card import CARD_FILE, CardFacts, model_card
from ..publishing.publish import write_custom_generate


class ReleasingTrainer(Trainer):
    """A [`Trainer`] whose releases are ConFu checkpoints; with a `target_model`, which a subclass sets."""

    target_model: PreTrainedModel

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self._base_model() is None:  # which the card needs: asked for before the training
            raise ValueError(
                "The card names the target by its id on the Hub, and this one comes from "
                f"{self.target_model.name_or_path!r}: set `hub_base_model` to that id, such as 'Qwen/Qwen3-4B'."
            )
        super().init_hf_repo(token=token, private=private)

    def card_facts(self) -> CardFacts:
        """Facts of the draft's card: those of `card.yaml` in `args.output_dir`, then what this training knows."""
        path = Path(self.args.output_dir, CARD_FILE)
        facts = CardFacts.load(path) if path.exists() else CardFacts()
        return dataclasses.replace(
            facts,
            base_model=facts.base_model or self._base_model(),
            training=facts.training or self._training(),
            evaluation=facts.evaluation or self._evaluation(),
        )

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        **others: Any,
    ) -> None:
        """
        Write the card of the draft, `README.md` of `args.output_dir`, from the arguments and from `card_facts`.

        Args:
            language, license, tags, dataset: Metadata of the card, as of `Trainer`.
            model_name (`str`, *optional*): Name of the repository, for the snippets.
            finetuned_from (`str`, *optional*): Hub id of the target.
            others: What else `Trainer` takes; not used.
        """
        if not self.is_world_process_zero():
            return
        asked: dict[str, Any] = {
            "base_model": finetuned_from,
            "license": license,
            "language": _as_list(language),
            "datasets": _as_list(dataset),
        }
        facts = dataclasses.replace(self.card_facts(), **{name: value for name, value in asked.items() if value})
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        repo_id = self.hub_model_id or model_name or folder.absolute().name
        card = model_card(facts, self.model.config, repo_id, ConFuKnobs.of(self.model.generation_config))
        data: Any = card.data
        data.tags = list(dict.fromkeys([*data.tags, *_as_list(tags)]))
        card.save(folder / "README.md")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of [`Trainer`], but as it may be published: with `custom_generate`, without a pickle of the arguments."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            write_custom_generate(folder, self.hub_model_id)

    def _base_model(self) -> str | None:
        """The target's id on the Hub, where it is known."""
        name = self.args.hub_base_model or self.target_model.name_or_path
        return name if name.count("/") == 1 and not os.path.isdir(name) else None

    def _training(self) -> str:
        args = self.args
        tokens = args.tokens_per_batch * args.gradient_accumulation_steps * args.world_size
        return (
            f"Stage `{args.stage}`: {self.state.global_step:,} steps of up to {tokens:,} tokens, {args.ttt_steps} TTT "
            f"steps, loss `{args.loss}`, l = {args.replication}, learning rate {args.learning_rate:g}, seed "
            f"{args.seed}."
        )

    def _evaluation(self) -> str:
        found = [entry for entry in self.state.log_history if "eval_tau_greedy" in entry]
        if not found:
            return ""
        figures = {name: found[-1].get(f"eval_{name}") for name in ("tau_greedy", "tau_probabilistic")}
        listed = ", ".join(f"`{name}` {value:.3f}" for name, value in figures.items() if value is not None)
        return f"Teacher-forced on held-out rows at step {found[-1]['step']:,}: {listed}."


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
