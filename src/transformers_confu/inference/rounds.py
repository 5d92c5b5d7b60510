"""How large a round is: the tree's size, depth and width, and the rows that contemplate.

Costs are counted in *steps*: a step is what one round of plain decoding takes, a forward of the target over one row.
"""

import math
from bisect import bisect
from typing import Protocol

from .draft_tree import DraftTree, TreeGrower
from .knobs import ConFuKnobs
from .round_costs import RoundCosts
from .text_lookup import TextLookup


NO_COPIES: tuple[list[int], list[float]] = [], []


class Rounds(Protocol):
    """What the decoding loop asks, in this order, in every round."""

    branching: int
    """Children of an expanded node, and most nodes expanded per level."""
    contemplates: bool
    """Whether any round may have contemplate rows."""

    def depth(self, length: int, room: int) -> int:
        """Longest path of drafted tokens behind `length` tokens of text, at most `room`; below 1: none are drafted."""

    def width(self, grower: TreeGrower) -> int:
        """How many of the grower's frontier nodes to expand; 0: the tree is grown."""

    def tree_size(self, grower: TreeGrower | None) -> int:
        """Nodes of the tree, the root included, chosen among all candidates; without a grower none were drafted."""

    def copies(self, tree: DraftTree) -> tuple[list[int], list[float]]:
        """A path of tokens that the text has had before, to join a drafted tree, and their log-probabilities."""

    def contemplate_rows(self, tree: DraftTree) -> int:
        """Contemplate rows of this round."""

    def count(self, tree: DraftTree, path: list[int]) -> None:
        """Learn from a round whose accepted nodes, root first, are `path`."""


