"""Point 4 of issue 20: forms of the future channel, trained from the start together with the core.

Thirty minutes of one core (which show only gains of some ten per cent, see below):

    python experiments/forms.py --output runs/forms --arms eagle3 read-out ordered paper --steps 60

150 minutes of two cores, half of the arms on each; then the table of all:

    options="--output runs/forms --steps 600 --ttt_steps 6 --held_out_share 0.1 --answers 400"
    taskset -c 0 python experiments/forms.py $options --arms eagle3 ordered &
    taskset -c 1 python experiments/forms.py $options --arms read-out paper &
    python experiments/forms.py $options --compare

Arms: eagle3 (the core alone), read-out (the output is read at the row of `[f]`), ordered (three `[con]` behind each
token, the k-th taught to foresee the token k + 1 places on), ordered-adapters (with adapters of rank 16 besides in the
target's layers for contemplate rows), paper (the paper's form, KL alone), paper-foresight and read-out-foresight (with
the loss of foresight that `ordered` has). At four TTT steps a step of 2,048 tokens took 3.4, 5.5, 8.3, 8.3 and 4.9 s
of a busy core of an EPYC with bf16 instructions for the first five, up to 3.9 GB, and an answer 0.3 to 0.8 s to count.

Of 75 answers, `tau_greedy` of two arms after 200 steps was told apart to 0.037 of some 0.4 and `tau_probabilistic` to
0.009 of 0.3 (docs/experiment.md): 2 % at depths 2 to 4 want hundreds of answers and the probabilities.
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
