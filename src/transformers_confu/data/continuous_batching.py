"""Answers to a queue of prompts, many at once: a row whose answer ends makes room for the next prompt.

Plain batched `generate` computes every row until the longest answer of the batch ends, and copies its whole cache at
every token. Here the rows of one cache are allocated once, each has its own length, and none waits for another.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..inference.target import additive_mask, without_router_loss


# What changes scores without looking at the tokens before them, which rows of different lengths do not line up.
SCORE_PROCESSORS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Prompts are read together once this share of the rows is free: one by one they would cost a forward each.
REFILL_SHARE = 1 / 16

# Prompts of at most so many tokens together, padding included, are read by one forward.
TOKENS_PER_READING = 65536


@dataclass(eq=False)
class Request:
    """A prompt on its way to an answer.

    Attributes:
        input_ids: the prompt, at least one token.
        temperature: 0 is greedy.
        seed: of the draws; an answer does not depend on the prompts beside it, but for the rounding of kernels.
        answer_ids: the answer so far, the token that ends it included.
    """

    input_ids: list[int]
    temperature: float
    seed: int
    answer_ids: list[int] = field(default_factory=list)
    generator: random.Random | None = field(default=None, init=False, repr=False)


class RowLayer(CacheLayerMixin):
    """Keys and values of a fixed number of rows, `(rows, heads, capacity, head_dim)`; see `RowCache`."""

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, capacity = len(self.cache.lengths), self.cache.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Stores the one new token of each row behind its others; returns the columns in use."""
        rows = self.cache.row_numbers.to(key_states.device)
        columns = self.cache.lengths.to(key_states.device)
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        width = self.cache.width
        return self.keys[:, :, :width], self.values[:, :, :width]

    def read_prompts(
        self,
        rows: torch.LongTensor,
        columns: torch.LongTensor,
        is_token: torch.BoolTensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Takes over prompts `(n, heads, longest, head_dim)`: what `is_token` `(n, longest)` marks, to its places."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        rows, columns, is_token = (index.to(keys.device) for index in (rows, columns, is_token))
        self.keys[rows, :, columns] = keys.transpose(1, 2)[is_token]
        self.values[rows, :, columns] = values.transpose(1, 2)[is_token]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width - 1

    def get_max_length(self) -> int:
        return self.cache.capacity


class RowCache(Cache):
    """A cache whose rows have lengths of their own and one new token each per forward.

    Args:
        num_layers: of the target.
        num_rows: answers at once.
        capacity: longest prompt and answer together, in tokens.
        device: of the lengths.
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int, device: torch.device):
        self.capacity = capacity
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.row_numbers = torch.arange(num_rows, device=device)
        self.width = 1
        """Columns that the coming forward reads: the longest row and its new token."""
        super().__init__(layers=[RowLayer(self) for _ in range(num_layers)])

    def sees(self) -> torch.BoolTensor:
        """What the new token of each row sees, `(rows, 1, width)`."""
        columns = torch.arange(self.width, device=self.lengths.device)
        return (columns <= self.lengths[:, None])[:, None]

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[index]
        self.row_numbers = torch.arange(len(rows), device=self.lengths.device)
        for layer in self.layers:
            layer.keys, layer.values = (states[index.to(states.device)] for states in (layer.keys, layer.values))


@torch.no_grad()
def answer(
    target: PreTrainedModel, requests: Iterable[Request], num_rows: int, capacity: int, max_new_tokens: int
) -> Iterator[Request]:
    """Answers requests and yields each as its answer ends; `requests` is read on as rows become free.

    Args:
        target: the model, see `check_target`; settings that its `generation_config` has besides the temperature apply.
        requests: in the order in which they are begun; prompts of similar length should be neighbours.
        num_rows: answers at once.
        capacity: at least the tokens of any prompt plus `max_new_tokens`.
        max_new_tokens: longest answer.

    Raises:
        ValueError: the `generation_config` asks for beams, stop strings or processing that depends on earlier tokens.
    """
    ends = set(end_token_ids(target))
    waiting = iter(requests)
    draws = _Draws(target)
    device = target.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=target.device)).device
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    cache = RowCache(num_layers, num_rows, capacity, device)
    rows: list[Request | None] = [None] * num_rows
    newest = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
    quiet = without_router_loss(target)

    def take(places: list[int], logits: torch.Tensor) -> list[Request]:
        """Adds a token to the answers of these rows, frees the rows whose answer has ended and returns those."""
        index = torch.tensor(places, device=device)
        tokens = draws([rows[row] for row in places], logits).to(device)
        newest[index, 0] = tokens
        finished = []
        for row, token in zip(places, tokens.tolist(), strict=True):
            request = rows[row]
            request.answer_ids.append(token)
            if token in ends or len(request.answer_ids) == max_new_tokens:
                finished.append(row)
        ended = [rows[row] for row in finished]
        for row in finished:
            rows[row] = None
        if finished:
            cache.lengths[finished] = 0
        return ended

    exhausted = False
    while True:
        free = [row for row, request in enumerate(rows) if request is None]
        if not exhausted and len(free) >= max(1, num_rows * REFILL_SHARE):
            begun = _begin(waiting, len(free))
            exhausted = not begun
            if begun:
                places = free[: len(begun)]
                for row, request in zip(places, begun, strict=True):
                    rows[row] = request
                    request.generator = random.Random(request.seed)
                yield from take(places, _read_prompts(target, cache, places, begun))
                continue
        active = [row for row, request in enumerate(rows) if request is not None]
        if not active:
            return
        if exhausted and 2 * len(active) <= len(rows):
            # Nothing will take the free rows, and a forward computes all there are.
            cache.keep(active)
            newest = newest[active]
            rows = [rows[row] for row in active]
            active = list(range(len(rows)))
        # Counted here, as a look at the lengths of an accelerator would wait for all that it still has to do.
        cache.width = max(len(rows[row].input_ids) + len(rows[row].answer_ids) for row in active)
        like = target.get_input_embeddings()(newest[:1])
        logits = target(
            input_ids=newest,
            attention_mask=additive_mask(cache.sees(), like=like),
            position_ids=cache.lengths[:, None],
            cache=cache,
            use_cache=True,
            **quiet,
        ).logits[:, -1]
        cache.lengths[active] += 1
        yield from take(active, logits[active])


def _begin(waiting: Iterator[Request], free_rows: int) -> list[Request]:
    """The next requests, as many as rows are free and one forward reads; at least one if any is left."""
    begun = list(islice(waiting, 1))
    if begun:
        # Neighbours are about as long; see `answer`.
        most = min(free_rows, TOKENS_PER_READING // len(begun[0].input_ids))
        begun += islice(waiting, max(most - 1, 0))
    return begun


def _read_prompts(
    target: PreTrainedModel, cache: RowCache, rows: list[int], requests: list[Request]
) -> torch.FloatTensor:
    """Fills rows of the cache with prompts; logits of what follows them, `(len(rows), V)`."""
    device = cache.lengths.device
    lengths = torch.tensor([len(request.input_ids) for request in requests])
    longest = int(lengths.max())
    # On the left, so that all prompts end in the same column.
    is_token = torch.arange(longest) >= longest - lengths[:, None]  # (n, longest)
    position_ids = (is_token.cumsum(-1) - 1).clamp(min=0)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    input_ids[is_token] = torch.tensor([token for request in requests for token in request.input_ids])
    prompts = DynamicCache(config=target.config)
    outputs = target(
        input_ids=input_ids.to(device),
        attention_mask=is_token.long().to(device),
        position_ids=position_ids.to(device),
        cache=prompts,
        use_cache=True,
        **({"logits_to_keep": 1} if target._supports_logits_to_keep() else {}),
    )
    into = torch.tensor(rows).repeat_interleave(lengths), position_ids[is_token], is_token
    for layer, read in zip(cache.layers, prompts.layers, strict=True):
        layer.read_prompts(*into, read.keys, read.values)
    cache.lengths[rows] = lengths.to(device)
    return outputs.logits[:, -1]


class _Draws:
    """The next tokens, by each request's temperature and the target's other settings."""

    def __init__(self, target: PreTrainedModel):
        self.target = target
        self.processors: dict[float, LogitsProcessorList] = {}

    def __call__(self, requests: list[Request], logits: torch.Tensor) -> torch.LongTensor:
        """Tokens for `requests` from their `logits` `(len(requests), V)`."""
        tokens = torch.empty(len(requests), dtype=torch.long, device=logits.device)
        for temperature in {request.temperature for request in requests}:
            index = [number for number, request in enumerate(requests) if request.temperature == temperature]
            scores = logits if len(index) == len(requests) else logits[index]
            processors = self._processors_of(temperature)
            if processors:
                scores = processors(None, scores.to(torch.promote_types(scores.dtype, torch.float32)))
            if temperature == 0:
                # `max` and not `argmax`, which is three times slower in bfloat16 on a CPU.
                tokens[index] = scores.max(dim=-1).indices
            else:
                tokens[index] = _inverse_cumulative(scores, [requests[row].generator.random() for row in index])
        return tokens

    def _processors_of(self, temperature: float) -> LogitsProcessorList:
        if temperature not in self.processors:
            sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
            config, _ = self.target._prepare_generation_config(None, **sampling)
            self.target._prepare_special_tokens(config, True, device=self.target.device)
            processors = self.target._get_logits_processor(config, input_ids_seq_length=1, device=self.target.device)
            unusual = [type(p).__name__ for p in processors if not isinstance(p, SCORE_PROCESSORS)]
            unusual += ["num_beams"] * ((config.num_beams or 1) > 1) + ["stop_strings"] * bool(config.stop_strings)
            if unusual:
                raise ValueError(
                    f"The target's generation_config asks for {', '.join(unusual)}, which regeneration in rows of "
                    "different lengths cannot apply; unset it in `target.generation_config`."
                )
            self.processors[temperature] = processors
        return self.processors[temperature]


def _inverse_cumulative(scores: torch.Tensor, draws: list[float]) -> torch.LongTensor:
    """The tokens whose share of [0, 1) the draws fall into; `scores` `(rows, V)`."""
    cumulative = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).cumsum(dim=-1)
    total = cumulative[:, -1:]
    drawn = torch.tensor(draws, device=scores.device)[:, None].to(cumulative.dtype) * total
    # Rounding must not lift a draw to the total, behind the last token of any probability.
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0]


def end_token_ids(target: PreTrainedModel) -> list[int]:
    """Ids that end an answer of the target."""
    eos = target.generation_config.eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)
