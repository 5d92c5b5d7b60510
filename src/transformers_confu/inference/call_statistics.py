"""What happened in one call of `generate`."""

from dataclasses import dataclass, field


@dataclass
class ConFuStatistics:
    r"""
    What happened in one call of `generate`.

    Args:
        emitted (`list[int]`): Tokens emitted by each round, trimmed at EOS and maximal length. The token that prefill
            emits is in no round.
        accepted (`list[int]`): How many of them stood in the tree.
        copied (`int`): How many of all accepted ones only a lookup in the text had put there.
        accepted_by_depth (`list[int]`): Entry d - 1 counts the rounds that accepted a node at depth d.
        tree_sizes (`list[int]`): Nodes of each round's tree, the root included; 1 is a round of plain decoding.
        contemplate_rows (`int`): Contemplate rows that the target computed in rounds.
        prefill_seconds, draft_seconds, target_seconds, walk_seconds, compaction_seconds (`float`): Where the time
            went. Read by the host's clock without waiting for the device: on a GPU, work that is queued in one part
            may be waited for in a later one.
        target_cache_bytes, draft_cache_bytes (`int`): Keys, values and recurrent states of the text at the end of the
            call.
        transient_cache_bytes (`int`): The most that a round added to the target's before compaction: keys and values
            of tree nodes, contemplate rows and soft prompts, and a state of every node and contemplate row in every
            recurrent layer.
        self_checked (`bool`): Whether the call began with a proof that this target computes a tree as it computes
            text (see `self_check`); part of `prefill_seconds`.
        contemplation_overflowed (`bool`): Whether contemplate rows overflowed inside the target. That forward was
            repeated without them, and the rest of the call went on in EAGLE-3 mode.
        draft_state (`str`): "new" (no cache was passed), "carried" (continued from the passed cache) or "restarted"
            (the passed cache holds no state of this draft, so the draft only sees the new tokens; the text is the
            same, acceptance may be lower).
    """

    emitted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    copied: int = 0
    tree_sizes: list[int] = field(default_factory=list)
    contemplate_rows: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    walk_seconds: float = 0.0
    compaction_seconds: float = 0.0
    target_cache_bytes: int = 0
    draft_cache_bytes: int = 0
    transient_cache_bytes: int = 0
    self_checked: bool = False
    contemplation_overflowed: bool = False
    draft_state: str = "new"

    @property
    def rounds(self) -> int:
        return len(self.emitted)

    @property
    def tree_nodes(self) -> int:
        """Tree rows that the target computed in rounds."""
        return sum(self.tree_sizes)

    @property
    def tau(self) -> float:
        """Tokens emitted in rounds / rounds; NaN without a round."""
        return sum(self.emitted) / self.rounds if self.rounds else float("nan")

    def count_round(self, emitted: int, accepted: int, tree_size: int, contemplate_rows: int) -> None:
        self.emitted.append(emitted)
        self.accepted.append(accepted)
        self.accepted_by_depth.extend([0] * (accepted - len(self.accepted_by_depth)))
        for depth in range(accepted):
            self.accepted_by_depth[depth] += 1
        self.tree_sizes.append(tree_size)
        self.contemplate_rows += contemplate_rows

    def __str__(self) -> str:
        return (
            f"{sum(self.emitted)} tokens in {self.rounds} rounds, tau {self.tau:.2f}; seconds: prefill "
            f"{self.prefill_seconds:.3f}, draft {self.draft_seconds:.3f}, target {self.target_seconds:.3f}, walk "
            f"{self.walk_seconds:.3f}, compaction {self.compaction_seconds:.3f}; draft state {self.draft_state}"
        )
