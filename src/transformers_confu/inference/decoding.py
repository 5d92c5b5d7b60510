"""The loop of rounds.

One round: extend the draft with what the target computed, grow a tree, verify it in one forward of the target that
also contemplates, walk the tree along the target's own choices, keep the rows of the path.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .cached_rows import (
    cache_bytes,
    crop,
    filled_layers,
    first_row_held,
    layers_with_attention,
    row_bytes,
    way_back,
)
from .call_statistics import ConFuStatistics
from .candidate_generator_confu import CarriedState, ConFuCandidateGenerator
from .checks import (
    check_cache,
    check_call,
    check_capacity,
    check_evaluation_mode,
    check_future_channel,
    check_target,
    prompt_length,
)
from .draft_tree import DraftTree
from .fixed_cache import FixedRoom, compiled_by, hand_back, not_compiled, rows_of
from .grouped_attention import without_repeated_heads
from .growing_cache import room_to_grow
from .knobs import ConFuKnobs
from .measured_costs import measure_round_costs
from .recurrent_layers import recurrent_mixers, state_bytes
from .round_costs import round_costs
from .rounds import AutomaticRounds, EqualRounds, FixedRounds, Rounds
from .sampling_noise import DraftNoise, SamplingNoise, multinomial
from .self_check import prove_target
from .target import TargetRunner, Verification, autocast_around, input_device, position_table_size
from .text_lookup import TextLookup


logger = logging.get_logger(__name__)


@torch.no_grad()
def confu_decode(
    draft: PreTrainedModel,
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
    check_evaluation_mode(target)
    model_kwargs = as_text(target, model_kwargs)
    if model_kwargs.get("position_ids") is None:
        # `generate` makes none for a `forward` that names none; the target then counts rows, and so does this.
        given = [input_ids, model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")]
        length = max(tensor.shape[1] for tensor in given if tensor is not None)
        model_kwargs["position_ids"] = torch.arange(length, device=input_ids.device)[None]
    check_call(draft.config, generation_config, input_ids, synced_gpus, model_kwargs)
    contemplates = knobs.contemplation != 0
    given = model_kwargs["cache"]
    check_cache(given, draft.config, target, contemplates)
    static = given if isinstance(given, StaticCache) else None
    if static is not None:
        check_capacity(static, generation_config, input_ids, model_kwargs)
        model_kwargs["cache"] = rows_of(static, target.config)
        if knobs.lookup and not knobs.automatic:  # asked for, not just a default
            logger.warning_once(
                "`confu_lookup=True` does nothing over a static cache, whose rounds are all of one shape; leave it "
                "out, or use a dynamic cache for tokens copied from the text."
            )
    autocast = autocast_around(target)
    with torch.autocast(input_device(target).type, enabled=False), without_repeated_heads():
        started = time.perf_counter()
        if contemplates:
            check_future_channel(draft.future_channel, target.dtype)
        self_checked = prove_target(target, draft, contemplates, autocast)
        decoding = _Decoding(
            draft, target, input_ids, knobs, logits_processor, stopping_criteria, generation_config, autocast, static
        )
        decoding.statistics.self_checked = self_checked
        decoding.statistics.prefill_seconds = time.perf_counter() - started
        output = decoding.run(model_kwargs, streamer)
    if static is not None and hasattr(model_kwargs["cache"], "confu_state"):
        hand_back(model_kwargs["cache"], static)
        if generation_config.return_dict_in_generate:
            output.cache = static
    draft.last_statistics = decoding.statistics
    return output


def as_text(target: PreTrainedModel, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of a text alone, from those that models of text and images get for it: the kinds of its tokens, all 0,
    and positions `(kinds of position, 1, length)`, all alike. What says that there are images stays as it is.
    """
    if not hasattr(target.config, "vision_config"):
        return model_kwargs
    model_kwargs = dict(model_kwargs)
    for name in ("mm_token_type_ids", "token_type_ids"):
        kinds = model_kwargs.get(name)
        if kinds is not None and not bool(kinds.any()):
            del model_kwargs[name]
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() == 3 and bool((positions == positions[:1]).all()):
        model_kwargs["position_ids"] = positions[0]
    return model_kwargs


