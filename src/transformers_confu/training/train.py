"""The training command: `confu train run.yaml`, or with options, which may also follow a file; `--help` lists them.

A YAML file describes one run or several stages, see [`~option_files.read_option_file`]. A run whose `output_dir` holds
a finished run of the same options is skipped, an interrupted one continues from its last whole checkpoint.

In several processes: `torchrun --nproc_per_node 2 -m transformers_confu.cli train run.yaml`, on CPUs with `--use_cpu
true` besides. Tested with two processes on the CPU (gloo); on several GPUs it has not run yet, on one it has.
"""

import difflib
import sys
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..common.answer_text import end_token_ids
from ..common.demo_target import HUB_ID
from ..common.loading import default_dtype, load_draft, load_target
from ..common.option_files import json_option, option, read_option_file
from ..data.dataset import HELD_OUT_SHARE, DatasetReport, prepare_dataset, split_by_prompt
from ..data.fingerprints import fingerprint_of_dataset, fingerprint_of_target
from ..data.vocabulary import build_draft_vocabulary, count_assistant_tokens
from ..inference.configuration_confu import ConFuConfig
from ..inference.modeling_confu import ConFuDraftModel
from ..publishing.model_card import CARD_FILE, CardFacts
from ..publishing.publish import named
from .arguments import ConFuTrainingArguments
from .initialisation import is_channel_untrained, start_future_channel, warm_start
from .run_folder import RunFolder
from .trainer import ConFuTrainer


@dataclass
class DraftArguments:
    """Target, data and draft of a training run."""

    target: str = option("Target: a Hub id, a folder, or 'demo' for SmolLM2-135M-Instruct.", ...)
    data: list[str] = option(
        "Rows that `prepare_dataset` reads: JSONL files, folders, Hub datasets (`id:split`).", ...
    )
    target_dtype: str = option(
        "Dtype of the frozen target; bfloat16 where the hardware computes in it.", default_dtype
    )
    device_map: str | None = option(
        "Spread a large target over devices, memory and disk: auto, balanced, or JSON of module to device; else it "
        "lies on this process's device."
    )
    trust_remote_code: bool = option("Run the code that comes with the target's checkpoint; read it first.", False)
    draft: str | None = option(
        "Draft to continue from, for the first of several stages; a new one, started from the target, if not given."
    )
    draft_vocab_size: int | None = option("Target tokens that a new draft can predict; 8192.")
    draft_config: dict | str | None = option(
        "Other entries of a new draft's `ConFuConfig`, as JSON, such as num_soft_prompts, rotate_soft_prompts, "
        "num_contemplate_experts, fc_norm, norm_output and attention_window (`max_length` by default)."
    )
    instruction: str = option(
        "Text whose keys and values a new draft's soft prompts start from, cut or repeated to fit; random ones if "
        "empty.",
        "Think ahead: what will the assistant say after the coming word? The next words of the answer are",
    )
    max_length: int = option("Longest row, in tokens; longer ones are cut.", 512)
    allow_other_target: bool = option(
        "Train also on answers that say they were made by another target, or by this one in another dtype.", False
    )
    held_out_share: float = option(
        "Share of the prompts that are held out for evaluation, chosen by their hash: the same in every stage.",
        HELD_OUT_SHARE,
    )
    eval_rows: int = option("Held-out rows to evaluate on, at most; 0 holds out nothing.", 64)

    def __post_init__(self):
        if isinstance(self.draft_config, str):
            self.draft_config = json_option("draft_config", self.draft_config)
        names = {entry.name for entry in fields(ConFuConfig)} - {"draft_vocab_size"}  # which is an option of its own
        for name in self.draft_config or {}:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"`draft_config` names `{name}`, which is no entry of a ConFuConfig to be set there; did you "
                    f"mean `{nearest}`?"
                )

    @property
    def form(self) -> dict[str, Any]:
        """What is asked of the draft's configuration."""
        form: Any = self.draft_config or {}
        return form if self.draft_vocab_size is None else form | {"draft_vocab_size": self.draft_vocab_size}


DRAFT_VOCAB_SIZE = 8192

