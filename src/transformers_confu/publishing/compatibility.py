"""Does a draft fit a target? `confu check TARGET DRAFT`."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from ..common.loading import checkpoint, load_target_config, load_tokenizer, refusals
from ..common.sentences import some
from ..common.vocabulary_map import check_vocabulary_map
from ..inference.checks import check_cached_heads, check_target
from ..inference.configuration_confu import SPECIAL_TOKENS, ConFuConfig
from ..inference.knobs import ConFuKnobs
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.round_costs import kept_costs


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit: an error if the two cannot work together; else they do, perhaps not well."""

    is_error: bool
    sentence: str  # what was found, what was expected, and what to do

    def __str__(self) -> str:
        return f"{'error' if self.is_error else 'warning'}: {self.sentence}"


wrong, doubtful = partial(Finding, True), partial(Finding, False)


def check_compatibility(
    target: str | Path | PreTrainedConfig | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draft: str | Path | ConFuDraftModel,
    trust_remote_code: bool = False,
) -> list[Finding]:
    r"""
    Compare a draft with a target, whose weights are not needed and not read.

    Args:
        target: A folder or Hub id, a configuration, or a model. Of a model its way of loading is checked too:
            attention implementation, adapters, parallelism.
        tokenizer: The target's. Compared with the draft's, if `draft` is a folder or Hub id that holds one.
        draft: A folder or Hub id, whose files are checked too, or a model.

    Returns:
        What does not fit, errors first; an empty list if all is well.
    """
    if not isinstance(target, PreTrainedModel):
        target = load_target_config(target, trust_remote_code)
    model, findings = (draft, []) if isinstance(draft, ConFuDraftModel) else _load_draft(draft)
    if tokenizer is not None:
        findings += _check_template(tokenizer)
        if model is not draft:
            findings += _check_tokenizers(draft, tokenizer)
    if model is not None:
        findings += _check_draft(model)
        findings += _check_target(target, model.config, trust_remote_code)
        findings += _check_tokens(load_target_config(target), model, tokenizer)
    return sorted(findings, key=lambda finding: not finding.is_error)


