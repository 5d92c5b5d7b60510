r"""Point 2 of issue 20: changes of the recipe that were not tried, each alone against the default.

Thirty minutes of one core:

    python experiments/changes.py --output runs/changes --steps 120 \
        --arms default muon muon-high roots head-64 vocabulary-16384

150 minutes of two cores, half of the arms on each; then the table of all:

    options="--output runs/changes --steps 600 --ttt_steps 6 --held_out_share 0.1 --answers 400"
    taskset -c 0 python experiments/changes.py $options --arms default muon muon-high roots vocabulary-16384 &
    taskset -c 1 python experiments/changes.py $options --arms guesses head-64 head-128 &
    python experiments/changes.py $options --compare

Replay is meant for drafts that learn no more from texts; from the `default` of this run:

    python experiments/changes.py --output runs/replay --steps 200 --arms default roots guesses \
        --draft runs/changes/default --learning_rate 3e-4 --seed 43

Arms: default; muon, muon-high (Muon for the matrices inside of the draft, at AdamW's rate and at twice that);
head-64, head-128 (a head of that rank over the whole vocabulary); vocabulary-16384 (a cut one four times the default's
4,096); roots (only the rows and steps that decoding would come to, by rounds of the draft as it is); guesses (roots
whose round ended in an error are replayed on the draft's own guesses, beside the default's loss). At four TTT steps a
step of 2,048 tokens took 3 s of a busy core of an EPYC with bf16 instructions where the target reads, and where an
earlier arm had it read 1.1 s (default, roots), 1.2 s (Muon), 1.8 s (16,384 tokens), 2.7 and 3.6 s (heads of rank 64,
128), with 3.9 to 4.6 GB; guesses 4 s. Features of a pass over 1.39 million tokens take 5.7 GB in runs/features.
"""

import json

import arms


CUT = ["--draft_vocab_size", "4096"]
# The target reads each row once for all arms; the replay of guesses has it read more.
CORE = ["--stage", "core"]
KEPT = [*CORE, "--feature_cache", "runs/features"]


def head(rank: int) -> list[str]:
    return ["--draft_vocab_size", "49152", "--draft_config", json.dumps({"head_rank": rank})]


ARMS = {
    "default": KEPT + CUT,
    "muon": [*KEPT, *CUT, "--muon", "1.5e-3"],
    "muon-high": [*KEPT, *CUT, "--muon", "3e-3"],
    "head-64": KEPT + head(64),
    "head-128": KEPT + head(128),
    "vocabulary-16384": [*KEPT, "--draft_vocab_size", "16384"],
    "roots": [*KEPT, *CUT, "--on_policy", "roots"],
    "guesses": [*CORE, *CUT, "--on_policy", "guesses", "--replayed", "128"],
}

if __name__ == "__main__":
    arms.main(ARMS, __doc__)
