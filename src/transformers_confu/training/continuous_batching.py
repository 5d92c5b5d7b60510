"""Answers to a queue of prompts, many at once: a row whose answer ends makes room for the next prompt.

Plain batched `generate` computes every row until the longest answer of the batch ends, and copies its whole cache at
every token. Here the rows of one cache are allocated once, each has its own length, and none waits for another.
"""

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

from ..target_runner import additive_mask


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

    def read_prompts(self, rows: list[int], lengths: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes over left-padded prompts, `(len(rows), heads, longest, head_dim)`."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            self.keys[row, :, :length] = keys[index, :, -length:]
            self.values[row, :, :length] = values[index, :, -length:]

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

    def take(row: int, token: int) -> Request | None:
        """Adds a token to the row's answer, and frees the row if that ends it."""
        request = rows[row]
        request.answer_ids.append(token)
        if token in ends or len(request.answer_ids) == max_new_tokens:
            rows[row] = None
            cache.lengths[row] = 0
            return request
        newest[row, 0] = token
        return None

    while True:
        free = [row for row, request in enumerate(rows) if request is None]
        if len(free) >= max(1, num_rows * REFILL_SHARE):
            begun = list(islice(waiting, len(free)))
            if begun:
                places = free[: len(begun)]
                for row, request in zip(places, begun, strict=True):
                    rows[row] = request
                logits = _read_prompts(target, cache, places, begun)
                for row, token in zip(places, draws(begun, logits), strict=True):
                    if (finished := take(row, token)) is not None:
                        yield finished
                continue
        active = [row for row, request in enumerate(rows) if request is not None]
        if not active:
            return
        cache.width = int(cache.lengths.max()) + 1
        like = target.get_input_embeddings()(newest[:1])
        logits = target(
            input_ids=newest,
            attention_mask=additive_mask(cache.sees(), like=like),
            position_ids=cache.lengths[:, None],
            cache=cache,
            use_cache=True,
        ).logits[:, -1]
        cache.lengths[active] += 1
        for row, token in zip(active, draws([rows[row] for row in active], logits[active]), strict=True):
            if (finished := take(row, token)) is not None:
                yield finished


def _read_prompts(
    target: PreTrainedModel, cache: RowCache, rows: list[int], requests: list[Request]
) -> torch.FloatTensor:
    """Fills rows of the cache with prompts; logits of what follows them, `(len(rows), V)`."""
    lengths = [len(request.input_ids) for request in requests]
    longest = max(lengths)
    # On the left, so that all prompts end in the same column.
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, request in enumerate(requests):
        input_ids[index, longest - lengths[index] :] = torch.tensor(request.input_ids)
        attention_mask[index, longest - lengths[index] :] = 1
    prompts = DynamicCache(config=target.config)
    outputs = target(
        input_ids=input_ids.to(cache.lengths.device),
        attention_mask=attention_mask.to(cache.lengths.device),
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(cache.lengths.device),
        cache=prompts,
        use_cache=True,
        **({"logits_to_keep": 1} if target._supports_logits_to_keep() else {}),
    )
    for layer, read in zip(cache.layers, prompts.layers, strict=True):
        layer.read_prompts(rows, lengths, read.keys, read.values)
    cache.lengths[rows] = torch.tensor(lengths, device=cache.lengths.device)
    return outputs.logits[:, -1]


class _Draws:
    """The next tokens, by each request's temperature and the target's other settings."""

    def __init__(self, target: PreTrainedModel):
        self.target = target
        self.processors: dict[float, LogitsProcessorList] = {}

    def __call__(self, requests: list[Request], logits: torch.Tensor) -> list[int]:
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
                tokens[index] = _inverse_cumulative(scores, [self._draw(requests[number]) for number in index])
        return tokens.tolist()

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

    @staticmethod
    def _draw(request: Request) -> float:
        """The number in [0, 1) that draws the request's next token; one generator per token keeps nothing alive."""
        generator = torch.Generator().manual_seed((request.seed + len(request.answer_ids)) % 2**63)
        return float(torch.rand((), dtype=torch.float64, generator=generator))


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
