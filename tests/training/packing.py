"""Reference data for "packed equals unpacked": the same rows as one packed batch and one by one."""

import torch

from transformers_confu.training.batching import ConFuDataCollator


def packed_and_single_batches(
    vocab_size: int = 97, lengths: tuple[int, ...] = (23, 7, 15, 31, 9, 12), packed_length: int = 40, seed: int = 0
) -> tuple[dict[str, torch.Tensor], list[tuple[dict[str, torch.Tensor], int, slice]]]:
    """
    Rows of random ids, each a prompt of about a third of it and an answer.

    Returns:
        The packed batch of the collator, and for each row `(batch, sequence, span)`: the row alone as a batch
        `[1, length]`, and where the packed batch holds it. So `packed["input_ids"][sequence, span]` equals
        `batch["input_ids"][0]`, and whatever is computed of the two should be equal as well.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    packed = ConFuDataCollator(packed_length=packed_length)(rows)
    assert len(packed["input_ids"]) < len(rows)
    singles = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        places = [
            (sequence, slice(start, start + len(ids)))
            for sequence, packed_ids in enumerate(packed["input_ids"])
            for start in range(len(packed_ids) - len(ids) + 1)
            if torch.equal(packed_ids[start : start + len(ids)], ids)
        ]
        assert len(places) == 1
        singles.append((ConFuDataCollator()([row]), *places[0]))
    return packed, singles


def may_see(document_ids: torch.LongTensor) -> torch.BoolTensor:
    """Which token (row) may look at which (column), `(B, T, T)`, by the rule of `ConFuDataCollator`, written out."""
    batch, length = document_ids.shape
    sees = torch.zeros(batch, length, length, dtype=torch.bool)
    for sequence in range(batch):
        for query in range(length):
            for key in range(query + 1):
                same = document_ids[sequence, query] == document_ids[sequence, key]
                sees[sequence, query, key] = bool(same) and document_ids[sequence, key] >= 0
    return sees
