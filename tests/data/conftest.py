"""A target of 32 words that answers in no time, and its tokenizer."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import make_tiny_target


WORDS = ["<s>", "</s>", "<unk>", "system", "user", "assistant", *(f"w{index}" for index in range(26))]
TEMPLATE = (
    "{% if tone is defined %}{{ tone }} {% endif %}{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def target() -> LlamaForCausalLM:
    sizes = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = make_tiny_target(bos_token_id=0, eos_token_id=1, **sizes)
    model.config.name_or_path = "tiny"
    model.generation_config.eos_token_id = [1, 9, 11]  # a random target hardly ever ends an answer
    model.generation_config.suppress_tokens = [0, 2, 3, 4, 5]  # nor does a trained one write a template's words
    return model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def prompts() -> list[dict]:
    """20 prompts of 1 to 6 words, the last one as messages, and one that is too long."""
    rows = [
        {"id": f"p{index}", "prompt": " ".join(f"w{(index * 5 + word) % 26}" for word in range(1 + index % 6))}
        for index in range(20)
    ]
    rows[-1]["prompt"] = [{"role": "user", "content": rows[-1]["prompt"]}]
    rows.insert(2, {"id": "long", "prompt": "w1 " * 30})
    return rows
