"""What a ConFu checkpoint is: the sizes of the draft, of its target, and of the future channel between them."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# Kinds of RoPE whose frequencies do not depend on the sequence length, so that a cached key never goes stale.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Those of targets: Gemma 4 rotates only the fast pairs of its layers with full attention, at frequencies that stay.
STATIC_TARGET_ROPE_TYPES = (*STATIC_ROPE_TYPES, "proportional")

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@strict
class ConFuConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ConFuDraftModel`]: an EAGLE-3 draft (arXiv 2503.01840) with ConFu's future channel
    (arXiv 2603.08899). Build it with [`ConFuConfig.from_target`], which takes every size of the target over.

    Args:
        vocab_size (`int`): Vocabulary of the target, V. Equal to the target's, whatever the draft predicts.
        draft_vocab_size (`int`, *optional*): Number of target tokens the draft can predict, Vd. Defaults to V.
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, hidden_act, rms_norm_eps,
        rope_parameters, max_position_embeddings, attention_bias, mlp_bias: the draft's one decoder layer, in Llama's
            terms.
        has_own_embeddings (`bool`, *optional*): Whether the draft saves an embedding table of its own; else it reads
            the target's. Defaults to `hidden_size != target_hidden_size`, where it must.
        use_qk_norm (`bool`): Normalise each head of queries and keys before the rotation, as Qwen3 and the drafts of
            DeepSpec do.
        norm_before_residual (`bool`): The residual stream starts with the normalised feature, not with the raw one;
            the habit of vLLM's speculators.
        norm_output (`bool`): The feature of a drafted row is the output of the row before it after the last norm, not
            before it (EAGLE-3.1).
        fc_norm (`bool`): Normalise each tap by itself before `fc` (EAGLE-3.1).
        norm_before_fc (`bool`): Normalise the concatenated taps before `fc`, by `input_norm`. Not with `fc_norm`.
        attention_window (`int`, *optional*): How many of the newest tokens of the text a draft row attends to, beside
            the first 4; by default to all. A draft that was trained on texts of some hundred tokens loses its way
            behind thousands. It changes what is proposed, never the text.
        target_hidden_size (`int`): Width of the target's hidden states, Ht.
        target_num_hidden_layers, target_num_key_value_heads, target_head_dim (`int`): Shape of the target's
            key/value cache, which the soft prompts extend.
        target_hidden_state_indices (`list[int]`): The taps. Indices into the target's `hidden_states` tuple
            (0 = embeddings, i = input of layer i, L = final state after the last norm), in the order in which `fc`
            concatenates them.
        num_soft_prompts (`int`): Key/value slots per target layer that only contemplate rows read, S (paper: 16).
        rotate_soft_prompts (`bool`): Rotate the soft prompts' keys by the target's RoPE to the position of a round's
            root, so that every contemplate row finds them at the same distance, however long the text; else the keys
            are read as they are, and the distance grows with the text.
        num_contemplate_experts, num_contemplate_experts_per_token (`int`): E and K of the mixture of experts that
            makes the embedding of the contemplate token `[con]`. K = E = 1 is the ablation without a mixture.
        num_future_experts, num_future_experts_per_token (`int`): E and K of the mixture that makes the embedding of
            the future token `[f]`.
        future_hidden_state_indices (`list[int]`): Which hidden states of the contemplate row, concatenated, are the
            future prediction f. Same index convention as the taps.
        use_future_residual (`bool`): Also add a projection of f to the draft's residual stream, beside the `[f]`
            key/value slot.
    """

    model_type = "confu"

    vocab_size: int = 32000
    draft_vocab_size: int | None = None
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    has_own_embeddings: bool | None = None
    use_qk_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    attention_window: int | None = None

    target_hidden_size: int | None = None
    target_num_hidden_layers: int = 32
    target_num_key_value_heads: int | None = None
    target_head_dim: int | None = None
    target_hidden_state_indices: list[int] | None = None

    num_soft_prompts: int = 16
    rotate_soft_prompts: bool = False
    num_contemplate_experts: int = 8
    num_contemplate_experts_per_token: int = 2
    num_future_experts: int = 8
    num_future_experts_per_token: int = 2
    future_hidden_state_indices: list[int] | None = None
    use_future_residual: bool = True

    def __post_init__(self, **kwargs):
        # What EAGLE-3 drafts and Llama's configurations have, and a draft never used: it drops nothing.
        kwargs.pop("attention_dropout", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.has_own_embeddings is None:
            self.has_own_embeddings = self.hidden_size != self.target_hidden_size
        if self.target_num_key_value_heads is None:
            self.target_num_key_value_heads = self.num_key_value_heads
        if self.target_head_dim is None:
            self.target_head_dim = self.head_dim
        if self.target_hidden_state_indices is None:
            self.target_hidden_state_indices = default_taps(self.target_num_hidden_layers)
        if self.future_hidden_state_indices is None:
            self.future_hidden_state_indices = default_future_states(self.target_num_hidden_layers)
        super().__post_init__(**kwargs)

    @property
    def taps_size(self) -> int:
        """Width of the concatenated taps, n_taps * Ht: the input of `fc` and of the `[con]` router."""
        return len(self.target_hidden_state_indices) * self.target_hidden_size

    @property
    def future_size(self) -> int:
        """Width of the future prediction f."""
        return len(self.future_hidden_state_indices) * self.target_hidden_size

    def validate_architecture(self):
        """Part of `@strict` validation: refuse sizes that cannot belong together, each in one sentence."""
        for name in (
            *("vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
            *("num_attention_heads", "num_key_value_heads", "head_dim"),
            *("target_hidden_size", "target_num_hidden_layers", "target_num_key_value_heads", "target_head_dim"),
            *("num_contemplate_experts", "num_contemplate_experts_per_token"),
            *("num_future_experts", "num_future_experts_per_token"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.attention_window is not None and self.attention_window < 1:
            raise ValueError(f"`attention_window` is {self.attention_window}; it must be at least 1, or None for all.")
        if self.num_soft_prompts < 0:
            raise ValueError(f"`num_soft_prompts` is {self.num_soft_prompts}; it must be 0 (none) or more.")
        if self.num_hidden_layers != 1:
            raise ValueError(
                f"`num_hidden_layers` is {self.num_hidden_layers}; an EAGLE-3 draft has exactly 1 decoder layer. "
                "The target's depth goes into `target_num_hidden_layers`."
            )
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) is not a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"`head_dim` is {self.head_dim}; rotary embeddings need an even number.")
        if self.hidden_size != self.target_hidden_size and not self.has_own_embeddings:
            raise ValueError(
                f"`has_own_embeddings` is False, but the draft is {self.hidden_size} wide and the target "
                f"{self.target_hidden_size}: only a draft as wide as its target can read the target's embeddings."
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError(
                "`fc_norm` and `norm_before_fc` are both True; taps are normalised either each by itself or together."
            )
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` ({self.draft_vocab_size}) exceeds `vocab_size` ({self.vocab_size}): the draft "
                "predicts a subset of the target's tokens."
            )
        for mixture in ("contemplate", "future"):
            experts = getattr(self, f"num_{mixture}_experts")
            chosen = getattr(self, f"num_{mixture}_experts_per_token")
            if chosen > experts:
                raise ValueError(
                    f"`num_{mixture}_experts_per_token` ({chosen}) exceeds `num_{mixture}_experts` ({experts})."
                )
        for name in ("target_hidden_state_indices", "future_hidden_state_indices"):
            indices = getattr(self, name)
            if not indices or sorted(set(indices)) != indices:
                raise ValueError(f"`{name}` is {indices}; it must be a non-empty list of rising, distinct indices.")
            if indices[0] < 0 or indices[-1] > self.target_num_hidden_layers:
                raise ValueError(
                    f"`{name}` is {indices}, but a target of {self.target_num_hidden_layers} layers has hidden states "
                    f"0 (embeddings) to {self.target_num_hidden_layers} (after the final norm)."
                )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in STATIC_ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters` asks for RoPE type '{rope_type}'; a draft can use {', '.join(STATIC_ROPE_TYPES)}, "
                "whose frequencies do not change with the sequence length."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        # Transformers only warns, and would fill the sizes and weights that another model has not with its own.
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type '{model_type}', expected '{cls.model_type}'; "
                "EAGLE-3 drafts of other libraries become ConFu drafts by `confu convert in`."
            )
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        # Transformers names the code of a local checkpoint by a hash over a file and those it imports, and finds a
        # model's class by its config's class. Asked of the file that imports all others, two folders that differ in
        # any of them have two config classes; else the second would silently run the code of the first.
        values = super().to_dict()
        if {"AutoConfig", "AutoModel"} <= (values.get("auto_map") or {}).keys():
            values["auto_map"] = values["auto_map"] | {"AutoConfig": f"modeling_confu.{type(self).__name__}"}
        return values

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **kwargs) -> "ConFuConfig":
        r"""
        A configuration whose sizes fit a target.

        Args:
            target_config ([`PreTrainedConfig`]): Configuration of the target, `target.config`.
            kwargs: Any field of [`ConFuConfig`], to replace what the target suggests. By default the decoder layer is
                as wide as one layer of the target, so that it can start from the target's own weights. A target that
                has no place for soft prompts (see [`cached_heads`]) gets none, and contemplate rows work without.

        Raises:
            ValueError: the target is no decoder-only model, its configuration has no Llama-like sizes, its layers
                differ in width, or soft prompts are asked for that it has no place for.
        """
        if target_config.is_encoder_decoder:
            raise ValueError(
                f"{type(target_config).__name__} is of an encoder-decoder model; ConFu drafts for decoder-only models."
            )
        target = target_config.get_text_config(decoder=True)
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        vocab_size, hidden_size, num_layers, num_heads = found = [size_of(target, name) for name in needed]
        if missing := [name for name, size in zip(needed, found, strict=True) if not isinstance(size, int)]:
            raise ValueError(
                f"{type(target).__name__} has no {', '.join(f'`{name}`' for name in missing)}; a ConFu draft needs a "
                "decoder-only target with Llama-like configuration names."
            )
        heads = cached_heads(target)
        num_key_value_heads, head_dim = heads or (num_heads, hidden_size // num_heads)
        if heads is None and kwargs.setdefault("num_soft_prompts", 0) > 0:
            raise ValueError(
                f"{type(target).__name__} caches keys and values of different sizes, or other sizes in some layers, "
                "so that there is no place for soft prompts; set `num_soft_prompts` to 0, got "
                f"{kwargs['num_soft_prompts']}."
            )
        rope = rope_of(target)
        special = {"partial_rotary_factor", "mrope_section"} & rope.keys()
        if rope.get("rope_type", "default") not in STATIC_ROPE_TYPES or special:
            # The draft's positions are its own affair: plain RoPE with the target's base serves any target.
            rope = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
        longest = getattr(target, "max_position_embeddings", None)
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": size_of(target, "intermediate_size") or 4 * hidden_size,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim + head_dim % 2,  # the draft has RoPE, which turns pairs
            "rms_norm_eps": getattr(target, "rms_norm_eps", None) or getattr(target, "layer_norm_eps", None) or 1e-6,
            "rope_parameters": rope or None,
            "max_position_embeddings": longest if longest and longest > 0 else 2048,
            # Copied, as a list of EOS tokens belongs to the target.
            **{name: copy.copy(getattr(target, name, None)) for name in SPECIAL_TOKENS},
            "target_hidden_size": hidden_size,
            "target_num_hidden_layers": num_layers,
            "target_num_key_value_heads": num_key_value_heads,
            "target_head_dim": head_dim,
        }
        return cls(**(sizes | kwargs))


def size_of(target_config: PreTrainedConfig, name: str) -> int | None:
    """
    A size that all layers of a target have in common, or `None` if its configuration does not tell it.

    Raises:
        ValueError: the size differs from layer to layer.
    """
    try:
        size = getattr(target_config, name, None)
    except RuntimeError:  # how Transformers answers where a configuration has one of its own for each layer
        size = []
    if not isinstance(size, list):
        return size
    if len(set(size)) != 1:
        raise ValueError(
            f"{type(target_config).__name__} has `{name}` layer by layer, and its layers differ; ConFu needs a target "
            "whose layers are all alike."
        )
    return size[0]


def cached_heads(target_config: PreTrainedConfig) -> tuple[int, int] | None:
    """Number and size of the key/value heads that each layer of a target caches; `None` if keys, values or layers
    differ: latent attention caches other things than heads, and Gemma 4 has larger heads in some layers."""
    if getattr(target_config, "kv_lora_rank", None) is not None:
        return None
    try:
        num_heads, num_cached, size = (
            size_of(target_config, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
    except ValueError:
        return None
    size = size or target_config.hidden_size // num_heads
    if (getattr(target_config, "v_head_dim", None) or size) != size:
        return None
    if target_config.model_type == "falcon":  # computes with fewer heads than it caches, or caches one
        one_head = target_config.multi_query and not target_config.new_decoder_architecture
        num_cached = 1 if one_head else num_heads
    return num_cached or num_heads, size


def rope_of(target_config: PreTrainedConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """`rope_parameters` of a target's layers of one type; empty if they have no RoPE."""
    rope = getattr(target_config, "rope_parameters", None) or {}
    # Some configurations have one entry for each type of layer; `None` stands for layers without RoPE.
    if any(isinstance(entry, dict) for entry in rope.values()) or "full_attention" in rope:
        rope = rope.get(layer_type) or {}
    return dict(rope)


def default_taps(num_layers: int) -> list[int]:
    """EAGLE-3's low, middle and high hidden states, 2, L//2 and L-3 (SafeAILab/EAGLE, `modeling_llama_kv.py`).

    Those coincide or leave the range for fewer than 7 layers; then the distinct ones within 1..L-1 are kept.
    """
    return sorted({min(max(index, 1), max(num_layers - 1, 1)) for index in (2, num_layers // 2, num_layers - 3)})


def default_future_states(num_layers: int) -> list[int]:
    """The middle, the high and the final hidden state of the contemplate row."""
    return sorted({*default_taps(num_layers)[-2:], num_layers})


ConFuConfig.register_for_auto_class()

__all__ = ["ConFuConfig"]
