"""Arms that differ by a few options of `confu train`: trained on equal rows, order and seed, counted on equal answers.

Everything resumes: a finished training or evaluation is skipped, an interrupted training goes on from its checkpoint.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from transformers_confu.common.loading import default_dtype, load_draft, load_target
from transformers_confu.data.dataset import prepare_dataset, split_by_prompt
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training import train
from transformers_confu.training.anchors import AnchorSampling
from transformers_confu.training.batch import ConFuDataCollator, TokenBatch
from transformers_confu.training.checks import check_dataset
from transformers_confu.training.objective import Recipe, compute_live
from transformers_confu.training.teacher import freeze


DEPTHS = 6  # counted


def main(arms: dict[str, list[str]], description: str) -> None:
    """The command of a group of arms, the first of which is what the others are compared with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of drafts, logs and counts")
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms), metavar="ARM")
    parser.add_argument("--target", default="demo")
    parser.add_argument("--data", default="hub_cards/smollm2-135m-instruct-answers")
    parser.add_argument("--steps", type=int, required=True, help="of training")
    parser.add_argument("--ttt_steps", type=int, default=4)
    parser.add_argument("--tokens_per_batch", type=int, default=2048)
    parser.add_argument("--max_length", type=int, default=768)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--save_steps", type=int, default=25)
    parser.add_argument("--answers", type=int, default=160, help="held-out rows that are counted")
    # Twice as many prompts as training usually holds out, for narrower intervals.
    parser.add_argument("--held_out_share", type=float, default=0.04)
    parser.add_argument("--compare", action="store_true", help="only print the table of what was counted")
    args, more = parser.parse_known_args()
    output, counts_of = Path(args.output), {}
    for arm in args.arms:
        file = output / arm / "counts.json"
        if not args.compare:
            start = time.process_time()
            train.main([*options(args, output / arm), *arms[arm], *more])
            print(f"{arm}: trained in {time.process_time() - start:.0f} s of processors", flush=True)
            start = time.process_time()
            if not file.exists():
                file.write_text(json.dumps(evaluate(output / arm, args)))
            print(f"{arm}: counted in {time.process_time() - start:.0f} s of processors", flush=True)
        if file.exists():
            counts_of |= {name.replace("draft", arm): counts for name, counts in json.loads(file.read_text()).items()}
            print(
                table({name: counts for name, counts in counts_of.items() if not name.endswith(", foresight")}),
                flush=True,
            )
    for name, counts in counts_of.items():
        if name.endswith(", foresight"):
            counted, correct = np.array(list(counts.values())).sum(axis=0)
            print(f"{name}: {', '.join(f'{share:.3f}' for share in correct / counted)}")


def options(args: argparse.Namespace, folder: Path) -> list[str]:
    """Of `confu train`, for all arms."""
    values = {
        "target": args.target,
        "data": args.data,
        "output_dir": folder,
        "max_length": args.max_length,
        "tokens_per_batch": args.tokens_per_batch,
        "ttt_steps": args.ttt_steps,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "warmup_steps": 5,
        "seed": args.seed,
        "bf16": default_dtype("cpu" if not torch.cuda.is_available() else "cuda") == "bfloat16",
        "held_out_share": args.held_out_share,
        "eval_rows": 1,  # all held-out prompts stay out of training; they are counted below
        "logging_steps": 5,
        "save_steps": args.save_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@torch.no_grad()
def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """
    Of each held-out answer: rows that count at each depth, rows that are right so far, chances to be accepted so far;
    also with the channel off, and how often each of the ordered contemplate rows foresees.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, tokenizer = load_target(args.target, default_dtype(device), device, few_rows=False)
    target, draft = freeze(target), load_draft(folder, torch.float32).to(device)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    dataset = prepare_dataset(args.data, tokenizer, args.max_length, vocab_size=draft.config.vocab_size)
    _, held_out = split_by_prompt(dataset, args.held_out_share, args.answers)
    held_out = check_dataset(held_out, target, "held out", 1)
    has_channel = json.loads((folder / "_run.json").read_text())["options"]["stage"] != "core"
    sampling, recipe = AnchorSampling(replication=0, max_lag=DEPTHS + 1), Recipe(DEPTHS, None)
    counts: dict[str, dict[str, list]] = {}
    for number, row in enumerate(held_out):
        batch = ConFuDataCollator()([row])
        batch = TokenBatch.of({name: value.to(device) for name, value in batch.items()})
        anchors = sampling.draw(batch.labels, batch.row_keys)
        for mode in ("draft", "draft, channel off") if has_channel else ("draft",):
            with torch.autocast(device, torch.bfloat16, enabled=default_dtype(device) == "bfloat16"):
                read = anchors if has_channel and mode == "draft" else None
                objective = compute_live(draft, runner, batch, read, recipe)
            key = f"{number}-{row['prompt_hash'][:8]}"
            names = ("counted", "correct_so_far", "accepted_so_far")
            of_row = [[round(count, 3) for count in objective.counts[name].tolist()] for name in names]
            counts.setdefault(mode, {})[key] = of_row
            if objective.foresight is not None:
                foreseen = [objective.foresight[name].tolist() for name in ("counted", "correct")]
                counts.setdefault("draft, foresight", {})[key] = foreseen
    return counts


def table(counts_of: dict[str, dict[str, list]]) -> str:
    """Acceptance by depth of each arm, and its gain over the first: of tau, and of depths 2 to 4 in percent."""
    generator = np.random.default_rng(0)
    columns = ["arm", *(f"depth {depth + 1}" for depth in range(DEPTHS))]
    columns += [f"tau_{kind}, gain, gain at depths 2 to 4 in %" for kind in ("greedy", "probabilistic")]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    first = np.array(list(next(iter(counts_of.values())).values()))  # (answers, 3, depths)
    draws = generator.integers(len(first), size=(4000, len(first)))
    draws = np.concatenate([np.arange(len(first))[None], draws])  # the first is all of them, once

    def of_draws(arm: np.ndarray) -> np.ndarray:
        sums = arm[draws].sum(axis=1)  # (draws, 3, depths)
        return sums[:, 1:] / sums[:, :1].clip(min=1)

    def interval(values: np.ndarray, digits: int) -> str:
        low, high = np.quantile(values[1:], [0.025, 0.975])
        return f"{values[0]:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    base = of_draws(first)
    for name, counts in counts_of.items():
        if list(counts) != list(next(iter(counts_of.values()))):
            raise ValueError(f"{name} was counted on other answers than the first arm.")
        shares = of_draws(np.array(list(counts.values())))
        cells = [name, *(f"{share:.4f}" for share in shares[0, 0])]
        for kind in range(2):
            gain = interval((shares - base)[:, kind].sum(axis=-1), 3)
            later, later_base = (values[:, kind, 1:4].sum(axis=-1) for values in (shares, base))
            in_percent = interval(100 * (later / later_base.clip(min=1e-9) - 1), 1)
            cells.append(f"{1 + shares[0, kind].sum():.3f}, {gain}, {in_percent}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
