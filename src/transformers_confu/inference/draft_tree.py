"""The draft tree: which tokens are guessed, and how they hang together. Tensors in, tensors out; no model.

A tree of N nodes counts its root, the newest emitted token. Nodes are stored parents first, the root at index 0.
Shapes: B batch, N nodes, C contemplate rows, k branching, Vd draft vocabulary, P candidates in the pool. The method is
EAGLE-2's (arXiv 2406.16858): expand the k best nodes of each level by cumulative log-probability, then keep the best
of all candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class DraftTree:
    r"""
    Args:
        tokens (`torch.LongTensor` of shape `(batch, nodes)`): Target token ids.
        parents (`torch.LongTensor` of shape `(batch, nodes)`): Index of each node's parent, always a lower index; the
            root is its own parent.
        depths (`torch.LongTensor` of shape `(batch, nodes)`): Distance from the root.
        log_probs (`torch.FloatTensor` of shape `(batch, nodes)`, float32): Log-probability of the path from the root
            under the draft, or as `with_path` was told.
        ancestors (`torch.BoolTensor` of shape `(batch, nodes, nodes)`): `ancestors[b, i, j]`: j is i or above i.
        num_copied (`int`): How many nodes, the last ones, are no guesses of the draft (see [`~DraftTree.with_path`]).
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    depths: torch.LongTensor
    log_probs: torch.FloatTensor
    ancestors: torch.BoolTensor
    num_copied: int = 0

    @property
    def size(self) -> int:
        return self.tokens.shape[1]

    @classmethod
    def from_parents(cls, tokens: torch.LongTensor, parents: torch.LongTensor, log_probs: torch.FloatTensor):
        """A tree from its tokens, parents and path log-probabilities, each `(B, N)`."""
        ancestors = ancestor_closure(parents)
        return cls(tokens, parents, ancestors.sum(dim=-1) - 1, log_probs, ancestors)

    @classmethod
    def root_only(cls, root_tokens: torch.LongTensor) -> "DraftTree":
        """A tree without guesses: plain decoding of `root_tokens` `(B,)`."""
        tokens = root_tokens[:, None]
        return cls.from_parents(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.float32))

    def with_path(self, tokens: Sequence[int], log_probs: Sequence[float]) -> "DraftTree":
        """
        This tree and a path of such tokens below its root, whose log-probabilities are given; only nodes that it lacks
        are new. For a single batch row.
        """
        if not tokens:
            return self
        children = self.children()[0]
        new: list[tuple[int, int, float]] = []  # token, parent, log-probability
        node = 0
        for token, log_prob in zip(tokens, log_probs, strict=True):
            parent, node = node, children.get((node, token), self.size + len(new))
            if node == self.size + len(new):
                new.append((token, parent, log_prob))
        if not new:
            return self
        columns = zip((self.tokens, self.parents, self.log_probs), zip(*new, strict=True), strict=True)
        tree = DraftTree.from_parents(*(torch.cat([old, old.new_tensor([more])], dim=1) for old, more in columns))
        tree.num_copied = len(new)
        return tree

    def children(self) -> list[dict[tuple[int, int], int]]:
        """For each batch row a map (node, token) -> child of that node with that token, to walk the tree by."""
        return [
            {
                (parent, token): node
                for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))
                if node > 0
            }
            for parents, tokens in zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
        ]

    def chance_to_be_last(self) -> torch.FloatTensor:
        """What the draft expects: the probability that a node is accepted and no child of it in the tree, `(B, N)`."""
        probabilities = self.log_probs.exp()
        below_root = probabilities * (self.depths > 0)
        return probabilities - torch.zeros_like(probabilities).scatter_add_(1, self.parents, below_root)

    def contemplated_nodes(self, num_rows: int, max_depth: int | None = None) -> torch.LongTensor:
        r"""
        The nodes that get a contemplate row, `(B, C)`, rising: the root, then those most likely to be accepted last.

        The root is always among them, so that every node has itself or an ancestor to take a future prediction from.
        Nodes deeper than `max_depth` get no row, even if fewer than `num_rows` are left.
        """
        last = self.chance_to_be_last().masked_fill(self.depths == 0, float("inf"))
        if max_depth is not None:
            too_deep = self.depths > max_depth
            last = last.masked_fill(too_deep, float("-inf"))
            num_rows = min(num_rows, self.size - int(too_deep.sum(dim=1).max()))
        order = last.sort(dim=-1, descending=True, stable=True).indices
        return order[:, :num_rows].sort(dim=-1).values

    def contemplate_row_of(self, nodes: torch.LongTensor) -> torch.LongTensor:
        """For each node `(B, N)` the index into `nodes` `(B, C)` of its nearest ancestor, itself included, in it."""
        is_above = self.ancestors.gather(2, nodes[:, None, :].expand(-1, self.size, -1))  # (B, N, C)
        depths = self.depths.gather(1, nodes)[:, None, :].expand_as(is_above)
        return depths.masked_fill(~is_above, -1).argmax(dim=-1)


def ancestor_closure(parents: torch.LongTensor) -> torch.BoolTensor:
    """`parents` `(B, N)`, parents first -> `(B, N, N)`: row i marks i and everything above i."""
    batch_size, num_nodes = parents.shape
    step = torch.eye(num_nodes, dtype=torch.bool, device=parents.device).expand(batch_size, -1, -1).clone()
    step.scatter_(2, parents[:, :, None], True)
    # Squaring the relation doubles its reach: log2(N) products in place of N sequential row copies.
    reach, closure = 1, step
    while reach < num_nodes - 1:
        closure = torch.matmul(closure.float(), closure.float()) > 0
        reach *= 2
    return closure


