"""
How well a draft's contemplation foresees, near the start of a text and far into it.

The draft reads the future through the target: a contemplate row behind token i says, by the target's own head, what
token i + 2 may be. Here rows of training data are put behind one another as turns of long conversations, and the share
of right first choices is printed by the position of token i.

    python examples/foresight.py runs/warm_up --data answers.jsonl.gz
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from _targets import example_arguments, load_draft, load_target
from transformers import PreTrainedTokenizerBase

from transformers_confu import ConFuDraftModel
from transformers_confu.common.loading import default_device
from transformers_confu.data import load_rows, prepare_dataset
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments


def conversations(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[dict[str, Any]]:
    """Conversations of at least `length` tokens, each of rows with `prompt` and `answer`."""
    messages: list[dict[str, str]] = []
    for row in rows:
        messages += [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        if len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]) >= length:
            yield {"messages": messages}
            messages = []


parser = example_arguments(__doc__)
parser.formatter_class = argparse.RawDescriptionHelpFormatter
parser.add_argument("drafts", nargs="*", help="folders or Hub ids; the draft of this repository if there are none")
parser.add_argument("--data", required=True, help="rows with `prompt` and `answer`, as `confu data regenerate` writes")
parser.add_argument("--length", type=int, default=4096, help="tokens of a conversation")
parser.add_argument("--conversations", type=int, default=8)
arguments = parser.parse_args()
target, tokenizer = load_target(arguments.tiny)
texts = list(islice(conversations(load_rows(arguments.data), tokenizer, arguments.length), arguments.conversations))
dataset = prepare_dataset(texts, tokenizer, arguments.length, vocab_size=target.vocab_size)

for name in arguments.drafts or [None]:
    draft = load_draft(target, arguments.tiny) if name is None else ConFuDraftModel.from_pretrained(name)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ConFuTrainer(
            model=draft.float(),
            target_model=target,
            args=ConFuTrainingArguments(
                output_dir=folder, stage="warm_up", tokens_per_batch=1, use_cpu=default_device() == "cpu"
            ),
            eval_dataset=dataset,
        )
        metrics = trainer.evaluate()
    print(name or "draft of this repository")
    for key, value in metrics.items():
        if key.startswith(("eval_accuracy_to", "eval_accuracy_beyond")):
            print(f"  {key.removeprefix('eval_')}: {value:.1%}")
