"""The round loop, and the ways into Transformers' `generate`.

One round: extend the draft with what the target computed, grow a tree, verify it in one forward of the target that
also contemplates, walk the tree along the target's own choices, keep the rows of the path.
"""

import difflib
import functools
import inspect
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .candidate_generator_confu import CarriedState, ConFuCandidateGenerator
from .draft_tree import DraftTree
from .target_runner import TargetRunner, cache_bytes, check_cache, check_target, crop


if TYPE_CHECKING:
    from .modeling_confu import ConFuDraftModel


@dataclass
class ConFuStatistics:
    r"""
    What happened in one call of `generate`.

    Args:
        emitted (`list[int]`): Tokens emitted by each round, trimmed at EOS and maximal length. The token that prefill
            emits is in no round.
        accepted (`list[int]`): How many of them were drafted.
        accepted_by_depth (`list[int]`): Entry d - 1 counts the rounds that accepted a node at depth d.
        tree_nodes, contemplate_rows (`int`): Rows of both kinds that the target computed in rounds.
        prefill_seconds, draft_seconds, target_seconds, walk_seconds, compaction_seconds (`float`): Where the time
            went. Read by the host's clock without waiting for the device: on a GPU, work that is queued in one part
            may be waited for in a later one.
        target_cache_bytes, draft_cache_bytes (`int`): Keys and values of the text at the end of the call.
        transient_cache_bytes (`int`): The most that a round added to the target's keys and values before compaction:
            tree nodes, contemplate rows and soft prompts.
        draft_state (`str`): "new" (no cache was passed), "carried" (continued from the passed cache) or "restarted"
            (the passed cache holds no state of this draft, so the draft only sees the new tokens; the text is the
            same, acceptance may be lower).
    """

    emitted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    tree_nodes: int = 0
    contemplate_rows: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    walk_seconds: float = 0.0
    compaction_seconds: float = 0.0
    target_cache_bytes: int = 0
    draft_cache_bytes: int = 0
    transient_cache_bytes: int = 0
    draft_state: str = "new"

    @property
    def rounds(self) -> int:
        return len(self.emitted)

    @property
    def tau(self) -> float:
        """Tokens emitted in rounds / rounds; NaN without a round."""
        return sum(self.emitted) / self.rounds if self.rounds else float("nan")

    def count_round(self, emitted: int, accepted: int, tree_nodes: int, contemplate_rows: int) -> None:
        self.emitted.append(emitted)
        self.accepted.append(accepted)
        self.accepted_by_depth.extend([0] * (accepted - len(self.accepted_by_depth)))
        for depth in range(accepted):
            self.accepted_by_depth[depth] += 1
        self.tree_nodes += tree_nodes
        self.contemplate_rows += contemplate_rows

    def __str__(self) -> str:
        return (
            f"{sum(self.emitted)} tokens in {self.rounds} rounds, tau {self.tau:.2f}; seconds: prefill "
            f"{self.prefill_seconds:.3f}, draft {self.draft_seconds:.3f}, target {self.target_seconds:.3f}, walk "
            f"{self.walk_seconds:.3f}, compaction {self.compaction_seconds:.3f}; draft state {self.draft_state}"
        )


