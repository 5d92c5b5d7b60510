"""
What the examples share: a target, its tokenizer and a draft for it.

By default SmolLM2-135M-Instruct and the draft of this repository. With `--tiny` all three are made up on the spot: the
text is noise, but every line of an example runs within seconds and without a download.
"""

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchEncoding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)

from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.common import loading


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def example_arguments(description: str) -> argparse.ArgumentParser:
    """The parser of an example; add to it what the example needs besides."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tiny", action="store_true", help="use tiny random models: a few seconds, no download")
    return parser


def load_target(tiny: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A target and its tokenizer. Any model of `docs/targets.md` could stand here."""
    device = loading.default_device()
    if tiny:
        return tiny_target().to(device), tiny_tokenizer()
    return loading.load_target("demo", loading.default_dtype(device), device)


def load_draft(target: PreTrainedModel, tiny: bool) -> ConFuDraftModel:
    """A draft made for that target."""
    if tiny:
        torch.manual_seed(0)
        draft = ConFuDraftModel(ConFuConfig.from_target(target.config)).eval()
    else:
        draft = loading.load_decoding_draft(loading.default_draft(), target)
    return draft.to(target.device)


def chat_inputs(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> BatchEncoding:
    """One user turn, as `target.generate` takes it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(target.device)


def tiny_target() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,  # much larger than usual, or the random model would repeat one token
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, and the two marks of a chat."""
    marks = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(marks + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        bos_token=marks[0],
        eos_token=marks[1],
        pad_token=marks[1],
        chat_template=CHAT_TEMPLATE,
    )
