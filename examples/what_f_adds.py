"""
Whether a contemplate row knows what the draft does not.

Both guess the same token. A contemplate row behind token i says, by the target's own head, what token i + 2 may be,
without knowing token i + 1; the draft's first step knows token i + 1 and the target's hidden states at i. Printed are
how often each is right, how often the contemplate row is right where the draft is wrong, and how often the draft would
be right if a share of the contemplate row's logarithmic probabilities were added to its own. What the best share gains
is what a future prediction could add at least to the first step; where it gains nothing, there is little to learn.

    python examples/what_f_adds.py runs/core --contemplation runs/warm_up --data answers.jsonl.gz
"""

import argparse
from itertools import islice

import torch
from _targets import example_arguments, load_draft, load_target

from transformers_confu import ConFuDraftModel
from transformers_confu.data import load_rows, prepare_dataset
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training.anchors import sample_anchors
from transformers_confu.training.batch import Texts
from transformers_confu.training.batching import ConFuDataCollator
from transformers_confu.training.objective import contemplate_rows
from transformers_confu.training.teacher import read_texts, teach
from transformers_confu.training.unroll import unroll


SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)

parser = example_arguments(__doc__)
parser.formatter_class = argparse.RawDescriptionHelpFormatter
parser.add_argument("draft", nargs="?", help="folder or Hub id; the draft of this repository if not given")
parser.add_argument("--contemplation", help="draft that soft prompts and [con] are taken from; the draft itself")
parser.add_argument("--data", required=True, help="rows that `prepare_dataset` reads")
parser.add_argument("--rows", type=int, default=20, help="so many rows, spread over the data")
parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row at most")
arguments = parser.parse_args()

target, tokenizer = load_target(arguments.tiny)
draft = (
    load_draft(target, arguments.tiny) if arguments.draft is None else ConFuDraftModel.from_pretrained(arguments.draft)
)
draft = draft.float().to(target.device)
seer = draft
if arguments.contemplation is not None:
    seer = ConFuDraftModel.from_pretrained(arguments.contemplation).float().to(target.device)
runner = TargetRunner(target, seer.config, seer.future_channel)
rows = list(load_rows(arguments.data))
rows = list(islice(rows, 0, None, max(1, len(rows) // arguments.rows)))
dataset = prepare_dataset(rows, tokenizer, arguments.max_length, vocab_size=target.vocab_size)

positions = draft_right = row_right = row_right_alone = 0
mixed_right = dict.fromkeys(SHARES, 0)
collate = ConFuDataCollator(draft.config.pad_token_id)
with torch.no_grad():
    for row in dataset:
        texts = Texts.of({name: tensor.to(target.device) for name, tensor in collate([row]).items()})
        anchors = sample_anchors(texts.labels, replication=0, max_lag=1)  # every draft row is one
        outputs = read_texts(
            runner,
            texts,
            keep_logits=texts.teaching_positions,
            hidden_states=draft.config.target_hidden_state_indices,
            keep_cache=True,
        )
        teaching = teach(draft, runner.taps(outputs.hidden_states).float(), outputs.logits)
        foreseen = runner.foresee(outputs.cache, *contemplate_rows(texts, teaching.taps, anchors))[0].float()  # (R, V)
        drafted_from = texts.draft_rows[0].nonzero().T  # (1, R)
        (hidden_states,) = unroll(
            draft,
            target.get_input_embeddings()(texts.input_ids).float(),
            teaching.taps,
            texts.position_ids,
            sees=texts.sees(drafted_from),
            rows=drafted_from,
            future_states=None,
            has_future=None,
            num_steps=1,
        )
        token_ids = draft.draft_token_ids
        scores = draft.lm_head(draft.norm(hidden_states[0])).log_softmax(dim=-1)  # (R, Vd)
        expected = teaching.best_tokens
        is_draft_right = token_ids[scores.argmax(dim=-1)] == expected
        is_row_right = foreseen.argmax(dim=-1) == expected
        positions += len(expected)
        draft_right += int(is_draft_right.sum())
        row_right += int(is_row_right.sum())
        row_right_alone += int((is_row_right & ~is_draft_right).sum())
        of_row = foreseen.log_softmax(dim=-1)[:, token_ids]
        for share in SHARES:
            mixed_right[share] += int((token_ids[(scores + share * of_row).argmax(dim=-1)] == expected).sum())

print(f"positions: {positions:,}, of {len(dataset)} rows")
print(f"draft right: {draft_right / positions:.1%}")
print(f"contemplate row right: {row_right / positions:.1%}")
print(f"contemplate row right where the draft is wrong: {row_right_alone / max(1, positions - draft_right):.1%}")
for share, right in mixed_right.items():
    print(f"draft right with {share:.0%} of the contemplate row's: {right / positions:.1%}")
