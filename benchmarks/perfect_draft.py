"""
What a perfect draft would reach: tau with trees drawn up by the target itself, which knows its own distribution.

Sampled answers are open: beyond a point no draft can foresee them, and tau is to be read against that. Each question
is answered once by plain `generate` at the temperature; along the answer, rounds follow each other as in decoding. A
round counts as the tokens that its tree can expect to emit: 1 and the probabilities of its drafted paths. (At
temperature 0 a perfect draft is always right, and tau is the depth + 1.)

    OMP_NUM_THREADS=1 python benchmarks/perfect_draft.py questions.jsonl
"""

import argparse
import copy

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, set_seed

from transformers_confu.common.loading import default_dtype, load_target
from transformers_confu.evaluation.questions import load_questions, stratified
from transformers_confu.inference.draft_tree import DraftTree, TreeGrower


def perfect_tree(
    target: PreTrainedModel,
    text: torch.LongTensor,
    cache: DynamicCache,
    temperature: float,
    size: int,
    depth: int,
    branching: int,
) -> DraftTree:
    """
    The best tree behind `text` `(1, T)`, of which `cache` holds all but the last tokens; afterwards it holds them all.
    Levels of the tree are batches of texts, each behind a copy of the cache.
    """

    def log_probs(ids: torch.LongTensor, cache: DynamicCache) -> torch.Tensor:
        logits = target(ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return (logits.float() / temperature).log_softmax(dim=-1)

    root = text[:, -1]
    grower = TreeGrower(
        log_probs(text[:, cache.get_seq_length() :], cache), branching, torch.arange(target.config.vocab_size)
    )
    paths = grower.frontier_tokens[0, :, None]
    for _ in range(1, depth):
        behind = copy.deepcopy(cache)
        behind.batch_repeat_interleave(len(paths))
        grower.expand(log_probs(paths, behind)[None])
        paths = torch.cat([paths[grower.frontier_parents[0]], grower.frontier_tokens[0, :, None]], dim=1)
    return grower.tree(root, size)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Tau with trees drawn up by the target itself.")
    parser.add_argument("questions", help="as of `confu evaluate`; the first turn of each is asked")
    parser.add_argument("--num_per_group", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--tree_sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--branching", type=int, default=10)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    target, tokenizer = load_target("demo", default_dtype(), "cpu")
    questions = stratified(load_questions(options.questions), options.num_per_group)
    shape = options.depth, options.branching
    for temperature in options.temperatures:
        answers = []  # of each: its text and the length of its prompt
        for question in questions:
            set_seed(0)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question.turns[0]}],
                add_generation_prompt=True, return_tensors="pt", return_dict=True,
            )  # fmt: skip
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            text = target.generate(**prompt, **sampling, max_new_tokens=options.max_new_tokens)
            answers.append((text, prompt["input_ids"].shape[1]))
        for size in options.tree_sizes:
            counted = []  # of each answer: expected tokens, rounds
            for text, end in tqdm(answers, desc=f"T = {temperature:g}, {size} nodes", leave=False):
                cache, expected, rounds = DynamicCache(), 0.0, 0
                while end + 1 < text.shape[1]:
                    end += 1  # the root is known
                    tree = perfect_tree(target, text[:, :end], cache, temperature, size, *shape)
                    expected, rounds = expected + float(tree.log_probs.exp().sum()), rounds + 1
                    children, node = tree.children()[0], 0
                    while end < text.shape[1] and (node := children.get((node, int(text[0, end])), 0)):
                        end += 1
                counted.append((expected, rounds))
            tokens, rounds = np.array(counted).T
            draws = np.random.default_rng(0).integers(len(counted), size=(2000, len(counted)))
            low, high = np.quantile(tokens[draws].sum(axis=1) / rounds[draws].sum(axis=1), [0.025, 0.975])
            print(
                f"T = {temperature:g}, {size} nodes: tau {tokens.sum() / rounds.sum():.2f} ({low:.2f} to {high:.2f})"
            )


if __name__ == "__main__":
    main()
