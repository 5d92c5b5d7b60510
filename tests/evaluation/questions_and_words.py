"""Questions to ask a tiny target, and its tokenizer."""

from transformers import PreTrainedTokenizerFast

from helpers import letter_tokenizer


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["abcdef", "gab"]},
    {"question_id": 91, "category": "math", "turns": ["ihgfedcba"]},
    {"question_id": 201, "category": "qa", "turns": ["acegi"]},
    {"question_id": 203, "category": "qa", "turns": ["bdfhb"]},
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Its chat template writes one turn behind the other."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}a{{ message['content'] }}{% endfor %}b"
    return tokenizer