@dataclass
class ConFuKnobs:
    r"""
    The knobs of decoding, entries `confu_<name>` of a `GenerationConfig`.

    Args:
        tree_size (`int`): Nodes of the tree, the root included, N.
        depth (`int`): Longest path of drafted tokens.
        branching (`int`): Nodes expanded per level, and children of each.
        contemplation (`int`, *optional*): Contemplate rows per round, C: 0 is EAGLE-3 mode; as many as nodes, which is
            the paper, by default.
    """

    tree_size: int = 30
    depth: int = 6
    branching: int = 10
    contemplation: int | None = None

    PREFIX = "confu_"

    def __post_init__(self):
        if self.contemplation is None:
            self.contemplation = self.tree_size
        for name, least in (("tree_size", 1), ("depth", 1), ("branching", 1), ("contemplation", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{self.PREFIX}{name}` is {value!r}; it must be an integer of at least {least}.")

    @classmethod
    def names(cls) -> list[str]:
        return [cls.PREFIX + name for name in cls.__dataclass_fields__]

    @classmethod
    def of(cls, config: GenerationConfig) -> dict[str, int]:
        """The knobs that a configuration sets, by their names in it."""
        return {name: getattr(config, name) for name in cls.names() if getattr(config, name, None) is not None}

    @classmethod
    def resolve(cls, *configs: GenerationConfig) -> "ConFuKnobs":
        """Each knob from the first configuration that has it. Unknown `confu_*` names are refused, not ignored."""
        values: dict[str, Any] = {}
        for config in configs:
            entries = {name: value for name, value in vars(config).items() if name.startswith(cls.PREFIX)}
            check_knob_names(entries)
            for name, value in entries.items():
                if value is not None:
                    values.setdefault(name.removeprefix(cls.PREFIX), value)
        return cls(**values)


def check_knob_names(names: Any) -> None:
    """Raise for a `confu_*` name that is none of the knobs: Transformers would keep it silently."""
    for name in names:
        if name.startswith(ConFuKnobs.PREFIX) and name not in ConFuKnobs.names():
            nearest = difflib.get_close_matches(name, ConFuKnobs.names(), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"`{name}` is no knob of ConFu; did you mean `{nearest}`? There are {', '.join(ConFuKnobs.names())}."
            )


def confu_generation_config(target: PreTrainedModel, **kwargs: Any) -> GenerationConfig:
    r"""
    A complete `GenerationConfig` for a target: its own defaults, with any generation option and ConFu knob replaced.

    ```python
    >>> config = confu_generation_config(target, max_new_tokens=128, confu_tree_size=16, confu_contemplation=4)
    >>> target.generate(**inputs, assistant_model=draft, generation_config=config)
    ```

    Bare keywords cannot carry knobs: `generate(confu_tree_size=16)` is refused by Transformers, which knows no such
    option.

    Raises:
        ValueError: an unknown knob or option, a value out of range, or a `None` that would not last.
    """
    check_knob_names(kwargs)
    unknown = [name for name in kwargs if name not in ConFuKnobs.names() and not hasattr(GenerationConfig(), name)]
    if unknown:
        raise ValueError(f"{', '.join(f'`{name}`' for name in unknown)}: no option of `generate`, no knob of ConFu.")
    own = target.generation_config.to_dict()
    if unset := [name for name, value in kwargs.items() if value is None and own.get(name) is not None]:
        raise ValueError(
            f"{', '.join(f'`{name}=None`' for name in unset)}: `generate` fills what is None in a `GenerationConfig` "
            "from the target's own; give it to `generate` itself, beside `generation_config`."
        )
    options = own | kwargs
    # A configuration marked as derived from the model's would drop the knobs without a word.
    options["_from_model_config"] = False
    config = GenerationConfig(**options)
    ConFuKnobs.resolve(config)
    return config


@torch.no_grad()
def confu_decode(
    draft: "ConFuDraftModel",
    target: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    inputs_tensor: torch.Tensor | None = None,
    assistant_model: PreTrainedModel | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    r"""
    Decode with a draft. Same text, scores, streaming and stopping as the target's plain `generate`.

    Takes what `GenerationMixin.generate` passes to a decoding method, after it has prepared inputs, cache, processors
    and criteria; `inputs_tensor`, `assistant_model`, `assistant_tokenizer` and `tokenizer` are not needed.

    Raises:
        ValueError: the call, the target or the cache is one that tree decoding cannot serve; before any work.
    """
    knobs = ConFuKnobs.resolve(generation_config, draft.generation_config)
    check_target(target, draft.config)
    check_call(generation_config, input_ids, synced_gpus, model_kwargs)
    check_cache(model_kwargs["cache"], draft.config)
    decoding = _Decoding(draft, target, input_ids, knobs, logits_processor, stopping_criteria, generation_config)
    output = decoding.run(model_kwargs, streamer)
    draft.last_statistics = decoding.statistics
    return output


SUPPORTED_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    "cache",
    "use_cache",
    "inputs_embeds",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


def check_call(
    generation_config: GenerationConfig,
    input_ids: torch.LongTensor,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> None:
    """Refuse what the round loop cannot do, with the kind of error that Transformers gives."""
    if not model_kwargs.get("use_cache") or model_kwargs.get("cache") is None:
        raise ValueError("assisted generation with a ConFu draft requires `use_cache=True`")
    if generation_config.num_beams > 1:
        raise ValueError(
            f"`num_beams` is {generation_config.num_beams}; a ConFu draft assists greedy search and sampling, so it "
            "has to be 1."
        )
    if generation_config.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences has to be 1 when doing assisted generate, but is "
            f"{generation_config.num_return_sequences}."
        )
    if input_ids.shape[0] > 1:
        raise ValueError(f"assisted generate is only supported for batch_size = 1, got {input_ids.shape[0]}")
    if synced_gpus:
        raise ValueError(
            "`synced_gpus=True` keeps processes in step forward by forward, but ConFu's rounds differ in number "
            "between them; set it to False and give each process a whole target."
        )
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            "`assistant_ensemble_weight` mixes the draft's distribution into the text; ConFu keeps the target's own. "
            "Leave it unset."
        )
    # Transformers gives models of text and images an empty dictionary where there are no images.
    present = {name for name, value in model_kwargs.items() if value is not None and value != {}}
    if foreign := sorted(present - SUPPORTED_MODEL_KWARGS):
        raise ValueError(
            f"A ConFu draft cannot pass {', '.join(f'`{name}`' for name in foreign)} on to the target's tree forward; "
            "it works with text inputs (`input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`)."
        )
    if model_kwargs.get("position_ids") is None or model_kwargs["position_ids"].ndim != 2:
        shape = None if model_kwargs.get("position_ids") is None else tuple(model_kwargs["position_ids"].shape)
        raise ValueError(f"ConFu needs `position_ids` of shape (batch, length), got {shape}; use a text-only target.")


class _Decoding:
    """One call of `generate`. Holds what the parts of a round share; no other object does."""

    def __init__(
        self,
        draft: "ConFuDraftModel",
        target: PreTrainedModel,
        input_ids: torch.LongTensor,
        knobs: ConFuKnobs,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ):
        self.draft, self.target, self.knobs = draft, target, knobs
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.generation_config = generation_config
        self.generator = ConFuCandidateGenerator(draft, target, knobs.depth, knobs.branching)
        self.statistics = ConFuStatistics()

        self.input_ids = input_ids
        self.finished = False
        self.transient_rows = 0  # of the target's cache, most in a round
        wanted = generation_config.return_dict_in_generate
        self.scores: tuple | None = () if wanted and generation_config.output_scores else None
        self.logits: tuple | None = () if wanted and generation_config.output_logits else None
        self.attentions: tuple | None = () if wanted and generation_config.output_attentions else None
        self.hidden_states: tuple | None = () if wanted and generation_config.output_hidden_states else None
        self.returned_states = selected_hidden_states(
            generation_config.output_hidden_states if wanted else None, draft.config.target_num_hidden_layers + 1
        )
        self.runner = TargetRunner(target, draft.config, draft.future_channel, also_recorded=self.returned_states)

    def run(
        self, model_kwargs: dict[str, Any], streamer: BaseStreamer | None
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        self.streamer = streamer
        cache: DynamicCache = model_kwargs["cache"]
        length, carried = cache.get_seq_length(), CarriedState.take_from(cache)
        draft_length = 0 if carried is None else carried.cache.get_seq_length()
        try:
            future = self._prefill(cache, carried, model_kwargs)
            while not self.finished:
                future = self._round(cache, future)
        except BaseException:
            # Some layers may hold rows that others lack, or refused ones: give the caller's cache back as it was.
            crop(cache, length)
            if carried is not None:
                crop(carried.cache, draft_length)
                carried.put_on(cache)
            raise
        self._measure_caches(cache)
        if self.generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False):
            self.generator.carried_state(cache, self.last_taps, self.root_positions[:, None] - 1).put_on(cache)
        if streamer is not None:
            streamer.end()
        if not self.generation_config.return_dict_in_generate:
            return self.input_ids
        return GenerateDecoderOnlyOutput(
            sequences=self.input_ids,
            scores=self.scores,
            logits=self.logits,
            attentions=self.attentions,
            hidden_states=self.hidden_states,
            cache=cache,
        )

    def _prefill(
        self, cache: DynamicCache, carried: CarriedState | None, model_kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Run the prompt, emit the first token, contemplate behind the prompt; the first f `(B, future_size)`."""
        started = time.perf_counter()
        past_length = cache.get_seq_length()
        if carried is not None and not carried.fits(self.draft.instance_id, cache):
            carried = None
        if past_length > 0:
            self.statistics.draft_state = "restarted" if carried is None else "carried"
        prompt = self._new_inputs(past_length, model_kwargs)
        outputs, taps = self._forward_prompt(prompt, model_kwargs)
        if not past_length:
            check_cache(cache, self.draft.config)  # its shape is known only now

        if model_kwargs.get("attention_mask") is not None:
            self.visible = model_kwargs["attention_mask"].to(taps.device).bool()
        else:
            self.visible = torch.ones(1, cache.get_seq_length(), dtype=torch.bool, device=taps.device)
        self.root_positions = prompt["position_ids"][:, -1].to(taps.device) + 1  # (B,)

        # The draft reads real tokens only; each row waits for the embedding of the next real token.
        real = self.visible[0, -taps.shape[1] :].nonzero()[:, 0]  # batch 1: all rows have the same real columns
        if real.shape[0] == 0:
            real = real.new_tensor([taps.shape[1] - 1])  # everything is masked; plain decoding goes on all the same
        taps, position_ids = taps[:, real], prompt["position_ids"].to(taps.device)[:, real]
        if "inputs_embeds" in prompt:
            embeddings = prompt["inputs_embeds"].to(self.draft.device, self.draft.dtype)[:, real]
        else:
            embeddings = self.generator.embed(prompt["input_ids"].to(taps.device)[:, real])
        if carried is not None:
            self.generator.restore(carried, embeddings[:, :1])
        self.generator.observe(embeddings[:, 1:], taps[:, :-1], position_ids[:, :-1])
        self.last_taps = taps[:, -1:]

        self._emit(outputs.logits[:, -1])
        if self.attentions is not None:
            self.attentions += (outputs.attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (self._returned(outputs.hidden_states),)
        self._observe_newest()
        future = None
        if self.knobs.contemplation > 0 and not self.finished:
            # The round that this f opens has its root where the row stands.
            root_positions = self.root_positions[:, None]
            future = self.runner.contemplate(
                cache, self.last_taps, root_positions, root_positions, self.visible[:, None]
            )[:, 0]
        self.statistics.prefill_seconds = time.perf_counter() - started
        return future

    def _new_inputs(self, past_length: int, model_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The part of the prompt that is not in the cache yet: ids or embeddings, and positions."""
        position_ids = model_kwargs["position_ids"]
        if (inputs_embeds := model_kwargs.get("inputs_embeds")) is not None:
            if self.draft.config.has_own_embeddings:
                raise ValueError(
                    f"This draft embeds tokens itself (hidden_size {self.draft.config.hidden_size}, target "
                    f"{self.draft.config.target_hidden_size}) and cannot read `inputs_embeds`; pass `input_ids`."
                )
            inputs_embeds = inputs_embeds[:, past_length:]
            length = inputs_embeds.shape[1]
            new = {"inputs_embeds": inputs_embeds}
        else:
            # A continued text comes as all of its ids, or as the new ones with a mask that covers the cached ones too.
            attention_mask = model_kwargs.get("attention_mask")
            total = (
                attention_mask.shape[1]
                if attention_mask is not None
                else getattr(self.generation_config, "_mask_length", self.input_ids.shape[1])
            )
            ids = self.input_ids[:, past_length:] if total == self.input_ids.shape[1] else self.input_ids
            length = ids.shape[1]
            new = {"input_ids": ids}
        if length == 0:
            raise ValueError(
                f"The cache holds {past_length} tokens and the inputs add none; the newest token must not be cached. "
                "Pass the whole text, or the new ids with an `attention_mask` that also covers the cached ones."
            )
        return new | {"position_ids": position_ids[:, -length:]}

    def _forward_prompt(
        self, prompt: dict[str, torch.Tensor], model_kwargs: dict[str, Any]
    ) -> tuple[ModelOutput, torch.Tensor]:
        """The target's forward over the prompt, in chunks if asked for; last outputs, and taps of all rows."""
        length = prompt["position_ids"].shape[1]
        chunk_size = self.generation_config.prefill_chunk_size or length
        cache = model_kwargs["cache"]
        mask = model_kwargs.get("attention_mask")
        kwargs = {
            name: value for name, value in model_kwargs.items() if name not in ("inputs_embeds", "attention_mask")
        }
        kwargs["output_hidden_states"] = self.runner.recorded
        taps = []
        for start in range(0, length, chunk_size):
            chunk = {name: value[:, start : start + chunk_size] for name, value in prompt.items()}
            seen = cache.get_seq_length() + chunk["position_ids"].shape[1]
            ids = chunk.pop("input_ids", self.input_ids)
            inputs = self.target.prepare_inputs_for_generation(
                ids,
                is_first_iteration=True,
                attention_mask=None if mask is None else mask[:, :seen],
                **(kwargs | chunk),
            )
            outputs = self.target(**inputs, return_dict=True)
            taps.append(self.runner.taps(outputs.hidden_states))
        return outputs, torch.cat(taps, dim=1)

    def _round(self, cache: DynamicCache, future: torch.Tensor | None) -> torch.Tensor | None:
        """One round; the future prediction of the last accepted node, `(B, future_size)`."""
        started = time.perf_counter()
        # A round emits at most one token more than its tree is deep.
        limit = self.stopping_criteria.max_length  # the caller's criterion may stand in for the config's
        remaining = (self.generation_config.max_length if limit is None else limit) - self.input_ids.shape[1]
        tree = self.generator.propose(
            self.input_ids[:, -1], self.knobs.tree_size, max_depth=remaining - 1, future_states=future
        )
        nodes = None
        if self.knobs.contemplation > 0 and remaining > 1:
            # A node at depth `remaining` - 1 ends the text: no round is left that could use its future prediction, and
            # its contemplate row would lie one position beyond the longest text.
            nodes = tree.contemplated_nodes(self.knobs.contemplation, max_depth=remaining - 2)
        drafted = time.perf_counter()

        verification = self.runner.verify(
            tree,
            nodes,
            self.last_taps[:, -1],
            cache,
            self.root_positions,
            self.visible,
            output_attentions=self.attentions is not None,
        )
        self.transient_rows = max(self.transient_rows, cache.get_seq_length() - verification.prefix_length)
        verified = time.perf_counter()

        path, num_accepted = self._walk(tree, verification.outputs, verification.prefix_length)
        walked = time.perf_counter()

        path_rows = torch.tensor(path, device=tree.tokens.device)
        self.runner.compact(cache, verification.prefix_length, path_rows)
        self.visible = torch.nn.functional.pad(self.visible, (0, len(path)), value=True)
        taps = verification.taps[:, path_rows]
        positions = self.root_positions[:, None] + tree.depths[:, path_rows]
        self.generator.observe(self.generator.embed(tree.tokens[:, path_rows[1:]]), taps[:, :-1], positions[:, :-1])
        self.last_taps = taps[:, -1:]
        self.root_positions = self.root_positions + len(path)
        self._observe_newest()
        future = None
        if verification.futures is not None:
            row = tree.contemplate_row_of(nodes)[:, path[-1]]
            future = verification.futures[torch.arange(row.shape[0], device=row.device), row]
        compacted = time.perf_counter()

        self.statistics.draft_seconds += drafted - started
        self.statistics.target_seconds += verified - drafted
        self.statistics.walk_seconds += walked - verified
        self.statistics.compaction_seconds += compacted - walked
        num_rows = 0 if nodes is None else nodes.shape[1]
        self.statistics.count_round(len(path), num_accepted, tree.size, num_rows)
        return future

    def _measure_caches(self, cache: DynamicCache) -> None:
        self.statistics.target_cache_bytes = cache_bytes(cache)
        self.statistics.draft_cache_bytes = cache_bytes(self.generator.cache)
        row_bytes = self.statistics.target_cache_bytes // cache.get_seq_length()
        self.statistics.transient_cache_bytes = self.transient_rows * row_bytes

    def _observe_newest(self) -> None:
        """Pair the newest cached token's taps with the token just emitted; the row that the next tree starts from."""
        if not self.finished:
            root_embeds = self.generator.embed(self.input_ids[:, -1:])
            self.generator.observe(root_embeds, self.last_taps, self.root_positions[:, None] - 1)

    def _walk(self, tree: DraftTree, outputs: ModelOutput, prefix_length: int) -> tuple[list[int], int]:
        r"""
        Emit the target's own choices along the tree, until one is no child of its node or a criterion stops.

        Returns:
            The nodes whose rows are now part of the text, root first, one per emitted token; and how many of the
            emitted tokens were drafted.
        """
        children = tree.children()[0]
        path, num_accepted = [0], 0
        while True:
            token = self._emit(outputs.logits[:, path[-1]])
            self._record_states(outputs, path, prefix_length)
            child = children.get((path[-1], token))
            num_accepted += child is not None
            if child is None or self.finished:
                return path, num_accepted
            path.append(child)

    def _emit(self, logits: torch.Tensor) -> int:
        r"""
        Choose the next token from the target's logits `(1, V)`, append and stream it; its id.

        The logits are processed with the true prefix and one token is taken or drawn, as plain decoding does: one
        draw per emitted token and none besides, so a seed gives the same text and leaves the random generator in the
        same state.
        """
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.logits_processor(self.input_ids, logits)
        if self.generation_config.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(dim=-1)
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        self.finished = bool(self.stopping_criteria(self.input_ids, self.scores).all())
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return int(token)

    def _record_states(self, outputs: ModelOutput, path: list[int], prefix_length: int) -> None:
        """Add the last path node's attentions and hidden states, in the shapes of a one-token forward."""
        node = path[-1]
        if self.hidden_states is not None:
            states = self._returned(outputs.hidden_states)
            self.hidden_states += (tuple(None if s is None else s[:, node : node + 1] for s in states),)
        if self.attentions is not None:
            seen = [*range(prefix_length), *(prefix_length + row for row in path)]
            self.attentions += (
                tuple(
                    None if weights is None else weights[:, :, node : node + 1, seen] for weights in outputs.attentions
                ),
            )

    def _returned(self, hidden_states: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """Only those that the caller asked for, out of all that were recorded."""
        return tuple(states if index in self.returned_states else None for index, states in enumerate(hidden_states))


def selected_hidden_states(output_hidden_states: bool | int | list[int] | None, count: int) -> set[int]:
    """Indices that `output_hidden_states` selects among `count` hidden states: all, none, or those it names."""
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    named = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {index % count for index in named if -count <= index < count}


class ConFuGenerate:
    r"""
    A ConFu decoding method for `generate(custom_generate=...)`, Transformers' documented way to replace its loop.

    ```python
    >>> target.generate(**inputs, custom_generate=ConFuGenerate(draft))
    ```

    Transformers drops streamer, tokenizer and stop strings on this way, so they are bound here.

    Args:
        draft ([`ConFuDraftModel`]): The draft.
        streamer ([`BaseStreamer`], *optional*): Gets the prompt, then each token, then `end()`.
        stop_strings (`str` or `list[str]`, *optional*), tokenizer ([`PreTrainedTokenizerBase`], *optional*): Stop
            when one of the strings is generated; needs the target's tokenizer.
    """

    def __init__(
        self,
        draft: "ConFuDraftModel",
        streamer: BaseStreamer | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if stop_strings is not None and tokenizer is None:
            raise ValueError("`stop_strings` without `tokenizer`: pass the target's tokenizer too.")
        self.draft = draft
        self.streamer = streamer
        self.stop_criteria = [] if stop_strings is None else [StopStringCriteria(tokenizer, stop_strings)]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        return self.draft.confu_decode(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=StoppingCriteriaList([*stopping_criteria, *self.stop_criteria]),
            generation_config=generation_config,
            streamer=self.streamer,
            **model_kwargs,
        )


ASSISTED_DECODING_PARAMETERS = [
    "self",
    "input_ids",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "streamer",
    "inputs_tensor",
    "assistant_model",
    "assistant_tokenizer",
    "tokenizer",
    "model_kwargs",
]


def install_dispatch() -> bool:
    r"""
    Let `generate(assistant_model=draft)` run the draft's own decoding method.

    Transformers keeps no registry of assisted-decoding methods. So `GenerationMixin._assisted_decoding` is wrapped
    once: an assistant whose class defines `confu_decode` decodes with that, whatever copy of this module it comes
    from; every other assistant goes through untouched.

    Returns:
        Whether the dispatch is in place. It is not, and nothing is changed, if the method has parameters that are not
        the known ones; a draft's `generate`, which Transformers then reaches, says so.
    """
    assisted_decoding = GenerationMixin._assisted_decoding
    if getattr(assisted_decoding, "dispatches_confu", False):
        return True
    if list(inspect.signature(assisted_decoding).parameters) != ASSISTED_DECODING_PARAMETERS:
        return False

    @functools.wraps(assisted_decoding)
    def dispatch(self: GenerationMixin, *args: Any, **kwargs: Any):
        assistant_model = kwargs.get("assistant_model")
        if hasattr(type(assistant_model), "confu_decode"):
            return assistant_model.confu_decode(self, *args, **kwargs)
        return assisted_decoding(self, *args, **kwargs)

    setattr(dispatch, "dispatches_confu", True)  # noqa: B010 - a function has no such attribute to a type checker
    GenerationMixin._assisted_decoding = dispatch
    return True


install_dispatch()
