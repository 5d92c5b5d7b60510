"""Draws whose noise is looked at beforehand: those of `torch.multinomial`, and what a draft makes of the noise."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import confu_generation_config
from transformers_confu.inference import sampling_noise
from transformers_confu.inference.candidate_generator_confu import log_chances
from transformers_confu.inference.sampling_noise import DraftNoise, SamplingNoise, multinomial


CPU = torch.device("cpu")
PROMPT = torch.tensor([[3, 4, 5, 2, 7]])


def noise_of(vocab_size: int) -> SamplingNoise:
    noise = SamplingNoise.of(CPU, vocab_size)
    assert noise is not None
    return noise


def some_probabilities(seed: int, number: int, vocab_size: int, sharpness: float) -> list[torch.Tensor]:
    """Each `(1, V)`; some tokens are impossible."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(number, 1, vocab_size, generator=generator)
    impossible = torch.rand(logits.shape, generator=generator) < 0.2
    impossible[..., 0] = False
    return list(logits.masked_fill(impossible, float("-inf")).softmax(dim=-1))


# How many draws ahead are looked at before each draw; -1: none.
LOOKS = st.lists(st.integers(-1, 4), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), vocab_size=st.integers(1, 300), sharpness=st.floats(0, 20), looks=LOOKS)
def test_draws_and_generator_are_those_of_multinomial(seed, vocab_size, sharpness, looks):
    noise, probabilities = noise_of(vocab_size), some_probabilities(seed, len(looks), vocab_size, sharpness)
    torch.manual_seed(seed)
    expected = []
    for of_one in probabilities:
        token = torch.multinomial(of_one, num_samples=1)[:, 0]
        expected.append((token.item(), torch.get_rng_state()))
    torch.manual_seed(seed)
    for look, of_one, (token, state) in zip(looks, probabilities, expected, strict=True):
        before = torch.get_rng_state()
        if look >= 0:
            noise[look]
        assert torch.equal(torch.get_rng_state(), before)
        assert noise.draw(of_one).item() == token
        assert torch.equal(torch.get_rng_state(), state)


def test_noise_stays_what_it_is_until_it_is_used():
    noise = noise_of(7)
    torch.manual_seed(3)
    ahead = [noise[number].clone() for number in (2, 0, 1)]
    ahead = [ahead[1], ahead[2], ahead[0]]
    for number, row in enumerate(ahead):
        assert torch.equal(noise[0], row), number
        noise.draw(torch.full((1, 7), 1 / 7))
    torch.manual_seed(3)
    assert torch.equal(noise[1], ahead[1])


def test_noise_of_another_state_is_forgotten():
    noise, probabilities = noise_of(50), torch.full((1, 50), 1 / 50)
    for disturb in (lambda: torch.rand(1), lambda: torch.manual_seed(5)):
        torch.manual_seed(1)
        noise[2]
        disturb()
        state = torch.get_rng_state()
        token = noise.draw(probabilities)
        torch.set_rng_state(state)
        assert torch.equal(token, multinomial(probabilities))


def test_what_multinomial_refuses_is_refused_in_its_words():
    noise = noise_of(5)
    noise[0]
    broken = torch.tensor([[0.5, float("nan"), 0.5, 0.0, 0.0]])
    with pytest.raises(RuntimeError, match="inf.*nan"):
        noise.draw(broken)


def test_two_threads_never_draw_with_the_same_noise():
    """Each sample of two threads that share the generator is one of those that a single thread would draw."""
    vocab_size, number = 10_000, 60
    torch.manual_seed(0)
    probabilities = torch.full((1, vocab_size), 1 / vocab_size)
    expected = [multinomial(probabilities).item() for _ in range(2 * number)]
    drawn: list[int] = []

    def sample():
        noise = noise_of(vocab_size)
        for _ in range(number):
            noise[2]
            drawn.append(noise.draw(probabilities).item())

    torch.manual_seed(0)
    threads = [threading.Thread(target=sample) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == sorted(expected)


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 1.5])
def test_a_draft_that_agrees_with_the_target_foretells_every_draw(temperature):
    vocab_size = 40
    noise, token_ids = noise_of(vocab_size), torch.randperm(vocab_size)
    draft_noise = DraftNoise(noise, temperature, token_ids)
    torch.manual_seed(0)
    logits = 2 * torch.randn(6, 1, vocab_size)
    foretold = [
        token_ids[log_chances(of_one[:, token_ids], draft_noise, level).argmax()].item()
        for level, of_one in enumerate(logits)
    ]
    assert [noise.draw((of_one / temperature).softmax(dim=-1)).item() for of_one in logits] == foretold
    assert len(set(foretold)) > 1


