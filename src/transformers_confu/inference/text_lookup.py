"""What a text says of its own continuation: what followed the last time that it stood as it stands now.

Answers repeat: names, numbers, code, sentences of the prompt that they summarise or translate, and themselves. Such
guesses cost no forward of the draft. (Transformers has them as prompt lookup; there they are the only ones.)
"""

from bisect import bisect_left
from collections.abc import Sequence


class TextLookup:
    r"""
    Follows the text, and offers the tokens behind an earlier place where it ended in the same tokens as now.

    ```python
    lookup = TextLookup()
    lookup.read(prompt_ids)
    lookup.tokens(8), lookup.chances(8)
    lookup.append(emitted)
    ```

    The place is the latest that ends in the same two tokens, or the one that the text has followed since. How far the
    tokens can be trusted depends on how long it has: it is learned from every token of the call, whether its guess was
    used or not, and of the first token of a guess also by whether the draft agrees.
    """

    MATCHED = 2  # tokens, at least
    # Upper ends of the classes of guesses, by the number of tokens that match before them.
    CLASSES = (2, 3, 5, 8, 16)
    # Share of right guesses that is believed before any was seen, and the number of guesses that it weighs. Means over
    # temperatures 0 and 1 of SmolLM2's answers to 60 questions of Spec-Bench.
    PRIOR = (0.42, 0.56, 0.63, 0.71, 0.81, 0.93)
    PRIOR_AGREED = (0.71, 0.80, 0.82, 0.89, 0.90, 0.98)
    PRIOR_DENIED = (0.20, 0.28, 0.36, 0.39, 0.55, 0.69)
    PRIOR_WEIGHT = 4.0

    def __init__(self):
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # some tokens -> where their latest occurrence ends
        self._next = 0  # place of the guess of the next token; the text's end: there is none
        self.matched = 0
        """Tokens in a row that are alike before the guess and at the text's end; 0 without a guess."""
        self.agreed: bool | None = None
        """Whether the draft, too, guesses the next token; `None` where it has not been asked."""
        self._tried = {opinion: [self.PRIOR_WEIGHT] * len(self.PRIOR) for opinion in (None, True, False)}
        priors = {None: self.PRIOR, True: self.PRIOR_AGREED, False: self.PRIOR_DENIED}
        self._right = {opinion: [share * self.PRIOR_WEIGHT for share in shares] for opinion, shares in priors.items()}

    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens that are not the target's own, from which nothing is learned."""
        for token in tokens:
            self._append(token)

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens of the target, and learn from them."""
        for token in tokens:
            if self.matched:
                kind, is_right = self._class(self.matched), self._text[self._next] == token
                for opinion in {None, self.agreed}:
                    self._tried[opinion][kind] += 1
                    self._right[opinion][kind] += is_right
            self.agreed = None
            self._append(token)

    def tokens(self, count: int) -> list[int]:
        """So many tokens that may come next, in a row; none where the text is new. What is copied is copied on."""
        period = len(self._text) - self._next
        return [self._text[self._next + number % period] for number in range(count)] if period else []

    def chances(self, count: int) -> list[float]:
        """For each of [`tokens`], the chance that the text goes on with it and all before it."""
        chances: list[float] = []
        chance = 1.0
        for number in range(len(self.tokens(count))):
            opinion, kind = self.agreed if number == 0 else None, self._class(self.matched + number)
            chance *= self._right[opinion][kind] / self._tried[opinion][kind]
            chances.append(chance)
        return chances

    def _class(self, matched: int) -> int:
        return bisect_left(self.CLASSES, matched)

    def _append(self, token: int) -> None:
        follows = self.matched > 0 and self._text[self._next] == token
        self._text.append(token)
        end = tuple(self._text[-self.MATCHED :])
        if follows:
            self._next += 1
            self.matched += 1
        else:
            self._next = self._ends.get(end, len(self._text))
            self.matched = self._matched_before(self._next) if self._next < len(self._text) else 0
        if len(end) == self.MATCHED:
            self._ends[end] = len(self._text)

    def _matched_before(self, place: int) -> int:
        """Tokens in a row before a place that are those at the text's end; beyond the last class all are alike."""
        most, text, matched = min(place, self.CLASSES[-1] + 1), self._text, self.MATCHED
        while matched < most and text[place - 1 - matched] == text[-1 - matched]:
            matched += 1
        return matched
