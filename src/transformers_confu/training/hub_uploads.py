"""How `ConFuTrainer` meets the Hub: what it uploads is the draft with its code and card, and nothing else."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, ModelCardData
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, hf_api, logging

from ..inference.knobs import ConFuKnobs
from ..publishing.model_card import CARD_FILE, CardFacts, model_card
from ..publishing.publish import write_custom_generate


logger = logging.get_logger(__name__)

# Pickles, the state of optimiser and Trainer, and what only this machine can use.
NOT_RELEASED = [
    *("*.bin", "*.pt", "*.pth", "trainer_state.json"),
    *("_*", f"{PREFIX_CHECKPOINT_DIR}-*", CARD_FILE),
]


class PublishingTrainer(Trainer):
    """A [`Trainer`] whose releases are ConFu checkpoints; with a `target_model`, which a subclass sets."""

    target_model: PreTrainedModel
    push_in_progress: PushInProgress | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self._base_model()  # what the card will need is asked for before the training
        super().init_hf_repo(token=token, private=private)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        r"""
        Write the card of the draft, `README.md` of `args.output_dir`.

        What cannot be read from the draft comes from the arguments, and where they say nothing from `card.yaml` beside
        it (see [`CardFacts`]), which is written to be completed. What that says neither of training nor of evaluation
        comes from the training.

        Args:
            language, license, tags, dataset: Metadata of the card, as of `Trainer`.
            model_name (`str`, *optional*): Name of the repository, for the snippets.
            finetuned_from (`str`, *optional*): Hub id of the target, where it was loaded from a folder.
            tasks, dataset_tags, dataset_args: Not used.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, CARD_FILE)
        written = CardFacts.load(path) if path.exists() else None
        asked: dict[str, Any] = {
            "base_model": finetuned_from,
            "license": license,
            "language": _as_list(language),
            "datasets": _as_list(dataset),
        }
        facts = dataclasses.replace(
            written or CardFacts(base_model=finetuned_from or self._base_model(), license="unknown"),
            **{name: value for name, value in asked.items() if value},
        )
        if facts != written:
            path.parent.mkdir(parents=True, exist_ok=True)
            facts.save(path)
        if facts.license == "unknown":
            logger.warning("The model card says `license: unknown`; complete %s.", path)
        self._write_card(self.args.output_dir, self._completed(facts), model_name, _as_list(tags))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Any:
        """As of [`Trainer`], without pickles; `kwargs` go to `create_model_card`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._upload(self.args.output_dir, commit_message, blocking, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the draft of a checkpoint, unless the one before is still on its way."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # A copy: `save_total_limit` may delete the checkpoint before it is uploaded.
        copy = tempfile.TemporaryDirectory()
        shutil.copytree(checkpoint_folder, copy.name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_RELEASED))
        self._write_card(copy.name, self._completed(CardFacts(self._base_model(), "unknown")))
        message = f"Training in progress, step {self.state.global_step}"

        def upload() -> CommitInfo:
            with copy:
                try:
                    return self._upload(copy.name, message, blocking=True)
                except Exception as error:
                    logger.error("%s: the upload failed: %s", message, error)
                    raise

        earlier = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress(
            [*(job for job in earlier if not job.done()), hf_api().run_as_future(upload)]
        )

    def _upload(
        self,
        folder: str,
        commit_message: str | None,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Upload a saved draft: `CommitInfo`, or a `Future` of one if not `blocking`."""
        write_custom_generate(folder, self.hub_model_id)
        options: dict[str, Any] = {
            "token": token or self.args.hub_token,
            "repo_id": self.hub_model_id,
            "folder_path": folder,
            "commit_message": commit_message,
            "ignore_patterns": list(NOT_RELEASED),
            "revision": revision or self.args.hub_revision,
            "run_as_future": not blocking,
        }
        # One for all, whose uploads are made one after the other.
        return hf_api().upload_folder(**options)

    def _write_card(
        self, folder: str, facts: CardFacts, model_name: str | None = None, tags: list[str] | None = None
    ) -> None:
        repo_id = self.hub_model_id or model_name or Path(self.args.output_dir).absolute().name
        card = model_card(facts, self.model.config, repo_id, ConFuKnobs.of(self.model.generation_config))
        data = cast(ModelCardData, card.data)
        data.tags = list(dict.fromkeys([*(data.tags or ()), *(tags or ())]))
        card.save(Path(folder, "README.md"))

    def _completed(self, facts: CardFacts) -> CardFacts:
        """With what the training says where the facts say nothing."""
        return dataclasses.replace(
            facts, training=facts.training or self._training(), evaluation=facts.evaluation or self._evaluation()
        )

    def _base_model(self) -> str:
        """Hub id of the target."""
        name = self.args.hub_base_model or self.target_model.name_or_path
        if name.count("/") != 1 or os.path.isdir(name):
            raise ValueError(
                f"The card names the target by its id on the Hub, and this one comes from {name!r}: set "
                "`hub_base_model` to that id, such as 'Qwen/Qwen3-4B'."
            )
        return name

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
