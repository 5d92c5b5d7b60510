"""The training command: `confu train run.yaml`, or with options, which may also follow a file; `--help` lists them.

A YAML file describes one run or several stages, see [`~runs.read_runs`]. A run whose `output_dir` holds a finished run
of the same options is skipped, an interrupted one continues from its last checkpoint.

In several processes: `torchrun --nproc_per_node=2 -m transformers_confu.cli train run.yaml`. Tested with two
processes on the CPU (gloo), with `shard_target` and with `feature_cache`; on several GPUs it has not run yet, on
one it has.
"""

import gc
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..common.demo_target import HUB_ID, demo_target_path
from ..common.loading import load_draft
from ..common.option_files import json_option, read_option_file
from ..data.continuous_batching import end_token_ids
from ..data.dataset import IGNORE_INDEX, DatasetReport, load_rows, prepare_dataset
from ..data.fingerprints import fingerprint_of_dataset
from ..data.vocabulary import build_draft_vocabulary, count_assistant_tokens
from ..inference.configuration_confu import ConFuConfig
from ..inference.modeling_confu import ConFuDraftModel
from .arguments import ConFuTrainingArguments
from .decoding_callback import DecodingEvaluation
from .initialisation import is_channel_untrained, start_future_channel, warm_start
from .run_folder import RunFolder
from .targets import load_frozen_target
from .trainer import ConFuTrainer


@dataclass
class DraftArguments:
    """Target, data and draft of a training run."""

    target: str = field(metadata={"help": "Target: a Hub id, a folder, or 'demo' for SmolLM2-135M-Instruct."})
    data: list[str] = field(
        metadata={"help": "Rows that `prepare_dataset` reads: JSONL files, folders, Hub datasets (`id:split`)."}
    )
    draft: str | None = field(
        default=None,
        metadata={
            "help": "Draft to continue from, for the first of several stages; a new one, started from the target, if "
            "not given."
        },
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "Target tokens that a new draft can predict; 8192."}
    )
    num_soft_prompts: int | None = field(
        default=None, metadata={"help": "Soft prompts of a new draft, 0 for none; 16."}
    )
    rotate_soft_prompts: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a new draft's soft prompts keep their distance to the text's end, by the target's RoPE; "
            "false."
        },
    )
    num_experts: int | None = field(
        default=None,
        metadata={"help": "Experts of each mixture of a new draft, [con]'s and [f]'s, 1 for a fixed embedding; 8."},
    )
    instruction: str = field(
        default="Think ahead: what will the assistant say after the coming word? The next words of the answer are",
        metadata={
            "help": "Text whose keys and values a new draft's soft prompts start from, cut or repeated to fit; random "
            "ones if empty."
        },
    )
    max_length: int = field(default=512, metadata={"help": "Longest row, in tokens; longer ones are cut."})
    eval_rows: int = field(default=64, metadata={"help": "Rows held out for evaluation, spread over the data."})
    decoding_prompts: int = field(
        default=0, metadata={"help": "Prompts of held-out rows that every evaluation decodes in earnest."}
    )
    decoding_tokens: int = field(default=64, metadata={"help": "Longest answer of such a decoding, in tokens."})
    decoding_knobs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Its `confu_*` knobs, as JSON; by default the draft's own, of which `confu_depth` is `ttt_steps`, "
            "and without future in stage core."
        },
    )


# Of a new draft, where nothing else is asked for.
NEW_DRAFT = {"draft_vocab_size": 8192, "num_soft_prompts": 16, "rotate_soft_prompts": False, "num_experts": 8}

# What else of `TrainingArguments` the outcome of a run depends on, besides what ConFu adds.
_OPTIMISATION = (
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "seed", "bf16", "fp16", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_epsilon", "lr_scheduler_kwargs", "load_best_model_at_end"),
)
_NOT_IN_RECIPE = {
    *("logging_steps", "remove_unused_columns", "ddp_broadcast_buffers", "target_device_map", "shard_target"),
    *("hub_base_model", "include_num_input_tokens_seen"),
    *("decoding_prompts", "decoding_tokens", "decoding_knobs"),
}


def main(argv: list[str] | None = None) -> None:
    """Train, one run after the other; each saves draft and tokenizer into its `output_dir`."""
    parser = HfArgumentParser((DraftArguments, ConFuTrainingArguments), allow_abbrev=False)
    types = {option.name: option.type for kind in (DraftArguments, ConFuTrainingArguments) for option in fields(kind)}
    argv = sys.argv[1:] if argv is None else argv
    # All are parsed, and their folders looked into, first: a mistake in the last stage shows before the first has run.
    runs = [
        parser.parse_args_into_dataclasses(options, look_for_args_file=False)
        for options in read_option_file(argv, types)
    ]
    for _, training in runs:
        if training.save_only_model:
            raise ValueError(
                "`save_only_model` leaves checkpoints that an interrupted run cannot go on from; leave it out, and "
                "limit their number by `save_total_limit`."
            )
    folders = [RunFolder(training.output_dir, recipe_of(arguments, training)) for arguments, training in runs]
    for folder, (arguments, training_arguments) in zip(folders, runs, strict=True):
        run(folder, arguments, training_arguments)


