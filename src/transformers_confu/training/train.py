"""The training command: `python -m transformers_confu.training.train --help`, or with a YAML file of its options."""

import sys
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, set_seed

from ..configuration_confu import ConFuConfig
from ..demo_target import load_target
from ..modeling_confu import ConFuDraftModel
from .arguments import ConFuTrainingArguments
from .data import DatasetReport, load_jsonl, prepare_dataset
from .initialisation import warm_start
from .trainer import ConFuTrainer
from .vocabulary import build_draft_vocabulary, count_assistant_tokens


@dataclass
class DraftArguments:
    """Target, data and draft of a training run."""

    target: str = field(metadata={"help": "Target: a Hub id, a folder, or 'demo' for SmolLM2-135M-Instruct."})
    data: list[str] = field(metadata={"help": "JSONL files (.gz too) of rows that `prepare_dataset` reads."})
    draft: str | None = field(
        default=None, metadata={"help": "Draft to continue from; a new one, started from the target, if not given."}
    )
    target_dtype: str = field(default="bfloat16", metadata={"help": "Dtype that the frozen target runs in."})
    draft_vocab_size: int = field(default=8192, metadata={"help": "Target tokens that a new draft can predict."})
    num_soft_prompts: int = field(default=16, metadata={"help": "Soft prompts of a new draft."})
    instruction: str = field(
        default="Think ahead: what will the assistant say after the coming word? The next words of the answer are",
        metadata={"help": "Text whose keys and values a new draft's soft prompts start from; cut or repeated to fit."},
    )
    max_length: int = field(default=512, metadata={"help": "Longest row, in tokens; longer ones are cut."})
    eval_rows: int = field(default=64, metadata={"help": "Rows held out for evaluation, spread over the data."})


def main(argv: list[str] | None = None) -> None:
    """Prepare data and draft, train, save draft and tokenizer into `output_dir`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser((DraftArguments, ConFuTrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        arguments, training_arguments = parser.parse_yaml_file(argv[0])
    else:
        arguments, training_arguments = parser.parse_args_into_dataclasses(argv)
    set_seed(training_arguments.seed)

    files = [arguments.data] if isinstance(arguments.data, str) else arguments.data  # YAML gives what is written
    rows = [row for path in files for row in load_jsonl(path)]
    target, tokenizer = load_target(arguments.target, arguments.target_dtype, training_arguments.device)
    report = DatasetReport()
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    dataset = prepare_dataset(rows, tokenizer, arguments.max_length, vocab_size=vocab_size, report=report)
    print(report)
    held_out = range(0, len(dataset), max(1, len(dataset) // max(1, arguments.eval_rows)))[: arguments.eval_rows]
    train_rows = sorted(set(range(len(dataset))) - set(held_out))
    if not train_rows:
        raise ValueError(
            f"All {len(dataset)} rows are held out by `eval_rows={arguments.eval_rows}`; lower it or give more data."
        )

    if arguments.draft is not None:
        draft = ConFuDraftModel.from_pretrained(arguments.draft, dtype=torch.float32)
    else:
        draft = new_draft(target, tokenizer, dataset, arguments)
    trainer = ConFuTrainer(
        model=draft,
        target_model=target,
        processing_class=tokenizer,
        args=training_arguments,
        train_dataset=dataset.select(train_rows),
        eval_dataset=dataset.select(held_out) if len(held_out) else None,
    )
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    if len(held_out):
        print(trainer.evaluate())
    if training_arguments.stage != "warm_up" and not hasattr(draft.generation_config, "confu_depth"):
        # Steps beyond those it was trained for get worse.
        draft.generation_config.confu_depth = training_arguments.ttt_steps
    trainer.save_model()


def new_draft(target, tokenizer, dataset, arguments: DraftArguments) -> ConFuDraftModel:
    """A draft warm-started from the target, with a vocabulary by frequency in the answers."""
    eos = target.generation_config.eos_token_id
    vocabulary = build_draft_vocabulary(
        count_assistant_tokens(dataset, target.config.get_text_config(decoder=True).vocab_size),
        arguments.draft_vocab_size,
        always_include=[eos] if isinstance(eos, int) else eos or (),
    )
    print(f"Draft vocabulary: {arguments.draft_vocab_size} tokens, {vocabulary.coverage:.1%} of the answers' tokens")
    ids = torch.tensor(tokenizer(arguments.instruction, add_special_tokens=False)["input_ids"])
    size = arguments.num_soft_prompts
    config = ConFuConfig.from_target(target.config, draft_vocab_size=arguments.draft_vocab_size, num_soft_prompts=size)
    return warm_start(target, vocabulary.token_ids, config, soft_prompt_ids=ids.repeat(-(-size // len(ids)))[:size])


if __name__ == "__main__":
    main()