def _load_draft(draft: str | Path) -> tuple[ConFuDraftModel | None, list[Finding]]:
    """The draft of a folder or repository, and what is wrong with its files."""
    try:
        with refusals(draft, "draft"):
            model, info = ConFuDraftModel.from_pretrained(
                draft, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except ValueError as error:
        return None, [wrong(str(error))]
    # Drafts that predict every token may come without a map.
    optional = {"d2t", "t2d"} if model.config.draft_vocab_size == model.config.vocab_size else set()
    sentences = []
    if missing := set(info["missing_keys"]) - optional:
        sentences.append(f"{draft} lacks the weights {some(missing)}; save the draft again.")
    if unexpected := set(info["unexpected_keys"]):
        sentences.append(f"{draft} holds the weights {some(unexpected)}, for which its config has no use.")
    if mismatched := info["mismatched_keys"]:
        shapes = [f"{name} is {tuple(found)}, expected {tuple(expected)}" for name, found, expected in mismatched]
        sentences.append(f"The weights in {draft} have other shapes than its config says: {'; '.join(shapes[:6])}.")
    return (None if sentences else model), [wrong(sentence) for sentence in sentences]


def _check_draft(draft: ConFuDraftModel) -> Iterator[Finding]:
    """What a draft contradicts by itself."""
    try:
        check_vocabulary_map(draft.d2t, draft.t2d, draft.config.vocab_size)
    except ValueError as error:
        yield wrong(str(error))
    broken = [name for name, weight in draft.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        yield wrong(f"The draft's {some(broken)} hold numbers that are not finite; train or save it again.")
    try:
        ConFuKnobs.resolve(draft.generation_config)
    except (ValueError, TypeError) as error:
        yield wrong(f"The draft's generation config: {error}")


def _check_target(
    target: PreTrainedConfig | PreTrainedModel, config: ConFuConfig, trust_remote_code: bool
) -> Iterator[Finding]:
    """The kind and sizes of a target."""
    target_config = load_target_config(target)
    try:
        if not isinstance(target, PreTrainedModel):
            target = _without_weights(target_config, trust_remote_code)
        check_target(target, config)
        wanted = ConFuConfig.from_target(target_config, num_soft_prompts=config.num_soft_prompts)
        if config.num_soft_prompts > 0:
            heads = (wanted.target_num_key_value_heads, wanted.target_head_dim)
            check_cached_heads(heads, heads, config)
    except ValueError as error:
        yield wrong(str(error))
        found = target_config.get_text_config(decoder=True).vocab_size
        if found != config.vocab_size:
            yield wrong(
                f"If only the embeddings of the draft's target were resized, so that ids 0 to "
                f"{min(found, config.vocab_size) - 1} mean what they did, carry the draft over: `confu convert resize "
                f"DRAFT --vocab_size {found} --output NEW`."
            )
        return
    if config.max_position_embeddings < wanted.max_position_embeddings:
        yield doubtful(
            f"The draft's `max_position_embeddings` is {config.max_position_embeddings}, the target's "
            f"{wanted.max_position_embeddings}; raise the draft's, as engines that size tables by it draft nonsense "
            "beyond."
        )


def _without_weights(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model of this configuration on the meta device, which takes no memory."""
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        # A model of text and images goes by another class, or asks for libraries that read images; its text model
        # decodes here.
        except (ValueError, ImportError) as error:
            text_config = config.get_text_config(decoder=True)
            if text_config is config:
                raise ValueError(
                    f"A target with a {type(config).__name__} is no decoder-only language model that Transformers "
                    "knows; ConFu drafts for these only."
                ) from error
            return AutoModelForCausalLM.from_config(text_config)


def _check_tokens(
    target_config: PreTrainedConfig, draft: ConFuDraftModel, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Finding]:
    """Special tokens, and the largest id."""
    target_config = target_config.get_text_config(decoder=True)
    for name in SPECIAL_TOKENS:
        ours, theirs = getattr(draft.config, name), getattr(target_config, name, None)
        if ours != theirs:
            yield doubtful(
                f"The draft's `{name}` is {ours}, the target's {theirs}; `generate` follows the target's. Copy it "
                "into the draft's config if the two belong together."
            )
    ends = target_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    if ends and not any(bool(draft.t2d[token]) for token in ends if 0 <= token < len(draft.t2d)):
        yield doubtful(
            f"The target's `eos_token_id` {ends} is not in the draft's vocabulary, so every answer ends with a round "
            "that the draft fails; train with a draft vocabulary that includes it."
        )
    if tokenizer is not None and (largest := max(tokenizer.get_vocab().values())) >= draft.config.vocab_size:
        yield wrong(
            f"The tokenizer has token ids up to {largest}, but draft and target know 0.."
            f"{draft.config.vocab_size - 1}; use the target's own tokenizer, before tokens were added."
        )


def _check_template(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether the text of a rendered conversation has the ids of the conversation."""
    if tokenizer.chat_template is None:
        return
    messages = [{"role": "user", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    except Exception as error:  # a template can raise anything
        yield doubtful(f"The chat template cannot write a conversation of one turn ({error}).")
        return
    if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        yield doubtful(
            "The tokenizer gives other ids to the text of a rendered conversation than to the conversation; take ids "
            "from `apply_chat_template(tokenize=True)`, never from its text."
        )


def _check_tokenizers(draft: str | Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Compare the tokenizer in the draft's folder, if there is one, with the target's."""
    try:
        if cached_file(draft, TOKENIZER_CONFIG_FILE, _raise_exceptions_for_missing_entries=False) is None:
            return
        # Given a config, Transformers does not read the draft's, and so asks nobody whether to run its code.
        drafts = AutoTokenizer.from_pretrained(draft, config=PreTrainedConfig())
    except (OSError, ValueError) as error:
        yield doubtful(f"The tokenizer in {draft} cannot be loaded ({error}).")
        return
    ours, theirs = drafts.get_vocab(), tokenizer.get_vocab()
    if differ := {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}:
        yield wrong(
            f"The tokenizer in {draft} gives {len(differ)} tokens other ids than the target's ({some(differ, 3)}): "
            "the draft was trained for another vocabulary; use the target named in its card."
        )
    if drafts.chat_template != tokenizer.chat_template:
        yield doubtful(
            f"The chat template in {draft} is not the target's: the draft was trained on dialogues of another form "
            "and may accept less."
        )


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status: 0 if the two fit, 1 if not."""
    parser = ArgumentParser(
        description="Say whether a draft fits a target, and what to do if not. Only the target's configuration and "
        "tokenizer are read; a target of any size is checked in seconds."
    )
    parser.add_argument("target", help="folder or Hub id of the target, or 'demo'")
    parser.add_argument("draft", help="folder or Hub id of the ConFu draft")
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run the code that comes with the target's configuration and tokenizer; read it first",
    )
    arguments = parser.parse_args(argv)
    config = load_target_config(arguments.target, arguments.trust_remote_code)
    tokenizer = None
    if cached_file(checkpoint(arguments.target), TOKENIZER_CONFIG_FILE, _raise_exceptions_for_missing_entries=False):
        tokenizer = load_tokenizer(arguments.target, arguments.trust_remote_code)
    else:
        print(f"{arguments.target} has no tokenizer; tokenizers are not compared.", file=sys.stderr)
    findings = check_compatibility(config, tokenizer, arguments.draft, arguments.trust_remote_code)
    for finding in findings:
        print(finding)
    if any(finding.is_error for finding in findings):
        print(f"{arguments.draft} does not fit {arguments.target}.")
        return 1
    print(f"{arguments.draft} fits {arguments.target}.")
    for path, key, costs in kept_costs(checkpoint(arguments.target), arguments.draft):
        print(f"\nRounds of {key['target'][2][0]} on {key['device'][0]}, {key['threads']} threads, by {path}")
        print(f"(delete that file to have them measured anew): {costs}.")
    return 0