def run(folder: RunFolder, arguments: DraftArguments, training_arguments: ConFuTrainingArguments) -> None:
    """One run, from its last checkpoint if it was interrupted; nothing if it is finished."""
    if folder.finished:
        say(f"Stage {training_arguments.stage}: finished, in {folder.path}")
        return
    checkpoint = training_arguments.resume_from_checkpoint or folder.last_checkpoint()
    AcceleratorState._reset_state()  # which would keep the precision of the stage before
    beginning = f"continues from {checkpoint}" if checkpoint else "starts"
    say(f"Stage {training_arguments.stage}: {beginning}, to {folder.path}")

    if arguments.target == "demo" and training_arguments.hub_base_model is None:
        training_arguments.hub_base_model = HUB_ID
    target, tokenizer = load_target_once(
        arguments.target,
        training_arguments.target_dtype,
        training_arguments.device,
        json.dumps(training_arguments.target_device_map),
        training_arguments.shard_target,
    )
    train_dataset, eval_dataset = prepare(arguments, target, tokenizer)
    conditions = {"data": fingerprint_of_dataset(train_dataset), "processes": training_arguments.world_size}
    folder.run_under(conditions, continued=checkpoint is not None)
    # Only now: a new draft is the same, whether the target was loaded just before or is that of an earlier stage.
    set_seed(training_arguments.seed)
    trainer = ConFuTrainer(
        model=draft_to_train(arguments, training_arguments, target, tokenizer, train_dataset),
        target_model=target,
        processing_class=tokenizer,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    if arguments.decoding_prompts > 0 and training_arguments.stage != "warm_up":
        trainer.add_callback(decoding_evaluation(trainer, arguments))
    # Only now: options that were refused so far may be set right in the same folder.
    write_record(folder, finished=False)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # an evaluation that fails does not cost the training
    if eval_dataset is not None:
        say(trainer.evaluate())
    if training_arguments.push_to_hub:
        trainer.push_to_hub()  # its card tells of the evaluation
    write_record(folder, finished=True)


def recipe_of(arguments: DraftArguments, training_arguments: ConFuTrainingArguments) -> dict[str, Any]:
    """What the outcome of a run depends on, by name."""
    added = [name for name in ConFuTrainingArguments.__annotations__ if name not in _NOT_IN_RECIPE]
    ours = {name: getattr(training_arguments, name) for name in (*added, *_OPTIMISATION)}
    of_draft = asdict(arguments)
    if arguments.draft is None:
        of_draft |= form_of_new_draft(of_draft)
    else:
        of_draft = {name: value for name, value in of_draft.items() if name not in NEW_DRAFT}
    recipe = {name: value for name, value in of_draft.items() if name not in _NOT_IN_RECIPE} | ours
    return {name: getattr(value, "value", value) for name, value in recipe.items()}  # enums


def write_record(folder: RunFolder, finished: bool) -> None:
    state = PartialState()
    state.wait_for_everyone()  # others may still read
    if state.is_main_process:
        folder.write(finished)


def say(message: object) -> None:
    if PartialState().is_main_process:
        print(message, flush=True)


_loaded_target: dict[tuple[Any, ...], tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}


def load_target_once(
    name: str, dtype: str, device: torch.device, device_map: str, sharded: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The target and its tokenizer, shared by stages that follow each other and use it alike.

    Args:
        name, dtype, device: As of `load_frozen_target`.
        device_map: As JSON, to be a key.
        sharded: Whether it will be sharded, which happens in place: a whole one is then another.
    """
    key = (name, dtype, device, device_map, sharded)
    if key not in _loaded_target:
        _loaded_target.clear()  # there may be no room for two
        gc.collect()  # of trainers, which hold it in cycles
        tokenizer = AutoTokenizer.from_pretrained(demo_target_path() if name == "demo" else name)
        _loaded_target[key] = load_frozen_target(name, dtype, device, json.loads(device_map)), tokenizer
    return _loaded_target[key]


def prepare(
    arguments: DraftArguments, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and rows held out, spread evenly over the data."""
    rows = chain.from_iterable(map(load_rows, arguments.data))
    report = DatasetReport()
    dataset = prepare_dataset(
        rows,
        tokenizer,
        arguments.max_length,
        eos_token_ids=end_token_ids(target) or None,
        vocab_size=target.config.get_text_config(decoder=True).vocab_size,
        report=report,
    )
    say(report)
    step = max(1, len(dataset) // max(1, arguments.eval_rows))
    held_out = range(0, len(dataset), step)[: arguments.eval_rows]
    train_rows = sorted(set(range(len(dataset))) - set(held_out))
    if not train_rows:
        raise ValueError(
            f"All {len(dataset)} rows are held out by `eval_rows={arguments.eval_rows}`; lower it or give more data."
        )
    return dataset.select(train_rows), dataset.select(held_out) if len(held_out) else None


def draft_to_train(
    arguments: DraftArguments,
    training_arguments: ConFuTrainingArguments,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
) -> ConFuDraftModel:
    """The given draft or a new one, with the knobs of decoding that the stage leaves it with."""
    stage = training_arguments.stage
    if arguments.draft is None:
        draft = new_draft(target, tokenizer, dataset, arguments)
        if stage == "core":  # its channel stays untrained, as that of a converted draft is
            draft.generation_config.confu_contemplation = 0
    else:
        draft = load_draft(arguments.draft, torch.float32)
        check_form(draft, arguments)
        if stage != "core" and is_channel_untrained(draft):  # of a converted draft, or one that stage core made
            size = draft.config.num_soft_prompts
            start_future_channel(draft, target, instruction_ids(tokenizer, arguments.instruction, size))
    if stage != "warm_up":
        # Steps beyond those it is trained for get worse.
        draft.generation_config.confu_depth = training_arguments.ttt_steps
    return draft


def check_form(draft: ConFuDraftModel, arguments: DraftArguments) -> None:
    """ValueError where options of a new draft ask for another form than that of the draft to continue from."""
    config = draft.config
    has: dict[str, Any] = {name: getattr(config, name, None) for name in NEW_DRAFT}
    # The two mixtures may differ in a draft that this command did not make.
    experts = {config.num_contemplate_experts, config.num_future_experts}
    has["num_experts"] = experts.pop() if len(experts) == 1 else sorted(experts)
    for name, value in has.items():
        if (asked := getattr(arguments, name)) is not None and asked != value:
            raise ValueError(
                f"`{name}` is {asked}, and {arguments.draft}, the draft to continue from, has {value}: it is an "
                "option of new drafts. Leave it out, or leave `draft` out for a new one."
            )


def new_draft(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, arguments: DraftArguments
) -> ConFuDraftModel:
    """A draft warm-started from the target, with a vocabulary by frequency in the answers."""
    form = form_of_new_draft(vars(arguments))
    vocabulary = build_draft_vocabulary(
        count_assistant_tokens(dataset, target.config.get_text_config(decoder=True).vocab_size),
        form["draft_vocab_size"],
        always_include=end_token_ids(target),
    )
    say(f"Draft vocabulary: {form['draft_vocab_size']} tokens, {vocabulary.coverage:.1%} of the answers' tokens")
    config = ConFuConfig.from_target(target.config, **config_of_form(form))
    ids = instruction_ids(tokenizer, arguments.instruction, config.num_soft_prompts)
    return warm_start(target, vocabulary.token_ids, config, soft_prompt_ids=ids)


def form_of_new_draft(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `NEW_DRAFT`, as asked for or by default."""
    return {name: default if options.get(name) is None else options[name] for name, default in NEW_DRAFT.items()}


def config_of_form(form: dict[str, Any]) -> dict[str, Any]:
    """Fields of [`ConFuConfig`] for the options of a new draft, those of `NEW_DRAFT`."""
    experts = form["num_experts"]
    return {name: value for name, value in form.items() if name != "num_experts"} | {
        "num_contemplate_experts": experts,
        "num_contemplate_experts_per_token": min(2, experts),
        "num_future_experts": experts,
        "num_future_experts_per_token": min(2, experts),
    }


def instruction_ids(
    tokenizer: PreTrainedTokenizerBase, instruction: str, num_soft_prompts: int
) -> torch.LongTensor | None:
    """Tokens of the instruction, cut or repeated to one for each soft prompt; `None` for an empty one."""
    if not instruction or num_soft_prompts == 0:
        return None
    ids = torch.tensor(tokenizer(instruction, add_special_tokens=False)["input_ids"])
    return ids.repeat(-(-num_soft_prompts // len(ids)))[:num_soft_prompts]


def decoding_evaluation(trainer: ConFuTrainer, arguments: DraftArguments) -> DecodingEvaluation:
    """Decodes the prompts of the first held-out rows."""
    if trainer.eval_dataset is None:
        raise ValueError("`decoding_prompts` are those of held-out rows; raise `eval_rows`.")
    rows = trainer.eval_dataset.select(range(min(arguments.decoding_prompts, len(trainer.eval_dataset))))
    prompts = [row["input_ids"][: _prompt_length(row["labels"])] for row in rows]
    knobs = arguments.decoding_knobs
    knobs = json_option("decoding_knobs", knobs) if isinstance(knobs, str) else dict(knobs or {})
    if trainer.args.stage == "core":
        knobs.setdefault("confu_contemplation", 0)
    return DecodingEvaluation(trainer, prompts, arguments.decoding_tokens, **knobs)


def _prompt_length(labels: list[int]) -> int:
    return max(1, next(index for index, label in enumerate(labels) if label != IGNORE_INDEX))
