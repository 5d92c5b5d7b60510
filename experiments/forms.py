"""Point 4 of issue 20: forms of the future channel, trained from the start together with the core.

    python experiments/forms.py --output runs/forms --steps 60

Arms: eagle3 (the core alone), read-out (the output is read at the row of `[f]`), ordered (three `[con]` behind each
token, the k-th taught to foresee the token k + 1 places on), ordered-adapters (with adapters of rank 16 besides in the
target's layers for contemplate rows), paper (the paper's form, KL alone), paper-foresight (the same with the loss of
foresight that `ordered` has).
"""

import json

import arms


CORE = ["--stage", "core"]
# Every third row an anchor: at each of the three ordered rows some draft row reads what was foreseen for it.
JOINT = ["--stage", "joint", "--replication", "2"]
FORESIGHT = ["--foresight", "0.5"]


def form(**entries) -> list[str]:
    return ["--draft_vocab_size", "4096", "--draft_config", json.dumps(entries)]


ARMS = {
    "eagle3": CORE + form(),
    "read-out": JOINT + form(future_readout=True, use_future_residual=False),
    "ordered": JOINT + FORESIGHT + form(num_contemplate_rows=3),
    "paper": JOINT + form(),
    "paper-foresight": JOINT + FORESIGHT + form(),
    "read-out-foresight": JOINT + FORESIGHT + form(future_readout=True, use_future_residual=False),
    "ordered-adapters": JOINT + FORESIGHT + form(num_contemplate_rows=3, contemplate_adapter_rank=16),
}

if __name__ == "__main__":
    arms.main(ARMS, __doc__)