# Options of `TrainingArguments` that the outcome of a run depends on, besides what ConFu adds.
_OPTIMISATION = (
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "seed", "bf16", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_epsilon", "lr_scheduler_kwargs", "load_best_model_at_end"),
)
# And of ours, and of those whose default ConFu changes, the ones that it does not.
_WITHOUT_OUTCOME = {
    *("logging_steps", "remove_unused_columns", "ddp_broadcast_buffers", "include_num_input_tokens_seen"),
    *("device_map", "trust_remote_code"),
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
    if any(training.save_only_model for _, training in runs):
        raise ValueError(
            "`save_only_model` leaves checkpoints that an interrupted run cannot go on from; leave it out, and limit "
            "their number by `save_total_limit`."
        )
    folders = [RunFolder(training.output_dir, outcome_of(arguments, training)) for arguments, training in runs]
    for folder, (arguments, training) in zip(folders, runs, strict=True):
        run(folder, arguments, training)
    # Before Python ends: a thread of gloo that lets go of its last tensor later than that aborts its process.
    PartialState().destroy_process_group()


def outcome_of(arguments: DraftArguments, training: ConFuTrainingArguments) -> dict[str, Any]:
    """What the outcome of a run depends on, by name."""
    names = [*ConFuTrainingArguments.__annotations__, *_OPTIMISATION]
    options = asdict(arguments) | {name: getattr(training, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in options.items() if name not in _WITHOUT_OUTCOME}


def run(folder: RunFolder, arguments: DraftArguments, training: ConFuTrainingArguments) -> None:
    """One run, from its last checkpoint if it was interrupted; nothing if it is finished."""
    if folder.finished:
        say(f"Stage {training.stage}: finished, in {folder.path}")
        return
    checkpoint = training.resume_from_checkpoint or folder.last_checkpoint()
    AcceleratorState._reset_state()  # which would keep the precision of the stage before
    say(f"Stage {training.stage}: {f'continues from {checkpoint}' if checkpoint else 'starts'}, to {folder.path}")

    how = (arguments.target_dtype, training.device, arguments.device_map, arguments.trust_remote_code)
    target, tokenizer = load_target_once(arguments.target, *how)
    train_dataset, eval_dataset = prepare(arguments, training, target, tokenizer)
    conditions = {"data": fingerprint_of_dataset(train_dataset), "processes": training.world_size}
    folder.run_under(conditions, continued=checkpoint is not None)
    # Only now: a new draft is the same, whether the target was loaded just before or is that of an earlier stage.
    set_seed(training.seed)
    trainer = ConFuTrainer(
        model=draft_of_run(arguments, training, target, tokenizer, train_dataset),
        target_model=target,
        processing_class=tokenizer,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    # Only now: options that were refused so far may be set right in the same folder.
    write_record(folder, finished=False)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # an evaluation that fails does not cost the training
    if eval_dataset is not None:
        say(trainer.evaluate())
    if training.should_save:
        write_card_facts(trainer, arguments)
    write_record(folder, finished=True)


def write_record(folder: RunFolder, finished: bool) -> None:
    """By one process, when all have come here: all have read the folder before it is written."""
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        folder.write(finished)


def write_card_facts(trainer: ConFuTrainer, arguments: DraftArguments) -> None:
    """What `confu publish` will want to know of the training, and of that of the draft it went on from."""
    args, path = trainer.args, Path(trainer.args.output_dir, CARD_FILE)
    if path.exists():  # written by hand
        return
    tokens = args.tokens_per_batch * args.gradient_accumulation_steps * args.world_size
    facts = CardFacts(
        training=f"Stage `{args.stage}`: {trainer.state.global_step:,} steps of up to {tokens:,} tokens, "
        f"{args.ttt_steps} TTT steps, l = {args.replication}, learning rate "
        f"{args.learning_rate:g}, seed {args.seed}."
    )
    if evaluations := [entry for entry in trainer.state.log_history if "eval_tau_greedy" in entry]:
        names = [name for name in ("tau_greedy", "tau_probabilistic") if f"eval_{name}" in evaluations[-1]]
        figures = ", ".join(f"`{name}` {evaluations[-1][f'eval_{name}']:.3f}" for name in names)
        facts.evaluation = f"Teacher-forced on held-out rows at step {evaluations[-1]['step']:,}: {figures}."
    if arguments.draft is not None and (before := Path(arguments.draft, CARD_FILE)).exists():
        facts.training = f"{CardFacts.load(before).training.strip()} {facts.training}"
    named(facts, HUB_ID if arguments.target == "demo" else arguments.target).save(path)


def say(what: Any) -> None:
    """Print, in one process of several."""
    PartialState().print(what)


@lru_cache(maxsize=1)
def load_target_once(
    name: str, dtype: str, device: torch.device, device_map: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """[`load_target`], shared by stages that follow each other and use it alike."""
    return load_target(name, dtype, device, device_map, trust_remote_code, few_rows=False)


def prepare(
    arguments: DraftArguments,
    training: ConFuTrainingArguments,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and at most `eval_rows` held-out rows: those of the prompts that every stage holds out."""
    report = DatasetReport()
    with training.main_process_first(desc="preparing the data"):  # the others find it in the cache
        dataset = prepare_dataset(
            arguments.data,
            tokenizer,
            arguments.max_length,
            vocab_size=target.config.get_text_config(decoder=True).vocab_size,
            made_by=None if arguments.allow_other_target else fingerprint_of_target(target, torch.bfloat16),
            report=report,
        )
    say(report)
    return split_by_prompt(dataset, arguments.held_out_share if arguments.eval_rows else 0, arguments.eval_rows)


def draft_of_run(
    arguments: DraftArguments,
    training: ConFuTrainingArguments,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
) -> ConFuDraftModel:
    """The given draft or a new one; a new one of stage core decodes without its untrained channel."""
    if arguments.draft is None:
        draft = new_draft(target, tokenizer, dataset, arguments)
        if training.stage == "core":  # its channel stays untrained, as that of a converted draft is
            draft.generation_config.confu_contemplation = 0
        return draft
    draft = load_draft(arguments.draft, torch.float32)
    for name, asked in arguments.form.items():
        if asked != (found := getattr(draft.config, name)):
            raise ValueError(
                f"`{name}` is {asked}, and {arguments.draft}, the draft to continue from, has {found}: it is an "
                "option of new drafts. Leave it out, or leave `draft` out for a new one."
            )
    if training.stage != "core" and is_channel_untrained(draft):  # of a converted draft, or one of stage core
        size = draft.config.num_soft_prompts
        start_future_channel(draft, target, instruction_ids(tokenizer, arguments.instruction, size))
    return draft


def new_draft(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, arguments: DraftArguments
) -> ConFuDraftModel:
    """A draft warm-started from the target, with a vocabulary by frequency in the answers."""
    fc_norm = not arguments.form.get("norm_before_fc", False)
    form = {"draft_vocab_size": DRAFT_VOCAB_SIZE, "fc_norm": fc_norm, "norm_output": True}
    form |= {"attention_window": arguments.max_length} | arguments.form  # no further than it has been trained
    config = ConFuConfig.from_target(target.config, **form)
    vocabulary = build_draft_vocabulary(
        count_assistant_tokens(dataset, target.config.get_text_config(decoder=True).vocab_size),
        config.draft_vocab_size,
        always_include=end_token_ids(target),
    )
    say(f"Draft vocabulary: {config.draft_vocab_size} tokens, {vocabulary.coverage:.1%} of the answers' tokens")
    ids = instruction_ids(tokenizer, arguments.instruction, config.num_soft_prompts)
    return warm_start(target, vocabulary.token_ids, config, soft_prompt_ids=ids)


def instruction_ids(
    tokenizer: PreTrainedTokenizerBase, instruction: str, num_soft_prompts: int
) -> torch.LongTensor | None:
    """Tokens of the instruction, cut or repeated to one for each soft prompt; `None` for an empty one."""
    if not instruction or num_soft_prompts == 0:
        return None
    ids = torch.tensor(tokenizer(instruction, add_special_tokens=False)["input_ids"])
    return ids.repeat(-(-num_soft_prompts // len(ids)))[:num_soft_prompts]
