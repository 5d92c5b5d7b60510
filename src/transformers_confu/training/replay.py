"""Rounds that the current draft would have decoded on a text, and replay of those that ended in an error.

Texts are the target's own, and a round of a chain stops at its first refused guess, behind which the text goes on. So
a text and the draft's choices on it are all that its rounds follow from: no decoding is needed, and they are always
those of the draft as it is now. A replayed row is a root whose round ended in a refusal. It runs on the draft's own
guesses in place of the text, and the target, which reads the same guesses, teaches each step (Draft-OPD, arXiv
2605.29343). Up to the refusal it is the row that training has seen already; what is new is what follows a wrong guess.
"""

from types import SimpleNamespace

import torch
from torch import nn

from ..inference.modeling_confu import ConFuDraftModel
from ..inference.soft_prompts import SlotCache
from ..inference.target import TargetRunner
from .batch import TokenBatch, padded_index
from .teacher import Teaching, teach
from .unroll import unroll


def rounds(
    rows: torch.LongTensor, exists: torch.BoolTensor, right: torch.BoolTensor
) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """Roots among rows `(B, R)`, and how many guesses a round accepts; `right` `(S, B, R)` says which guesses hold."""
    accepted = right.cumprod(dim=0).sum(dim=0)
    is_root = torch.zeros_like(exists)
    for text, (places, real, lengths) in enumerate(
        zip(rows.tolist(), exists.tolist(), accepted.tolist(), strict=True)
    ):
        next_root = -1
        for number, place in enumerate(places):
            if real[number] and place >= next_root:
                is_root[text, number] = True
                next_root = place + lengths[number] + 1
    return is_root, accepted


def spread(mask: torch.BoolTensor, most: int) -> torch.BoolTensor:
    """At most so many of the true entries, evenly."""
    chosen = mask.flatten().nonzero()[:, 0]
    chosen = chosen[:: max(1, -(-len(chosen) // most))]
    return torch.zeros_like(mask).flatten().index_fill(0, chosen, True).view_as(mask)


def follow_guesses(
    draft: ConFuDraftModel,
    runner: TargetRunner,
    batch: TokenBatch,
    teaching: Teaching,
    cache,
    roots: torch.BoolTensor,
    num_steps: int,
) -> tuple[torch.Tensor, torch.LongTensor, torch.BoolTensor, Teaching]:
    """Outputs `(S, B * R, H)` of roots `(B, T)` that run on their own guesses, and who teaches them, `(S, B * R)`."""
    rows, exists = padded_index(roots)
    embed, guesses = draft.embed_tokens or runner.embed, []

    def embedded(ids: torch.LongTensor) -> torch.Tensor:
        return embed(ids).to(draft.device, draft.dtype)

    @torch.no_grad()
    def propose(outputs: torch.Tensor) -> torch.Tensor:
        scores = draft.lm_head(draft.head_down(draft.norm(outputs)))
        guesses.append(draft.draft_token_ids[scores.max(dim=-1).indices])
        return embedded(guesses[-1])

    steps = unroll(
        draft,
        embedded(batch.input_ids),
        draft.fuse_taps(teaching.taps),
        batch.position_ids,
        sees=batch.sees(rows),
        rows=rows,
        future_states=None,
        has_future=None,
        num_steps=num_steps,
        propose=propose,
    )
    outputs = torch.stack(list(steps)).flatten(1, 2)

    ids = torch.stack(guesses, dim=-1)  # (B, R, S - 1)
    chain = torch.arange(1, num_steps, device=rows.device)
    positions = (rows[..., None] + 1 + chain).flatten(1)
    itself = torch.kron(torch.eye(rows.shape[1]), torch.ones(num_steps - 1, num_steps - 1).tril()).bool()
    itself = itself.to(rows.device).expand(len(rows), -1, -1)
    with torch.no_grad(), torch.autocast(device_type=rows.device.type, enabled=False):
        inputs = runner.row_inputs(ids.flatten(1))
        logits = runner.forward(
            **inputs,
            attention_mask=runner._masks(
                cache,
                batch.sees(rows + 1).repeat_interleave(num_steps - 1, dim=1),
                itself,
                itself.new_zeros(*itself.shape[:2], 0),
                positions,
                like=inputs["inputs_embeds"],
            ),
            position_ids=positions,
            cache=SlotCache(cache, SimpleNamespace(soft_prompts=torch.empty(0)), keep=False),
            use_cache=True,
            **runner.asked_of_all,
        ).logits
    behind = teach(draft, teaching.taps, logits.flatten(0, 1))
    known = len(teaching.best_tokens)
    numbers = known + torch.arange(ids.numel(), device=rows.device).view_as(ids)
    teachers = torch.cat([batch.teacher_numbers.gather(1, rows + 1)[..., None], numbers], dim=-1)
    # Nothing follows the end of an answer.
    ends = torch.tensor([-1 if draft.config.eos_token_id is None else draft.config.eos_token_id]).flatten()
    goes_on = nn.functional.pad(~torch.isin(ids, ends.to(ids)), (1, 0), value=True)
    counts = exists[..., None] & goes_on.cumprod(dim=-1).bool()
    both = Teaching(
        teaching.taps,
        *(
            torch.cat([getattr(teaching, name), getattr(behind, name)])
            for name in ("probabilities", "out_of_vocabulary_mass", "entropies", "best_tokens")
        ),
    )
    return outputs, teachers.flatten(0, 1).T.contiguous(), counts.flatten(0, 1).T.contiguous(), both