class _Decoding:
    """One call of `generate`. Holds what the parts of a round share; no other object does."""

    def __init__(
        self,
        draft: PreTrainedModel,
        target: PreTrainedModel,
        input_ids: torch.LongTensor,
        knobs: ConFuKnobs,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        autocast: Callable[[], AbstractContextManager],
        static: StaticCache | None,
    ):
        self.draft, self.target = draft, target
        self.rounds: Rounds
        self.fixed: FixedRoom | None = None  # for rounds over a static cache
        self.compiled: Callable[[Callable], Callable] = not_compiled
        self.places = 0 if static is None else static.get_max_length()
        self.lookup = TextLookup() if knobs.lookup and static is None else None
        if self.lookup is not None:
            self.lookup.read(input_ids[0].tolist())
        if static is not None:
            self.rounds = EqualRounds(knobs, static.get_max_length())
            if target._valid_auto_compile_criteria({"cache": static}, generation_config):
                self.compiled = compiled_by(generation_config.compile_config or target._default_compile_config())
        elif knobs.automatic:
            costs = round_costs(target, draft, lambda: measure_round_costs(target, draft))
            longest_copy = {"longest_copy": AutomaticRounds.MAX_DEPTH} if recurrent_mixers(target) else {}
            self.rounds = AutomaticRounds(costs, knobs.contemplation, knobs.future_gain, self.lookup, **longest_copy)
        else:
            self.rounds = FixedRounds(knobs, self.lookup)
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.generation_config = generation_config
        self.generator = ConFuCandidateGenerator(draft, target)
        self.statistics = ConFuStatistics()

        self.contemplates = self.rounds.contemplates
        self.num_positions = position_table_size(target)
        self.input_ids = input_ids
        self.finished = False
        # Most in a round: rows of the target's cache, and those of them that have states in recurrent layers.
        self.transient_rows = self.branches = 0
        wanted = generation_config.return_dict_in_generate
        self.scores: tuple | None = () if wanted and generation_config.output_scores else None
        self.logits: tuple | None = () if wanted and generation_config.output_logits else None
        self.attentions: tuple | None = () if wanted and generation_config.output_attentions else None
        self.hidden_states: tuple | None = () if wanted and generation_config.output_hidden_states else None
        self.returned_states = selected_hidden_states(
            generation_config.output_hidden_states if wanted else None, draft.config.target_num_hidden_layers + 1
        )
        self.runner = TargetRunner(target, draft.config, draft.future_channel, self.returned_states, autocast)
        self.verify = self.compiled(self.runner.verify)
        records = (self.scores, self.logits, self.attentions, self.hidden_states)
        is_greedy = not generation_config.do_sample and not logits_processor and records == (None,) * 4
        # Tokens that end the text, where nothing else but its length does and the choices need no more than logits.
        self.ends = end_tokens(stopping_criteria) if is_greedy else None
        self.noise: SamplingNoise | None = None
        self.draft_noise: DraftNoise | None = None
        if generation_config.do_sample:
            self.noise = SamplingNoise.of(input_ids.device, draft.config.vocab_size)
        if self.noise is not None:
            temperature = generation_config.temperature
            temperature = 1.0 if temperature is None else temperature
            self.draft_noise = DraftNoise(self.noise, temperature, draft.draft_token_ids)

    def run(
        self, model_kwargs: dict[str, Any], streamer: BaseStreamer | None
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        self.streamer = streamer
        cache: DynamicCache = model_kwargs["cache"]
        restore, carried = way_back(cache), CarriedState.take_from(cache)
        draft_length = 0 if carried is None else carried.cache.get_seq_length()
        try:
            future = self._prefill(cache, carried, model_kwargs)
            with self.target._optimize_model_for_decode(), self._room_for_rounds(cache):
                while not self.finished:
                    future = self._round(cache, future)
        except BaseException:
            # Some layers may hold rows that others lack, or refused ones: give the caller's cache back as it was.
            restore()
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
        self.last_taps = taps[:, -1:].clone(memory_format=torch.contiguous_format)  # strides of any later one

        self._emit(outputs.logits[:, -1])
        if self.attentions is not None:
            self._record_attentions(outputs.attentions)
        if self.hidden_states is not None:
            self.hidden_states += (self._returned(outputs.hidden_states),)
        self._observe_newest()
        future = None
        if self.contemplates and not self.finished and self._room() > 1:
            # The round that this f opens has its root where the row stands.
            root_positions = self.root_positions[:, None]
            future = self.runner.contemplate(
                cache, self.last_taps, root_positions, root_positions, self.visible[:, None]
            )[:, 0]
        self.statistics.prefill_seconds += time.perf_counter() - started
        return future

    @contextmanager
    def _room_for_rounds(self, cache: DynamicCache) -> Iterator[None]:
        """Caches in which rounds are cheap: growing ones, or ones of fixed shape where the caller's is static."""
        rounds = self.rounds
        if not isinstance(rounds, EqualRounds):
            with room_to_grow(cache):
                yield
            return
        new_rows = rounds.most_rows + self.draft.config.num_soft_prompts
        with (
            FixedRoom(cache, rounds.capacity, rounds.longest_path, new_rows, self.compiled) as self.fixed,
            self.generator.fixed_room(rounds, self.compiled),
        ):
            yield

    def _new_inputs(self, past_length: int, model_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The part of the prompt that is not in the cache yet: ids or embeddings, and positions."""
        position_ids = model_kwargs["position_ids"]
        if (inputs_embeds := model_kwargs.get("inputs_embeds")) is not None:
            inputs_embeds = inputs_embeds[:, past_length:]
            length = inputs_embeds.shape[1]
            new = {"inputs_embeds": inputs_embeds}
        else:
            # A continued text comes as all of its ids, or as the new ones with a mask that covers the cached ones too.
            total = prompt_length(self.generation_config, self.input_ids, model_kwargs)
            ids = self.input_ids[:, past_length:] if total == self.input_ids.shape[1] else self.input_ids
            length = ids.shape[1]
            new = {"input_ids": ids}
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
            outputs = self.runner.forward(**inputs, return_dict=True)
            taps.append(self.runner.taps(outputs.hidden_states))
        return outputs, torch.cat(taps, dim=1)

    def _round(self, cache: DynamicCache, future: torch.Tensor | None) -> torch.Tensor | None:
        """One round; the future prediction of the last accepted node, `(B, future_size)`."""
        started = time.perf_counter()
        # A round emits at most one token more than its tree is deep.
        room = self._room()
        tree = self.generator.propose(self.input_ids[0, -1:], self.rounds, room - 1, future, self.draft_noise)
        if self.fixed is not None:
            room = sys.maxsize  # it keeps its shape to the end; what lies beyond is not emitted
        nodes = None
        if self.contemplates and room > 1 and (num_rows := self.rounds.contemplate_rows(tree)) > 0:
            # A node at depth `room` - 1 ends the text: no round is left that could use its future prediction, and its
            # contemplate row would lie one position beyond the longest text.
            nodes = tree.contemplated_nodes(num_rows, max_depth=None if tree.size < room else room - 2)
        drafted = time.perf_counter()

        verification = self._verify(tree, nodes, cache)
        if verification.futures is None:
            nodes = None
        self.transient_rows = max(self.transient_rows, cache.get_seq_length() - verification.prefix_length)
        self.branches = max(self.branches, tree.size + (0 if nodes is None else nodes.shape[1]))
        verified = time.perf_counter()

        if self.ends is not None:
            path, num_accepted = self._follow(tree, verification.outputs.logits[0, : tree.size])
        else:
            path, num_accepted = self._walk(tree, verification.outputs, verification.prefix_length, cache)
        if not self.finished:  # a text that ends says nothing of what would have been accepted
            self.rounds.count(tree, path)
        self.statistics.copied += sum(node >= tree.size - tree.num_copied for node in path)
        walked = time.perf_counter()

        if self.fixed is None:
            self.runner.compact(cache, verification.prefix_length, path)
            if verification.states is not None:
                verification.states.keep(path[-1])
        else:
            self.fixed.keep(path)
        self.visible = nn.functional.pad(self.visible, (0, len(path)), value=True)
        path_rows = torch.tensor(path, device=tree.tokens.device)
        taps = verification.taps[:, path_rows]
        self.last_taps = verification.taps[:, path_rows[-1:]]
        # Each node's taps go with the token that follows it; none does yet where the text ends.
        known = len(path) - self.finished
        tokens = self.input_ids[:, self.input_ids.shape[1] - len(path) :][:, :known]
        positions = self.root_positions[:, None] + torch.arange(known, device=tree.tokens.device)
        self.generator.observe(self.generator.embed(tokens), taps[:, :known], positions)
        self.root_positions = self.root_positions + len(path)
        future = None
        if verification.futures is not None:
            row = tree.contemplate_row_of(nodes)[:, path[-1]]
            future = verification.futures[torch.arange(row.shape[0], device=row.device), row]
        compacted = time.perf_counter()

        self.statistics.draft_seconds += drafted - started
        self.statistics.target_seconds += verified - drafted
        self.statistics.walk_seconds += walked - verified
        self.statistics.compaction_seconds += compacted - walked
        contemplated = 0 if nodes is None else nodes.shape[1]
        self.statistics.count_round(len(path), num_accepted, tree.size, contemplated)
        return future

    def _room(self) -> int:
        """Tokens that may still be emitted, and positions that the target has for them; at least 1."""
        limit = self.stopping_criteria.max_length  # the caller's criterion may stand in for the config's
        room = (self.generation_config.max_length if limit is None else limit) - self.input_ids.shape[1]
        if self.num_positions is not None:
            # Where even the root has no position left, the target says so as in plain decoding.
            room = min(room, max(1, self.num_positions - int(self.root_positions)))
        return room

    def _verify(self, tree: DraftTree, nodes: torch.LongTensor | None, cache: DynamicCache) -> Verification:
        """The target's forward over the tree; once more without contemplate rows, should they overflow in it."""
        length = cache.get_seq_length()
        visible = self.visible if self.fixed is None else self.fixed.padded(self.visible)
        arguments = (self.last_taps[:, -1], cache, self.root_positions, visible)
        wants_attentions = self.attentions is not None
        verification = self.verify(tree, nodes, *arguments, output_attentions=wants_attentions)
        if nodes is None or not self._overflowed(verification):
            return verification
        self.statistics.contemplation_overflowed = True
        self.contemplates = False
        if self.fixed is None:
            crop(cache, length)
        else:
            self.fixed.drop()
        return self.verify(tree, None, *arguments, output_attentions=wants_attentions)

    @staticmethod
    def _overflowed(verification: Verification) -> bool:
        """Whether a contemplate row has no finite f, or has spoilt the real rows.

        Their attention gives it the weight 0, but 0 times NaN is NaN, in every real row, so the root tells.
        """
        root = verification.outputs.logits[:, 0]
        return not bool(verification.futures.isfinite().all().to(root.device) & ~root.isnan().any())

    def _measure_caches(self, cache: DynamicCache) -> None:
        self.statistics.target_cache_bytes = cache_bytes(cache)
        self.statistics.draft_cache_bytes = cache_bytes(self.generator.cache)
        self.statistics.transient_cache_bytes = self.transient_rows * row_bytes(cache) + self.branches * state_bytes(
            cache
        )

    def _observe_newest(self) -> None:
        """Pair the newest cached token's taps with the token just emitted; the row that the next tree starts from."""
        if not self.finished:
            root_embeds = self.generator.embed(self.input_ids[:, -1:])
            self.generator.observe(root_embeds, self.last_taps, self.root_positions[:, None] - 1)

    def _follow(self, tree: DraftTree, logits: torch.Tensor) -> tuple[list[int], int]:
        """
        [`_walk`] where the largest of a node's logits `(N, V)` is its choice and only length and EOS end the text: all
        choices are known at once, and reach the host in one transfer.
        """
        choices = logits.float().argmax(dim=-1).to(tree.tokens.device)  # of half precision it takes five times as long
        parents, tokens, choices = torch.stack([tree.parents[0], tree.tokens[0], choices]).tolist()
        children = {step: node for node, step in enumerate(zip(parents, tokens, strict=True)) if node > 0}
        room = self.stopping_criteria.max_length - self.input_ids.shape[1]
        path, num_accepted, emitted = [0], 0, []
        while True:
            emitted.append(choices[path[-1]])
            child = children.get((path[-1], emitted[-1]))
            num_accepted += child is not None
            self.finished = emitted[-1] in self.ends or len(emitted) >= room
            if child is None or self.finished:
                break
            path.append(child)
        self._note(emitted)
        new = torch.tensor([emitted], device=self.input_ids.device)
        self.input_ids = torch.cat([self.input_ids, new], dim=-1)
        if self.streamer is not None:
            for token in emitted:
                self.streamer.put(torch.tensor([token]))
        return path, num_accepted

    def _walk(
        self, tree: DraftTree, outputs: ModelOutput, prefix_length: int, cache: DynamicCache
    ) -> tuple[list[int], int]:
        r"""
        Emit the target's own choices along the tree, until one is no child of its node or a criterion stops.

        Returns:
            The nodes whose rows are now part of the text, root first, one per emitted token; and how many of the
            emitted tokens stood in the tree.
        """
        children = tree.children()[0]
        path, num_accepted = [0], 0
        while True:
            token = self._emit(outputs.logits[:, path[-1]])
            self._record_states(outputs, path, prefix_length, cache)
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
            probabilities = scores.softmax(dim=-1)
            draw = multinomial if self.noise is None else self.noise.draw
            token = draw(probabilities)
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
        emitted = int(token)
        self._note([emitted])
        return emitted

    def _note(self, emitted: list[int]) -> None:
        if self.lookup is not None:
            self.lookup.append(emitted)

    def _record_states(self, outputs: ModelOutput, path: list[int], prefix_length: int, cache: DynamicCache) -> None:
        """Add the last path node's attentions and hidden states, in the shapes of a one-token forward."""
        node = path[-1]
        if self.hidden_states is not None:
            states = self._returned(outputs.hidden_states)
            self.hidden_states += (tuple(None if s is None else s[..., node : node + 1, :] for s in states),)
        if self.attentions is not None:
            attentions = []
            # Layers that read the keys of another one have its window.
            windows = self.runner.windows
            of_window = {
                window: layer
                for window, layer in zip(windows, cache.layers, strict=False)
                if layer in filled_layers(cache)
            }
            for weights, number in zip(outputs.attentions, layers_with_attention(self.target.config), strict=True):
                layer, window = of_window[windows[number]], windows[number]
                first = first_row_held(layer)
                seen = [*range(self.visible.shape[1] - first), *(prefix_length - first + row for row in path)]
                if window is not None:
                    seen = seen[-window:]
                attentions.append(None if weights is None else weights[:, :, node : node + 1, seen])
            self._record_attentions(attentions)

    def _record_attentions(self, attentions: Iterable[torch.Tensor | None]) -> None:
        """Add those of a forward, with a column for every place of a static cache, as plain decoding has them."""
        self.attentions += (
            tuple(
                None if weights is None else nn.functional.pad(weights, (0, max(self.places - weights.shape[-1], 0)))
                for weights in attentions
            ),
        )

    def _returned(self, hidden_states: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """Only those that the caller asked for, out of all that were recorded."""
        return tuple(states if index in self.returned_states else None for index, states in enumerate(hidden_states))


def end_tokens(stopping_criteria: StoppingCriteriaList) -> frozenset[int] | None:
    """The tokens that end a text; `None` where something else than a token or the maximal length may end it."""
    kinds = {type(criterion) for criterion in stopping_criteria}
    if MaxLengthCriteria not in kinds or not kinds <= {MaxLengthCriteria, EosTokenCriteria}:
        return None
    eos = [criterion.eos_token_id for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
    return frozenset(token for tokens in eos for token in tokens.tolist())


def selected_hidden_states(output_hidden_states: bool | int | list[int] | None, count: int) -> set[int]:
    """Indices that `output_hidden_states` selects among `count` hidden states: all, none, or those it names."""
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    named = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {index % count for index in named if -count <= index < count}
