"""What a target reads of a row: the embedding of a token, or `[con]`; in some families also an input for every layer.

A target is given embeddings, since contemplate rows have no token. So what its own `forward` makes of token ids is
made here, for the few families that do more than look them up once.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class RowInputs:
    r"""
    Makes the inputs of a target's forward over rows of tokens and of `[con]`.

    Gemma 3n and the small Gemma 4 look up a token once more for every layer (`hidden_size_per_layer_input`). A
    contemplate row has no token, and gets zeros there; what the layers make of its embedding is added all the same.

    Args:
        target ([`PreTrainedModel`]): The target.
    """

    def __init__(self, target: PreTrainedModel):
        self.embed, self.decoder = target.get_input_embeddings(), target.get_decoder()
        config = target.config
        text_config = config.get_text_config(decoder=True)
        self.has_layer_inputs = bool(getattr(text_config, "hidden_size_per_layer_input", 0))
        # Falcon-H1 scales embeddings that it looks up, but none that it is given.
        self.scale = text_config.embedding_multiplier if text_config.model_type == "falcon_h1" else None
        # The ids that mark an image or a sound may occur in a text, and are then embedded otherwise: by Gemma 4 as
        # padding, by Gemma 3n by modules of their own.
        self.placeholders: list[int] = []
        if config.model_type in ("gemma4", "gemma4_unified"):
            marks = (config.image_token_id, config.video_token_id, config.audio_token_id)
            self.placeholders = [mark for mark in marks if mark is not None]
            self.padding = config.text_config.pad_token_id
        model = target.base_model
        self.embedders: list[nn.Module] = (
            [model.embed_vision, model.embed_audio] if config.model_type == "gemma3n" else []
        )

    def __call__(self, token_ids: torch.LongTensor, contemplate: torch.Tensor | None = None) -> dict[str, Any]:
        r"""
        Arguments of the target's forward.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, N)`): Of the first rows; N may be 0.
            contemplate (`torch.FloatTensor` of shape `(batch, C, Ht)`, *optional*): `[con]` of the rows behind them.
        """
        for placeholder in self.placeholders:
            token_ids = token_ids.masked_fill(token_ids == placeholder, self.padding)
        inputs_embeds = self.embed(token_ids)  # (B, N, Ht)
        for embedder in self.embedders:
            first = embedder.vocab_offset
            theirs = (token_ids >= first) & (token_ids < first + embedder.vocab_size)
            embeds = embedder(input_ids=token_ids.where(theirs, first)).to(inputs_embeds)
            inputs_embeds = embeds.where(theirs[..., None], inputs_embeds)
        if self.scale is not None:
            inputs_embeds = inputs_embeds * self.scale
        inputs = {"inputs_embeds": inputs_embeds}
        if self.has_layer_inputs:
            inputs["per_layer_inputs"] = self.decoder.get_per_layer_inputs(token_ids)  # (B, N, layers, size)
        if contemplate is not None:
            inputs["inputs_embeds"] = torch.cat([inputs_embeds, contemplate.to(inputs_embeds)], dim=1)
            if self.has_layer_inputs:
                inputs["per_layer_inputs"] = nn.functional.pad(
                    inputs["per_layer_inputs"], (0, 0, 0, 0, 0, contemplate.shape[1])
                )
        return inputs
