"""The noise that a sampled text is drawn with, known before what is drawn from.

`torch.multinomial` draws a token as the winner of a race: the largest p / e, where every token of the vocabulary has
an exponentially distributed e. These come from the random generator alone, so those of the coming tokens can be looked
at before the target has said its p. A draft that races its own q against the same e draws what the target will draw:
with probability (1 - d) / (1 + d) at least, for a total variation distance d between p and q (Daliri, Musco and
Suresh, arXiv 2408.07978). Two draws that know nothing of each other are seldom alike even for p = q.

The target's draws stay what they are in plain `generate`, and leave the generator as they do there.
"""

import threading
from functools import cache

import torch


# A draw looks where the generator is and then moves it, which the draws of another thread may not come between.
_DRAWING = threading.Lock()


def multinomial(probabilities: torch.Tensor) -> torch.LongTensor:
    """One draw of each row of `(B, V)`, from the default generator, `(B,)`."""
    return torch.multinomial(probabilities, num_samples=1)[:, 0]


def race(probabilities: torch.Tensor, noise: torch.Tensor) -> torch.LongTensor:
    """The winners `(B,)` of `probabilities` and `noise` `(B, V)`, as `torch.multinomial` finds them."""
    return (probabilities / noise).argmax(dim=-1)


@cache
def draws_by_race(device: torch.device, vocab_size: int) -> bool:
    """Whether `torch.multinomial` draws one of so many tokens in this way here, by a few draws."""
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(3):
        probabilities = torch.rand(1, vocab_size, device=device, generator=generator)
        before = generator.get_state()
        drawn = torch.multinomial(probabilities, num_samples=1, generator=generator)[:, 0]
        after = generator.get_state()
        generator.set_state(before)
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        if not torch.equal(race(probabilities, noise), drawn) or not torch.equal(generator.get_state(), after):
            return False
    return True


class SamplingNoise:
    r"""
    Of the next draws by `torch.multinomial` from the default generator of a device.

    ```python
    noise = SamplingNoise.of(logits.device, logits.shape[-1])
    noise[2]                  # of the draw after the next two
    noise.draw(probabilities)  # the next one
    ```
    """

    def __init__(self, generator: torch.Generator, vocab_size: int):
        self._generator, self._vocab_size = generator, vocab_size
        self.device = generator.device
        # Runs ahead of the other one, which other threads may draw from meanwhile.
        self._ahead = torch.Generator(self.device)
        self._rows: list[torch.Tensor] = []
        # Of the generator: before the first row, and after each.
        self._states: list[torch.Tensor] = []

    @classmethod
    def of(cls, device: torch.device, vocab_size: int) -> "SamplingNoise | None":
        """`None` where `torch.multinomial` draws in another way."""
        if device.type not in ("cpu", "cuda") or not draws_by_race(device, vocab_size):
            return None
        if device.type == "cpu":
            return cls(torch.default_generator, vocab_size)
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls(torch.cuda.default_generators[index], vocab_size)

    def __getitem__(self, number: int) -> torch.Tensor:
        """The noise `(V,)` of the draw after the next `number` ones."""
        self._forget_other_states()
        self._ahead.set_state(self._states[-1])
        while len(self._rows) <= number:
            row = torch.empty(1, self._vocab_size, device=self.device).exponential_(generator=self._ahead)
            self._rows.append(row)
            self._states.append(self._ahead.get_state())
        return self._rows[number][0]

    def draw(self, probabilities: torch.Tensor) -> torch.LongTensor:
        """What [`multinomial`] draws from `(1, V)` in float32, and as it leaves the generator."""
        with _DRAWING:
            self._forget_other_states()
            if self._rows and probabilities.shape[1] == self._vocab_size:
                token = race(probabilities, self._rows[0])
                if not bool(probabilities[0, token].isnan()):  # which the other one has a sentence for
                    del self._rows[0]
                    del self._states[0]
                    self._generator.set_state(self._states[0])
                    return token
            return multinomial(probabilities)

    def _forget_other_states(self) -> None:
        """Start anew where somebody else drew from the generator or set it: it is not where the first row begins."""
        state = self._generator.get_state()
        if not self._states or not torch.equal(state, self._states[0]):
            self._rows, self._states = [], [state]


class DraftNoise:
    r"""
    The same noise, as it decides among a draft's tokens.

    The target draws the largest z / T - log e, for its logits z at a temperature T. The draft expects it to be the
    largest l - T log e, for its own logits l: the same order, and at T = 0 that of greedy decoding.

    Args:
        noise ([`SamplingNoise`]): Of the coming draws.
        temperature (`float`): T.
        token_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`): The target's ids of the draft's tokens.
    """

    def __init__(self, noise: SamplingNoise, temperature: float, token_ids: torch.LongTensor):
        self._noise, self._temperature, self._device = noise, temperature, token_ids.device
        self._token_ids = token_ids.to(noise.device)

    def __getitem__(self, level: int) -> torch.Tensor:
        """What to take from the draft's logits `(..., draft_vocab_size)` of the token `level` behind the next."""
        return (self._temperature * self._noise[level][self._token_ids].log()).to(self._device)