def test_chances_at_temperature_0_are_those_of_the_draft():
    logits = torch.randn(3, 20)
    without = log_chances(logits)
    torch.testing.assert_close(without.exp().sum(dim=-1), torch.ones(3))
    assert torch.equal(log_chances(logits, DraftNoise(noise_of(20), 0.0, torch.arange(20)), 1), without)


def test_a_draft_that_errs_is_right_as_often_as_was_proved():
    """Daliri et al., arXiv 2408.07978: with probability (1 - d) / (1 + d) at least."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(30, generator=generator).softmax(dim=-1) for _ in range(2))
    noise, distance = noise_of(30), float((p - q).abs().sum() / 2)
    draft_noise = DraftNoise(noise, 1.0, torch.arange(30))
    number, right = 4000, 0
    for _ in range(number):
        foretold = log_chances(q.log()[None], draft_noise, 0).argmax()
        right += bool(noise.draw(p[None]) == foretold)
    deviation = (0.25 / number) ** 0.5
    assert right / number > (1 - distance) / (1 + distance) - 3 * deviation
    # Draws that know nothing of each other.
    assert right / number > float((p * q).sum()) + 10 * deviation


# In `generate`


class Gambler(LogitsProcessor):
    """Spends random numbers of its own."""

    def __call__(self, input_ids, scores):
        return scores + torch.rand(1)


@pytest.mark.parametrize("case", ["plain", "processor that draws", "no race"])
def test_texts_and_generator_are_those_of_plain_generate(monkeypatch, case):
    target = make_tiny_target(dtype=torch.float32)
    draft = make_tiny_draft(target)
    options = {"do_sample": True, "max_new_tokens": 30}
    more = {"logits_processor": LogitsProcessorList([Gambler()])} if case == "processor that draws" else {}
    if case == "no race":
        monkeypatch.setattr(sampling_noise, "draws_by_race", lambda device, vocab_size: False)
    outcomes = []
    for assistant in (None, draft):
        torch.manual_seed(2)
        config = confu_generation_config(target, **options, confu_tree_size=8, confu_depth=3, confu_branching=4)
        text = target.generate(PROMPT, assistant_model=assistant, generation_config=config, **more)
        outcomes.append((text, torch.get_rng_state()))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def test_every_draw_of_a_call_is_foretold_by_a_draft_that_agrees():
    """Both say the same wherever they are, so that nothing but the noise of another place could mislead the draft."""
    target = make_tiny_target(dtype=torch.float32)
    draft = make_tiny_draft(target, draft_vocab_size=target.config.vocab_size)
    logits = 2 * torch.randn(target.config.vocab_size, generator=torch.Generator().manual_seed(0))
    target.lm_head.register_forward_hook(lambda module, inputs, output: logits.expand_as(output))
    draft.lm_head.register_forward_hook(lambda module, inputs, output: logits[draft.draft_token_ids].expand_as(output))
    config = confu_generation_config(
        target,
        do_sample=True,
        temperature=0.8,
        max_new_tokens=33,
        eos_token_id=-1,
        confu_tree_size=5,
        confu_depth=4,
        confu_branching=1,
    )
    text = target.generate(PROMPT, assistant_model=draft, generation_config=config)
    # The prompt gives one token, and rounds four and their own until the last, which has room for less.
    assert draft.last_statistics.emitted[:6] == [5] * 6
    assert len(set(text[0].tolist())) > 5


def test_noise_is_drawn_once_for_every_place(monkeypatch):
    """But the first token's and the last one's, behind which nothing is drafted."""
    target = make_tiny_target(dtype=torch.float32)
    draft = make_tiny_draft(target)
    drawn, rows = torch.Tensor.exponential_, []
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **kwargs: rows.append(1) or drawn(self, **kwargs))
    config = confu_generation_config(
        target, do_sample=True, max_new_tokens=20, confu_tree_size=8, confu_depth=3, confu_branching=4
    )
    target.generate(PROMPT, assistant_model=draft, generation_config=config)
    rows.clear()
    target.generate(PROMPT, assistant_model=draft, generation_config=config)
    assert 17 <= len(rows) <= 19
