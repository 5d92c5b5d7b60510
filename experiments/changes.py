"""Point 2 of issue 20: changes of the recipe that were not tried, each alone against the default.

    python experiments/changes.py --output runs/changes --steps 150

Arms: default; muon, muon-high (Muon for the matrices inside of the draft, at AdamW's rate and at twice that);
head-64, head-128 (a head of that rank over the whole vocabulary); vocabulary-16384 (a cut one four times the default's
4,096); roots (only the rows and steps that decoding would come to, by rounds of the draft as it is); guesses (roots
whose round ended in an error are replayed on the draft's own guesses, beside the default's loss).
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