class FixedRounds:
    r"""
    Every round as the knobs say.

    Args:
        knobs ([`ConFuKnobs`]): Of the call.
        lookup ([`TextLookup`], *optional*): Of the text; without it all nodes are drafted.
    """

    # A copied token takes a drafted node's place if it is likelier than this, and up to three quarters of the tree.
    LEAST_CHANCE = 0.1

    def __init__(self, knobs: ConFuKnobs, lookup: TextLookup | None = None):
        self.knobs, self.lookup = knobs, lookup
        self.num_copies = 0
        self.branching = knobs.branching
        self.contemplates = knobs.contemplation > 0

    def depth(self, length: int, room: int) -> int:
        if self.lookup is not None:
            chances = self.lookup.chances(max(min(room, self.knobs.tree_size * 3 // 4), 0))
            self.num_copies = sum(chance > self.LEAST_CHANCE for chance in chances)
        # No deeper than a chain that fills the tree.
        return min(self.knobs.depth, self.tree_size(None) - 1, room)

    def width(self, grower: TreeGrower) -> int:
        if grower.frontier_scores.device.type != "cpu" or grower.frontier_scores.shape[0] > 1:
            return self.branching  # to read scores would wait for the device
        # A child scores no more than its parent, and what ties with a candidate found earlier ranks behind it. So a
        # node that is not above the last of the best N - 1 has no child that could enter the tree.
        wanted = self.tree_size(grower) - 1
        best = grower.best_scores(wanted)
        if best.shape[1] < wanted:
            return self.branching
        return int((grower.frontier_scores > best[:, -1:]).sum())

    def tree_size(self, grower: TreeGrower | None) -> int:
        return self.knobs.tree_size - self.num_copies

    def copies(self, tree: DraftTree) -> tuple[list[int], list[float]]:
        if self.lookup is None:
            return NO_COPIES
        chances = self.lookup.chances(self.num_copies)
        return self.lookup.tokens(self.num_copies), [math.log(chance) for chance in chances]

    def contemplate_rows(self, tree: DraftTree) -> int:
        return self.knobs.contemplation

    def count(self, tree: DraftTree, path: list[int]) -> None:
        pass


class EqualRounds(FixedRounds):
    r"""
    Rounds that are all of one shape, whatever the draft says: as the knobs say, or of the size that they default to.

    Args:
        knobs ([`ConFuKnobs`]): Of the call.
        length (`int`): Rows that the text may have.
    """

    # Capacities are multiples of this, so that texts of about one length share what was compiled for them.
    BUCKET = 256

    def __init__(self, knobs: ConFuKnobs, length: int):
        super().__init__(knobs.fixed())
        self.longest_path = min(self.knobs.depth + 1, self.knobs.tree_size)
        """Nodes of the longest path, the root included."""
        self.most_rows = self.knobs.tree_size + self.knobs.contemplation
        """Nodes and contemplate rows."""
        self.capacity = -(-(length + self.longest_path) // self.BUCKET) * self.BUCKET
        """Rows of the text, and one longest path more, for which there is room."""

    def width(self, grower: TreeGrower) -> int:
        return self.branching


class AutomaticRounds:
    r"""
    The rounds that promise the most tokens per second, plain ones included.

    A round that emits an expected number of tokens for a cost in steps is worth its tokens less what the cost would
    bring elsewhere: rate x cost, where the rate is the tokens per step of this call so far. A node of the tree is kept
    while its probability to be accepted exceeds the rate times the cost of its row; a level is drafted while the nodes
    that it can add are worth more than it costs, in the cases that no copied token covers. Where drafting has not paid
    of late, rounds without it follow, more of them each time, before it is tried again.

    The draft's path probabilities estimate acceptance. They are corrected by what was accepted in this call among
    nodes of about the same probability. Nothing is read from a clock: the same call has the same rounds.

    Args:
        costs ([`RoundCosts`]): Of this target and draft on this machine.
        contemplation (`int`, *optional*): Contemplate rows of a round; `None`: as many as pay.
        future_gain (`float`): Tokens that a node's own future prediction adds to the next round.
        lookup ([`TextLookup`], *optional*): Of the text; without it all nodes are drafted.
        longest_copy (`int`): Tokens that are copied from the text in a round, at most.
    """

    branching = 8
    MAX_DEPTH = 8
    MAX_NODES = 64

    # Upper ends of the classes of nodes, in -log p.
    CLASSES = (0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    # What is believed before anything was seen, and the number of tokens that it weighs.
    PRIOR_WEIGHT = 3.0
    # Plain rounds after drafting has not paid; doubled each time, up to the second.
    FIRST_PAUSE, LONGEST_PAUSE = 4, 64
    MEMORY = 0.75  # of the running mean of what drafting gained, per round

    def __init__(
        self,
        costs: RoundCosts,
        contemplation: int | None,
        future_gain: float,
        lookup: TextLookup | None = None,
        longest_copy: int = 32,
    ):
        self.costs_by_length = costs
        self.lookup, self.longest_copy = lookup, longest_copy
        self.contemplation = contemplation
        self.future_gain = future_gain
        self.contemplates = contemplation != 0 and (contemplation is not None or future_gain > 0)
        self.tokens = self.spent = self.PRIOR_WEIGHT
        self.expected = [self.PRIOR_WEIGHT] * (len(self.CLASSES) + 1)
        self.accepted = [self.PRIOR_WEIGHT] * (len(self.CLASSES) + 1)
        # Accepted nodes that had been expanded, and those of them one of whose children was accepted too.
        self.expanded, self.continued = self.PRIOR_WEIGHT, 0.6 * self.PRIOR_WEIGHT
        self.gain = 0.0
        self.pause, self.next_pause = 0, self.FIRST_PAUSE
        self._start(0, 0)

    def _start(self, length: int, room: int) -> None:
        self.costs = self.costs_by_length.at(length)
        self.levels = self.rows = 0
        self.cost = 0.0
        self.probabilities: list[float] = []  # of drafted nodes
        self.copied: list[int] = []
        if self.lookup is not None:
            self.copied = self.lookup.tokens(max(min(room, self.longest_copy), 0))

    @property
    def rate(self) -> float:
        """Tokens per step of this call so far; never below that of plain decoding."""
        return max(self.tokens / self.spent, 1.0)

    def probability(self, log_prob: float) -> float:
        """Of being accepted, of a node whose path has this log-probability under the draft."""
        kind = bisect(self.CLASSES, -log_prob)
        return min(math.exp(log_prob) * self.accepted[kind] / self.expected[kind], 1.0)

    def depth(self, length: int, room: int) -> int:
        self._start(length, room)
        if self.pause > 0:
            self.pause -= 1
            return 0
        level = self.costs.draft(1)  # of other true rows only keys and values are computed; a prompt is prefill
        if room < 1 or self.not_copied(1) <= self.rate * level:
            return 0
        self.cost = level
        self.levels = 1
        return min(self.MAX_DEPTH, room)

    def not_copied(self, depth: int) -> float:
        """The chance that the text does not go on with so many copied tokens."""
        return 1.0 if len(self.copied) < depth else 1.0 - self.lookup.chances(depth)[-1]

    def width(self, grower: TreeGrower) -> int:
        if self.levels == 1 and self.copied:
            self.lookup.agreed = int(grower.frontier_tokens[0, 0]) == self.copied[0]
        row = self.rate * self.costs.row
        likely = self.continued / self.expanded * self.not_copied(self.levels + 1)
        best, best_gain, gain = 0, 0.0, 0.0
        for width, log_prob in enumerate(grower.frontier_scores[0].tolist(), start=1):
            gain += max(self.probability(log_prob) * likely - row, 0.0)
            if (net := gain - self.rate * self.costs.draft(width)) > best_gain:
                best, best_gain = width, net
        if best:
            self.cost += self.costs.draft(best)
            self.levels += 1
        return best

    def tree_size(self, grower: TreeGrower | None) -> int:
        if grower is None:
            return 1
        ceiling, tokens = 1.0, 1.0
        best, best_value = 1, 1.0 - self.rate
        for nodes, log_prob in enumerate(grower.best_scores(self.MAX_NODES - 1)[0].tolist(), start=2):
            ceiling = min(ceiling, self.probability(log_prob))  # a larger tree never holds a likelier node
            tokens += ceiling
            self.probabilities.append(ceiling)
            if (value := tokens - self.rate * self.costs.target(nodes)) > best_value:
                best, best_value = nodes, value
        del self.probabilities[best - 1 :]
        return best

    def copies(self, tree: DraftTree) -> tuple[list[int], list[float]]:
        if not self.copied:
            return NO_COPIES
        chances = self.lookup.chances(len(self.copied))
        children, node, rows = tree.children()[0], 0, tree.size
        best, best_value, value = 0, 0.0, 0.0
        for number, (token, chance) in enumerate(zip(self.copied, chances, strict=True), start=1):
            node = children.get((node, token), -1)
            if node < 0:
                rows += 1
                value += chance - self.rate * (self.costs.target(rows) - self.costs.target(rows - 1))
            if rows > self.MAX_NODES:
                break
            if value > best_value:
                best, best_value = number, value
        return self.copied[:best], [math.log(chance) for chance in chances[:best]]

    def contemplate_rows(self, tree: DraftTree) -> int:
        if not self.contemplates:
            rows = 0
        elif self.contemplation is not None:
            rows = min(self.contemplation, tree.size)
        else:
            price = self.rate * self.costs.row
            rows = sum(last * self.future_gain > price for last in tree.chance_to_be_last()[0].tolist())
        self.rows = rows
        return rows

    def count(self, tree: DraftTree, path: list[int]) -> None:
        if self.levels:
            self._learn(tree, path)
        self.tokens += len(path)
        self.spent += self.cost + self.costs.target(tree.size + self.rows)

    def _learn(self, tree: DraftTree, path: list[int]) -> None:
        drafted = tree.size - tree.num_copied
        # Over rounds that draft nothing, which a pause would bring.
        gained = sum(self.probabilities) - self.cost - (self.costs.target(drafted + self.rows) - 1.0)
        self.gain = self.MEMORY * self.gain + (1 - self.MEMORY) * gained
        if gained > 0:
            self.next_pause = self.FIRST_PAUSE
            self.gain = max(self.gain, 0.0)
        elif self.gain < 0:
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, self.LONGEST_PAUSE)
        for node, log_prob in enumerate(tree.log_probs[0, :drafted].tolist()):
            if node > 0:
                kind = bisect(self.CLASSES, -log_prob)
                self.expected[kind] += math.exp(log_prob)
                self.accepted[kind] += node in path
        accepted = sum(node < drafted for node in path) - 1
        self.expanded += min(accepted, max(self.levels - 1, 0))
        self.continued += max(accepted - 1, 0)
