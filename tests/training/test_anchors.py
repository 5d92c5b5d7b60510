"""Where training contemplates: properties of the sampled anchors, over generated texts, against a naive rule."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_confu.training.anchors import Anchors, AnchorSampling
from transformers_confu.training.batch import draft_rows


def make_labels(*turns: tuple[int, int], length: int | None = None) -> torch.LongTensor:
    """Labels of one text, `(1, length)`, from turns of (prompt tokens, answer tokens), padded on the right."""
    labels = [label for prompt, answer in turns for label in [-100] * prompt + [7] * answer]
    return torch.tensor([labels + [-100] * ((length or len(labels)) - len(labels))])


def naive_rows(labels: torch.LongTensor) -> list[int]:
    """The rows of one text whose next two tokens belong to an answer."""
    labels = labels.tolist()
    return [i for i in range(len(labels) - 2) if labels[i + 1] != -100 and labels[i + 2] != -100]


def starts(rows: list[int]) -> dict[int, int]:
    """For each row the first row of its run: the last prompt token of its answer."""
    start_of: dict[int, int] = {}
    for row in rows:
        start_of[row] = start_of.get(row - 1, row)
    return start_of


def sampled(labels: torch.LongTensor, replication: int, max_lag: int, seed: int) -> Anchors:
    return AnchorSampling(replication, max_lag, seed).draw(labels, range(len(labels)))


# At least one token is always the prompt's: rows start at the last prompt token.
turn = st.tuples(st.integers(1, 4), st.integers(0, 25))
text = st.lists(turn, min_size=1, max_size=4)


@st.composite
def batches(draw) -> torch.LongTensor:
    texts = draw(st.lists(text, min_size=1, max_size=3))
    length = max(sum(map(sum, turns)) for turns in texts) + draw(st.integers(0, 3))
    return torch.cat([make_labels(*turns, length=length) for turns in texts])


@given(batches())
@settings(derandomize=True, deadline=None)
def test_draft_rows_are_those_with_two_answer_tokens_ahead(labels):
    assert [row.nonzero()[:, 0].tolist() for row in draft_rows(labels)] == [naive_rows(text) for text in labels]


@given(batches(), st.integers(0, 6), st.integers(1, 7), st.integers(0, 2**31))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_anchors_keep_the_rules_of_decoding(labels, replication, max_lag, seed):
    anchors = sampled(labels, replication, max_lag, seed)
    for number, text in enumerate(labels):
        rows = naive_rows(text)
        start_of = starts(rows)
        served = anchors.of_row[number]
        # Padding of the anchors stands behind the real ones, which rise: the first position that does not ends them.
        positions = anchors.positions[number].tolist()
        routed_by = anchors.routed_by[number].tolist()
        rising = [n for n in range(1, len(positions)) if positions[n] <= positions[n - 1]]
        count = rising[0] if rising else len(positions)
        if not rows:
            count = 0
        positions, routed_by = positions[:count], routed_by[:count]

        assert set(positions) <= set(rows)
        assert set(start_of.values()) <= set(positions), "the last prompt token of an answer is always an anchor"
        for position, origin in zip(positions, routed_by, strict=True):
            start = start_of[position]
            if position == start:
                assert origin == position
            else:
                assert max(start, position - max_lag) <= origin <= position - 1

        for row in range(labels.shape[1]):
            nearest = max((p for p in positions if p <= row and start_of.get(row) == start_of[p]), default=None)
            if nearest is None or row - nearest > replication:
                assert served[row] == -1
            else:
                assert positions[served[row]] == nearest

        # One anchor in each block of rows, but for a last block that is not full.
        for start in set(start_of.values()):
            run = [row for row in rows if start_of[row] == start]
            for first in range(start, run[-1] + 1, replication + 1):
                block = [row for row in run if first <= row <= first + replication]
                drawn = [position for position in positions if position in block and position != start]
                assert len(drawn) <= 1
                if first > start and len(block) == replication + 1:
                    assert len(drawn) == 1


def test_lags_and_anchors_are_uniform():
    labels = make_labels((3, 400))
    lags, offsets = [], []
    for seed in range(50):
        anchors = sampled(labels, replication=3, max_lag=5, seed=seed)
        inner = anchors.positions[0] > 10  # where the answer's beginning cuts no lag
        lags.append((anchors.positions - anchors.routed_by)[0, inner])
        offsets.append((anchors.positions[0, inner] - 2) % 4)
    for values, expected in ((torch.cat(lags), {1, 2, 3, 4, 5}), (torch.cat(offsets), {0, 1, 2, 3})):
        numbers, counts = values.unique(return_counts=True)
        assert set(numbers.tolist()) == expected
        # About 5,000 draws: a tenth of the mean is more than three standard deviations.
        assert ((counts / counts.float().mean() - 1).abs() < 0.1).all()


def test_anchors_of_a_row_follow_from_seed_step_and_row_alone():
    text = make_labels((3, 50))
    sampling = AnchorSampling(replication=4, max_lag=6, seed=1)
    state = torch.get_rng_state()
    together = sampling.draw(text.expand(3, -1), [5, 2, 9], step=7)
    alone = sampling.draw(text, [2], step=7)
    assert torch.equal(torch.get_rng_state(), state)
    count = int(alone.exists.sum())
    assert torch.equal(together.positions[1, :count], alone.positions[0])
    assert torch.equal(together.routed_by[1, :count], alone.routed_by[0])
    assert torch.equal(together.of_row[1], alone.of_row[0])
    others = [sampling.draw(text, [3], 7), sampling.draw(text, [2], 8), AnchorSampling(4, 6, 2).draw(text, [2], 7)]
    assert all(other.positions.tolist() != alone.positions.tolist() for other in others)
