"""Questions to ask a tiny target, and its tokenizer."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


LETTERS = "abcdefghi"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["abcdef", "gab"]},
    {"question_id": 91, "category": "math", "turns": ["ihgfedcba"]},
    {"question_id": 201, "category": "qa", "turns": ["acegi"]},
    {"question_id": 203, "category": "qa", "turns": ["bdfhb"]},
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens: characters and pairs of them; the chat template writes one turn behind the other."""
    tokens = ["<s>", "</s>", *LETTERS, *(a + b for a in LETTERS for b in LETTERS)]
    vocabulary = {token: index for index, token in enumerate(tokens)} | {f"<{i}>": i for i in range(len(tokens), 97)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}a{{ message['content'] }}{% endfor %}b"
    return tokenizer