class TreeGrower:
    r"""
    Grows a tree level by level from the draft's log-probabilities, all in float32.

    ```python
    grower = TreeGrower(log_probs, branching=10, token_ids=draft_token_ids)  # the root's children
    while deeper:
        grower.narrow(width)  # where not all of the frontier is worth a draft row
        ...draft step over `grower.frontier_tokens`, whose features are those of the rows `grower.frontier_parents`
        grower.expand(log_probs)
    tree = grower.tree(root_tokens, tree_size)
    ```

    Args:
        log_probs (`torch.FloatTensor` of shape `(batch, draft_vocab_size)`): What the draft expects after the root.
        branching (`int`): Children per expanded node, and most nodes expanded per level, k.
        token_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`): The target's ids of the draft's tokens.
    """

    def __init__(self, log_probs: torch.FloatTensor, branching: int, token_ids: torch.LongTensor):
        self.branching = min(branching, log_probs.shape[-1])
        self.token_ids = token_ids
        scores, tokens = self._top_k(log_probs)  # (B, k)
        self._scores, self._tokens = [scores], [tokens]
        self._parents = [torch.full_like(tokens, -1)]  # index into the pool, -1: the root
        self._pool_size = scores.shape[1]
        # The frontier: the nodes to expand next.
        self._frontier = torch.arange(self._pool_size, device=scores.device).expand_as(tokens)  # index into the pool
        self.frontier_scores = scores
        """Path log-probabilities of the nodes to expand, falling, `(B, k)`."""
        self.frontier_tokens = tokens
        """Target token ids of the nodes to expand, `(B, k)`."""
        self.frontier_parents = torch.zeros_like(tokens)
        """Row of the previous draft step that each of them hangs on, `(B, k)`."""
        self.frontier_ancestors = torch.eye(self._pool_size, dtype=torch.bool, device=scores.device).expand(
            scores.shape[0], -1, -1
        )
        """Which rows of all draft steps so far, this one included, each of them sees, `(B, k, rows)`."""

    def narrow(self, width: int) -> None:
        """Leave only the best `width` nodes of the frontier to be expanded."""
        rows = self.frontier_ancestors.shape[-1] - max(self.frontier_tokens.shape[1] - width, 0)
        self._frontier = self._frontier[:, :width]
        self.frontier_scores = self.frontier_scores[:, :width]
        self.frontier_tokens = self.frontier_tokens[:, :width]
        self.frontier_parents = self.frontier_parents[:, :width]
        self.frontier_ancestors = self.frontier_ancestors[:, :width, :rows]  # the last columns are its own rows

    def best_scores(self, count: int) -> torch.FloatTensor:
        """The `count` best path log-probabilities of all candidates so far, or all that there are, falling."""
        scores = torch.cat(self._scores, dim=1)
        return scores.topk(min(count, scores.shape[1]), dim=1).values

    def expand(self, log_probs: torch.FloatTensor) -> None:
        """Take the children of the frontier from `log_probs` `(B, k, Vd)` and make the best of them the next one."""
        scores, tokens = self._top_k(log_probs)  # (B, width, k)
        scores = (scores + self.frontier_scores[..., None]).flatten(1)  # (B, width * k)
        tokens = tokens.flatten(1)
        self._scores.append(scores)
        self._tokens.append(tokens)
        self._parents.append(self._frontier.repeat_interleave(self.branching, dim=1))

        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, : self.branching]
        self._frontier = order + self._pool_size
        self._pool_size += scores.shape[1]
        self.frontier_scores = scores.gather(1, order)
        self.frontier_tokens = tokens.gather(1, order)
        self.frontier_parents = order // self.branching
        inherited = self.frontier_ancestors.gather(
            1, self.frontier_parents[..., None].expand(-1, -1, self.frontier_ancestors.shape[-1])
        )
        itself = torch.eye(order.shape[1], dtype=torch.bool, device=scores.device).expand(order.shape[0], -1, -1)
        self.frontier_ancestors = torch.cat([inherited, itself], dim=-1)

    def tree(self, root_tokens: torch.LongTensor, tree_size: int) -> DraftTree:
        """The best `tree_size - 1` candidates below `root_tokens` `(B,)`; fewer if there are not as many."""
        scores, parents = torch.cat(self._scores, dim=1), torch.cat(self._parents, dim=1)  # (B, P)
        # A child never scores above its parent and comes later in the pool, so a stable order keeps every parent of a
        # kept node, ties included. An unstable one does not (EAGLE's orphan nodes).
        kept = scores.sort(dim=-1, descending=True, stable=True).indices[:, : tree_size - 1].sort(dim=-1).values
        node_of = torch.zeros_like(parents).scatter_(
            1, kept, torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept)
        )  # pool index -> node
        kept_parents = parents.gather(1, kept)
        node_parents = torch.where(kept_parents < 0, 0, node_of.gather(1, kept_parents.clamp(min=0)))
        tokens = torch.cat(self._tokens, dim=1).gather(1, kept)
        root = torch.zeros_like(root_tokens)[:, None]
        return DraftTree.from_parents(
            torch.cat([root_tokens[:, None], tokens], dim=1),
            torch.cat([root, node_parents], dim=1),
            torch.cat([root.float(), scores.gather(1, kept)], dim=1),
        )

    def _top_k(self, log_probs: torch.FloatTensor) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """The k best scores and their tokens; NaN, from a draft that overflowed, counts as impossible."""
        scores, tokens = torch.nan_to_num(log_probs.float(), nan=float("-inf")).topk(self.branching, dim=-1)
        return scores, self.token_ids[tokens]
