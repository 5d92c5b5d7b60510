"""
Which share of held-out answers a draft vocabulary of each size holds, to choose `draft_vocab_size` by:

    python examples/vocabulary_coverage.py --target demo --data answers.jsonl.gz --sizes 4096 8192 16384

The vocabulary is counted on the other rows, as `confu train` counts it on those it trains on. A token that it lacks is
never drafted: with a share of 98 %, one token in fifty ends its round whatever the draft has learnt. Sampled answers
hold rarer tokens than greedy ones, so answers are told apart by the `temperature` of their rows.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain

from datasets import concatenate_datasets
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from transformers_confu.common.demo_target import demo_target_path
from transformers_confu.data import build_draft_vocabulary, count_assistant_tokens, load_rows, prepare_dataset


@dataclass
class CoverageArguments:
    target: str = field(metadata={"help": "Target: a Hub id, a folder, or 'demo'. Only its tokenizer is loaded."})
    data: list[str] = field(metadata={"help": "Answers, as for `confu train`."})
    sizes: list[int] = field(
        default_factory=lambda: [2048, 4096, 8192, 16384, 32768], metadata={"help": "Sizes of the vocabulary."}
    )
    held_out_every: int = field(default=10, metadata={"help": "One row in so many is held out."})
    max_length: int = field(default=2048, metadata={"help": "Longest row, in tokens."})


def main() -> None:
    (arguments,) = HfArgumentParser(CoverageArguments, description=__doc__).parse_args_into_dataclasses()
    path = demo_target_path() if arguments.target == "demo" else arguments.target
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = AutoConfig.from_pretrained(path).get_text_config(decoder=True)
    rows = defaultdict(list)
    for row in chain.from_iterable(map(load_rows, arguments.data)):
        rows[row.get("temperature")].append(row)
    held_out, others = {}, []
    for temperature, group in rows.items():
        dataset = prepare_dataset(group, tokenizer, arguments.max_length, vocab_size=config.vocab_size)
        chosen = range(0, len(dataset), arguments.held_out_every)
        name = "all" if temperature is None else f"temperature {temperature:g}"
        held_out[name] = count_assistant_tokens(dataset.select(chosen), config.vocab_size)
        others.append(dataset.select(sorted(set(range(len(dataset))) - set(chosen))))
    counts = count_assistant_tokens(concatenate_datasets(others), config.vocab_size)

    tokens = [f"{name}, {int(of_answers.sum()):,} tokens" for name, of_answers in sorted(held_out.items())]
    print(f"Counted on {int(counts.sum()):,} tokens of answers, of which {int((counts > 0).sum()):,} different.\n")
    print("| size | " + " | ".join(tokens) + " |")
    print("|---|" + "---|" * len(tokens))
    for size in arguments.sizes:
        token_ids = build_draft_vocabulary(counts, size).token_ids
        shares = [of_answers[token_ids].sum() / of_answers.sum() for _, of_answers in sorted(held_out.items())]
        print(f"| {size} | " + " | ".join(f"{share:.2%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
