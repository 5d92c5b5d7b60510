"""The proposing side of decoding: keeps the draft's state for one text and grows trees from it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import CandidateGenerator
from transformers.utils import ModelOutput

from .cached_rows import crop, filled_layers
from .draft_tree import DraftTree, TreeGrower
from .fixed_cache import FixedRoom, keep_rows
from .growing_cache import let_grow
from .knobs import ConFuKnobs
from .rounds import EqualRounds, FixedRounds, Rounds
from .sampling_noise import DraftNoise
from .target import additive_mask, concatenated, input_device, position_table_size


# Attention leans on what stands first in a text, whatever it says: a window keeps it (StreamingLLM, arXiv 2309.17453).
NUM_FIRST = 4


@dataclass
class TrueRows:
    r"""
    Draft rows made from the target's own hidden states: row i pairs the feature at i with the token at i + 1.

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(batch, rows, hidden_size)`): Embeddings of the next tokens.
        taps (`torch.FloatTensor` of shape `(batch, rows, taps_size)`).
        position_ids (`torch.LongTensor` of shape `(batch, rows)`): Positions of the taps.
    """

    inputs_embeds: torch.Tensor
    taps: torch.Tensor
    position_ids: torch.LongTensor

    def padded(self, count: int) -> "TrueRows":
        """`count` rows: these, and the newest as often as need be."""
        rows = torch.arange(count, device=self.taps.device).clamp(max=self.taps.shape[1] - 1)
        return TrueRows(*(states[:, rows] for states in vars(self).values()))


@dataclass
class CarriedState:
    r"""
    What the draft knows of a text, carried on the target's returned cache to the next call.

    Args:
        draft_id (`str`): Which draft it belongs to.
        length (`int`): Rows in the target's cache, all of which the draft has seen.
        last_key (`torch.FloatTensor`): The newest key of the target's last layer that has any, which depends on the
            whole text: a cache of the same length may hold another one by now.
        cache ([`DynamicCache`]): The draft's own keys and values: a row for every cached token but the newest.
        last_taps (`torch.FloatTensor` of shape `(batch, 1, taps_size)`), last_position (`torch.LongTensor` of shape
            `(batch, 1)`): The newest cached token, whose draft row waits for the token that follows.
    """

    draft_id: str
    length: int
    last_key: torch.Tensor
    cache: DynamicCache
    last_taps: torch.Tensor
    last_position: torch.LongTensor

    @staticmethod
    def take_from(target_cache: DynamicCache) -> "CarriedState | None":
        """Remove and return the state that a cache carries."""
        return target_cache.__dict__.pop("confu_state", None)

    def put_on(self, target_cache: DynamicCache) -> None:
        target_cache.confu_state = self

    def fits(self, draft_id: str, target_cache: DynamicCache) -> bool:
        return (
            self.draft_id == draft_id
            and self.length == target_cache.get_seq_length()
            and torch.equal(self.last_key, filled_layers(target_cache)[-1].keys[..., -1, :])
        )


class ConFuCandidateGenerator(CandidateGenerator):
    r"""
    Proposes continuations of one text with a ConFu draft.

    The ConFu loop asks for trees: [`~ConFuCandidateGenerator.observe`] what the target computed, then
    [`~ConFuCandidateGenerator.propose`]. In Transformers' own assisted-decoding loop, which carries neither trees nor
    contemplate rows, [`~ConFuCandidateGenerator.get_candidates`] proposes a chain in EAGLE-3 mode: greedy ids are
    those of plain `generate`, sampled ones follow the same law with other draws.

    ```python
    >>> target._get_candidate_generator = lambda **kwargs: ConFuCandidateGenerator(draft, target)
    >>> target.generate(**inputs, prompt_lookup_num_tokens=1)  # any option that selects the assisted loop
    ```

    Args:
        draft ([`ConFuDraftModel`]): The draft.
        target ([`PreTrainedModel`]): The target; its input embeddings are called where the draft has none of its own.
        depth (`int`): Length of the chains that [`~ConFuCandidateGenerator.get_candidates`] proposes.
    """

    requires_model_outputs = True

    def __init__(self, draft: PreTrainedModel, target: PreTrainedModel, depth: int = 4):
        self.draft = draft
        self.chain = FixedRounds(ConFuKnobs(tree_size=depth + 1, depth=depth, branching=1))
        self.model_kwargs_overrides = {"output_hidden_states": list(draft.config.target_hidden_state_indices)}
        if draft.embed_tokens is None:
            self._embed, self._embed_device = target.get_input_embeddings(), input_device(target)
        else:
            self._embed, self._embed_device = draft.embed_tokens, draft.device
        self._token_ids = draft.draft_token_ids
        self._num_positions = position_table_size(target)
        self._cache = DynamicCache(config=draft.config)
        self._pending: list[TrueRows] = []
        self._fixed: FixedRoom | None = None

    def embed(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Token ids of any shape -> embeddings on the draft's device and dtype."""
        return self._embed(token_ids.to(self._embed_device)).to(self.draft.device, self.draft.dtype)

    def observe(self, inputs_embeds: torch.Tensor, taps: torch.Tensor, position_ids: torch.LongTensor) -> None:
        """Note new true rows (see [`TrueRows`]). Costs nothing until the next proposal."""
        if taps.shape[1] > 0:
            self._pending.append(TrueRows(inputs_embeds, taps, position_ids.to(self.draft.device)))

    @property
    def cache(self) -> DynamicCache:
        """Keys and values of the true rows stored so far."""
        return self._cache

    def propose(
        self,
        root_tokens: torch.LongTensor,
        rounds: Rounds,
        max_depth: int,
        future_states: torch.Tensor | None,
        noise: DraftNoise | None = None,
    ) -> DraftTree:
        r"""
        A tree below `root_tokens`, whose draft rows must have been observed.

        Args:
            root_tokens (`torch.LongTensor` of shape `(batch,)`): The newest emitted tokens.
            rounds ([`Rounds`]): How deep, how wide and how large the tree is.
            max_depth (`int`): Longest path at most, whatever `rounds` says.
            future_states (`torch.FloatTensor` of shape `(batch, future_size)`, *optional*): The future prediction f;
                without it the draft runs in EAGLE-3 mode.
            noise ([`DraftNoise`], *optional*): What the coming tokens are drawn with; without it the tree holds what
                is likely before that is known.
        """
        root_tokens = root_tokens.to(self._token_ids.device)
        if self._fixed is not None:
            max_depth = sys.maxsize  # all trees have one shape
        length = self._cache.get_seq_length() + sum(row.taps.shape[1] for row in self._pending)
        depth = rounds.depth(length, max_depth)
        if depth < 1:
            rounds.tree_size(None)
            tree = DraftTree.root_only(root_tokens)
            return tree.with_path(*rounds.copies(tree))

        rows = self._take_pending()
        if self._fixed is None:
            tree = self._grow(root_tokens, rows, None, future_states, rounds, depth, noise)
        else:
            count = rows.taps.shape[1]
            lengths = torch.tensor([self._fixed.length, count], device=root_tokens.device)
            rows = rows.padded(self._fixed.most_kept)
            all_noise = None if noise is None else torch.stack([noise[level] for level in range(depth)])
            tree = self._compiled_grow(root_tokens, rows, lengths, future_states, rounds, depth, all_noise)
            self._fixed.length += count
        return tree.with_path(*rounds.copies(tree))

    def _grow(
        self,
        root_tokens: torch.LongTensor,
        rows: TrueRows,
        lengths: torch.LongTensor | None,
        future_states: torch.Tensor | None,
        rounds: Rounds,
        depth: int,
        noise: DraftNoise | torch.Tensor | None,
    ) -> DraftTree:
        """
        Store true rows and grow a tree behind the last of them. In a room of fixed shape there are `lengths` `(2,)`:
        how many rows of the text there are, and how many of the given ones are not just copies of the newest.
        """
        # The newest row stands last, and sees the first of its copies in its own place, as the rows below it do.
        if lengths is None:
            num_true_rows = self._cache.get_seq_length() + rows.taps.shape[1]
            seen = torch.ones(1, num_true_rows, dtype=torch.bool, device=rows.taps.device)
        else:
            seen = self._fixed.seen(lengths)
        window = self.draft.config.attention_window
        is_whole = lengths is None and (window is None or num_true_rows <= NUM_FIRST + window)
        if window is not None:
            seen = within_window(seen, window)
        last_taps, last_position = rows.taps[:, -1], rows.position_ids[:, -1:]
        future = None
        if future_states is not None:
            future = self.draft.future(future_states[:, None], self.draft.fuse_taps(last_taps)[:, None])
        output = self._extend(rows, future, None if is_whole else seen)
        grower = TreeGrower(log_chances(output.logits[:, -1], noise, level=0), rounds.branching, self._token_ids)
        features = output.features
        for level in range(1, depth):
            width = rounds.width(grower)
            if width == 0:
                break
            grower.narrow(width)
            parents = grower.frontier_parents[..., None].expand(-1, -1, features.shape[-1])
            output = self.draft(
                inputs_embeds=self.embed(grower.frontier_tokens),
                features=features.gather(1, parents),
                position_ids=(last_position + level).expand_as(grower.frontier_tokens),
                attention_mask=self._tree_mask(grower.frontier_ancestors, seen),
                cache=self._cache,
                future=future,
            )
            features = output.features
            grower.expand(log_chances(output.logits, noise, level))
        if lengths is None:
            crop(self._cache, num_true_rows)  # drafted features are no true ones
        else:
            keep_rows(self._cache, lengths[:1], torch.arange(rows.taps.shape[1], device=lengths.device))
        return grower.tree(root_tokens, rounds.tree_size(grower))

    @contextmanager
    def fixed_room(self, rounds: EqualRounds, compiled: Callable[[Callable], Callable]) -> Iterator[None]:
        """Keep the draft's rows in a [`FixedRoom`] for a while, and compile what grows trees."""
        if len(self._pending) > 1:
            newest = self._pending.pop()
            self._extend(self._take_pending())
            self._pending = [newest]
        if not self._cache.layers[0].is_initialized:  # a text of one token
            shape = (1, self.draft.config.num_key_value_heads, 0, self.draft.config.head_dim)
            nothing = torch.empty(shape, device=self.draft.device, dtype=self.draft.dtype)
            self._cache.update(nothing, nothing, 0)
        new_rows = rounds.longest_path * (1 + rounds.branching)
        self._compiled_grow = compiled(self._grow)
        with FixedRoom(self._cache, rounds.capacity, rounds.longest_path, new_rows, compiled) as self._fixed:
            yield

    def _take_pending(self) -> TrueRows:
        rows, self._pending = self._pending, []
        return TrueRows(
            *(torch.cat(states, dim=1) for states in zip(*(vars(row).values() for row in rows), strict=True))
        )

    def _extend(self, rows: TrueRows, future: Any = None, seen: torch.BoolTensor | None = None):
        """Store true rows; output of the newest, which sees all of them, or `seen`, and starts the tree."""
        is_first = self._cache.get_seq_length() == 0
        output = self.draft(
            inputs_embeds=rows.inputs_embeds,
            features=self.draft.fuse_taps(rows.taps),
            position_ids=rows.position_ids,
            attention_mask=None if seen is None else additive_mask(seen[:, None], like=self.draft.norm.weight),
            cache=self._cache,
            future=future,
            num_queries=1,
        )
        if is_first:
            let_grow(self._cache)
        return output

    def _tree_mask(self, ancestors: torch.BoolTensor, seen: torch.BoolTensor) -> torch.Tensor:
        """Frontier rows `(B, k, drafted rows)` -> additive mask `(B, 1, k, true + drafted rows)`."""
        seen = seen[:, None].expand(-1, ancestors.shape[1], -1)
        return additive_mask(torch.cat([seen, ancestors], dim=-1), like=self.draft.norm.weight)

    def restore(self, state: CarriedState, next_embeds: torch.Tensor) -> None:
        """Continue from a carried state; `next_embeds` `(B, 1, H)` embeds the token after the newest cached one."""
        self._cache = state.cache
        self.observe(next_embeds, state.last_taps, state.last_position)

    def carried_state(
        self, target_cache: DynamicCache, last_taps: torch.Tensor, last_position: torch.LongTensor
    ) -> CarriedState:
        """The state to put on `target_cache`, whose newest token has these taps and position (see the fields)."""
        if self._pending:
            self._extend(self._take_pending())
        return CarriedState(
            draft_id=self.draft.instance_id,
            length=target_cache.get_seq_length(),
            last_key=filled_layers(target_cache)[-1].keys[..., -1, :].clone(),
            cache=self._cache,
            last_taps=last_taps,
            last_position=last_position,
        )

    # Transformers' own assisted-decoding loop.

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        model_outputs: ModelOutput | None,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, None]:
        """A chain of tokens behind `input_ids` `(1, length)`; no logits, so they are only matched."""
        if is_first_iteration:
            return input_ids, None  # the first forward is the prefill, which yields the first taps
        indices = self.draft.config.target_hidden_state_indices
        taps = concatenated(model_outputs.hidden_states, indices, like=self.draft.norm.weight)
        is_prefill = not self._pending and self._cache.get_seq_length() == 0
        num_rows = taps.shape[1] if is_prefill else n_last_matches + 1
        next_tokens, position_ids = input_ids[:, -num_rows:], model_kwargs["position_ids"][:, -num_rows - 1 : -1]
        taps = taps[:, :num_rows]
        if (attention_mask := model_kwargs.get("attention_mask")) is not None:
            real = attention_mask[0, -num_rows - 1 : -1].bool()
            next_tokens, position_ids = next_tokens[:, real], position_ids[:, real]
            taps = taps[:, real.to(taps.device)]
        self.observe(self.embed(next_tokens), taps, position_ids)
        max_depth = self.chain.knobs.depth
        if self._num_positions is not None:  # the root stands at the position behind the newest true row
            max_depth = min(max_depth, self._num_positions - 2 - int(self._pending[-1].position_ids[0, -1]))
        chain = self.propose(input_ids[:, -1], self.chain, max_depth, future_states=None)
        return torch.cat([input_ids, chain.tokens[:, 1:].to(input_ids.device)], dim=-1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """The chain's length is fixed."""


def within_window(seen: torch.BoolTensor, window: int) -> torch.BoolTensor:
    """Of the rows that are `seen` `(1, rows)`, in the text's order, the first few and the newest `window`."""
    rank = seen.cumsum(dim=-1)
    return seen & ((rank <= NUM_FIRST) | (rank > rank[:, -1:] - window))


def log_chances(logits: torch.Tensor, noise: DraftNoise | torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
    """
    Of each of the draft's tokens to come `level` tokens behind the root, from its logits `(..., Vd)`: what the draft
    says, or what it says in view of the noise that the token will be drawn with.

    In float32: in half precision a child can tie with its parent far more often.
    """
    return torch.log_softmax(logits if noise is None else logits - noise[level], dim=-1, dtype=torch.float32)
