"""
Which form of the future prediction helps a draft most.

Core and contemplation of a trained draft stay as they are. In each form a new `[f]` learns alone, by the KL
divergence; then `tau_greedy` of held-out rows is compared with that of the same draft without future predictions, over
whole answers and over their first rows. Prints a table of what is finished in the output folder:

    python examples/forms_of_f.py --data answers.jsonl.gz --output runs/forms

The same command goes on where it was interrupted. `--forms` and `--seeds` name a part of the work.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _targets import example_arguments, load_draft, load_target
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.common.loading import default_dtype
from transformers_confu.data import load_rows, prepare_dataset
from transformers_confu.inference.modeling_confu import FutureToken
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments
from transformers_confu.training.anchors import IGNORE_INDEX, Anchors, draft_rows
from transformers_confu.training.arguments import parameter_group


NUM_FIRST_ROWS = 32


class PredictedTokenDraft(ConFuDraftModel):
    """In place of the mixture of `[f]`: the embedding of the token that the contemplate row itself would say."""

    _auto_class = None  # its checkpoints need not bring this code

    def __init__(self, config: ConFuConfig, target: PreTrainedModel):
        super().__init__(config)
        self._target = (target,)  # in a tuple, torch does not take it for a submodule

    def future(self, future_states: torch.Tensor, fused_taps: torch.Tensor) -> FutureToken:
        (target,) = self._target
        final_states = future_states[..., -self.config.target_hidden_size :].to(target.dtype)  # (B, rows, Ht)
        with torch.no_grad(), torch.autocast(final_states.device.type, enabled=False):
            tokens = target.get_output_embeddings()(final_states).argmax(dim=-1)  # (B, rows)
            embeddings = target.get_input_embeddings()(tokens).to(fused_taps)
        token = super().future(future_states, fused_taps)
        attention = self.layers[0].self_attn
        states = self.layers[0].attention_input(embeddings, self.future_channel.future_projection(future_states))
        return FutureToken(key=attention.keys(states), value=attention.values(states), residual=token.residual)


class FirstRowsTrainer(ConFuTrainer):
    """Trains with the future predictions of the first rows of every answer alone."""

    def _draw_anchors(self, labels: torch.LongTensor, place: tuple[int, ...]) -> Anchors:
        anchors = super()._draw_anchors(labels, place)
        anchors.of_row = anchors.of_row.masked_fill(~first_rows(labels), -1)
        return anchors


def first_rows(labels: torch.LongTensor) -> torch.BoolTensor:
    """The first draft rows of each answer; `labels` and result `(B, T)`."""
    rows = draft_rows(labels)
    number = rows.cumsum(dim=1)
    return rows & (number - number.masked_fill(rows, 0).cummax(dim=1).values <= NUM_FIRST_ROWS)


def without_later_rows(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row of a dataset in which only the first draft rows of each answer count."""
    labels = torch.tensor([row["labels"]])
    needed = first_rows(labels)
    for _ in range(2):  # row i predicts token i + 2
        needed = needed | needed.roll(1, dims=1)
    return {"labels": labels.masked_fill(~needed, IGNORE_INDEX)[0].tolist()}


@dataclass
class Form:
    """What differs from the form of the draft that is started from, and how it is trained."""

    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    draft: type[ConFuDraftModel] = ConFuDraftModel
    trainer: type[ConFuTrainer] = ConFuTrainer


def forms(config: ConFuConfig) -> dict[str, Form]:
    final = config.target_num_hidden_layers
    return {
        "as it is": Form(),
        "f: final state": Form({"future_hidden_state_indices": [final]}),
        "f: taps": Form({"future_hidden_state_indices": config.target_hidden_state_indices}),
        "f: taps and final state": Form(
            {"future_hidden_state_indices": [*config.target_hidden_state_indices, final]},
        ),
        "slot alone, nothing added": Form({"use_future_residual": False}),
        "[f] embeds the predicted token": Form(draft=PredictedTokenDraft),
        "first rows of answers alone": Form(trainer=FirstRowsTrainer),
        "l = 0, an anchor in each row": Form(training={"replication": 0}),
        "l = 9": Form(training={"replication": 9}),
    }


def start(form: Form, base: ConFuDraftModel, target: PreTrainedModel) -> ConFuDraftModel:
    """A draft in this form, with the core and contemplation of `base`."""
    config = ConFuConfig(**base.config.to_dict() | form.config)
    draft = form.draft(config, target) if form.draft is PredictedTokenDraft else form.draft(config)
    kept = {name: tensor for name, tensor in base.state_dict().items() if parameter_group(name) != "future"}
    draft.load_state_dict(kept, strict=False)
    return draft


def parse_arguments() -> argparse.Namespace:
    parser = example_arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("draft", nargs="?", help="folder or Hub id; the draft of this repository if not given")
    parser.add_argument("--data", required=True, help="rows that `prepare_dataset` reads")
    parser.add_argument("--output", required=True, type=Path, help="folder of runs and measurements")
    parser.add_argument("--forms", nargs="+", type=int, help="numbers of forms, from 0; all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--tokens_per_batch", type=int, default=1500)
    parser.add_argument("--ttt_steps", type=int, default=4)
    parser.add_argument("--eval_rows", type=int, default=64, help="rows held out, spread over the data")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    target, tokenizer = load_target(arguments.tiny)
    if arguments.draft is None:
        base = load_draft(target, arguments.tiny).float()
    else:
        base = ConFuDraftModel.from_pretrained(arguments.draft, dtype=torch.float32)
    dataset = prepare_dataset(
        list(load_rows(arguments.data)), tokenizer, base.config.max_position_embeddings, vocab_size=target.vocab_size
    )
    held_out = range(0, len(dataset), max(1, len(dataset) // arguments.eval_rows))[: arguments.eval_rows]
    train_dataset = dataset.select(sorted(set(range(len(dataset))) - set(held_out)))
    whole = dataset.select(held_out)
    eval_datasets: dict[str, Dataset] = {"whole": whole, "first": whole.map(without_later_rows)}

    def trainer(draft: ConFuDraftModel, kind: type[ConFuTrainer] = ConFuTrainer, **options: Any) -> ConFuTrainer:
        args = ConFuTrainingArguments(
            tokens_per_batch=arguments.tokens_per_batch,
            ttt_steps=arguments.ttt_steps,
            learning_rate=arguments.learning_rate,
            max_steps=arguments.steps,
            use_cpu=target.device.type == "cpu",
            bf16=default_dtype(target.device) == "bfloat16" and not arguments.tiny,
            logging_steps=10,
            save_steps=50,
            save_total_limit=1,
            report_to="none",
            **options,
        )
        return kind(draft, target, args, train_dataset=train_dataset, eval_dataset=eval_datasets)

    def measure(draft: ConFuDraftModel, stage: str) -> dict[str, float]:
        metrics = trainer(draft, stage=stage, output_dir=str(arguments.output / "unused")).evaluate()
        return {name: metrics[f"eval_{name}_tau_greedy"] for name in eval_datasets}

    without = arguments.output / "without.json"
    if not without.exists():
        arguments.output.mkdir(parents=True, exist_ok=True)
        without.write_text(json.dumps(measure(base, "core")))
    all_forms = list(forms(base.config).items())
    for number in arguments.forms if arguments.forms is not None else range(len(all_forms)):
        name, form = all_forms[number]
        for seed in arguments.seeds:
            folder = arguments.output / f"form{number}_seed{seed}"
            if (folder / "measured.json").exists():
                continue
            print(f"{name}, seed {seed}", flush=True)
            torch.manual_seed(seed)
            draft = start(form, base, target)
            options = {"stage": "joint", "frozen": ["core", "contemplate"], "seed": seed, "output_dir": str(folder)}
            run = trainer(draft, form.trainer, **options, **form.training)
            run.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
            (folder / "measured.json").write_text(json.dumps(measure(draft, "joint")))

    baseline = json.loads(without.read_text())
    print(f"\n| form | seeds | gain, {' | gain, '.join(eval_datasets)} |\n|---|---|{'---|' * len(eval_datasets)}")
    print(f"| without f: tau_greedy | | {' | '.join(f'{baseline[of]:.3f}' for of in eval_datasets)} |")
    for number, (name, _) in enumerate(all_forms):
        files = sorted(arguments.output.glob(f"form{number}_seed*/measured.json"))
        if files:
            taus = [json.loads(file.read_text()) for file in files]
            gains = [", ".join(f"{tau[of] - baseline[of]:+.3f}" for tau in taus) for of in eval_datasets]
            print(f"| {name} | {len(taus)} | {' | '.join(gains)} |")


if __name__ == "__main__":
    main()
