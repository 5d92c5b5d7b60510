"""Muon for the matrices inside of a draft, AdamW for all else, as one optimiser for Trainer."""

from typing import Any

import torch
from torch import nn

from .arguments import ConFuTrainingArguments


class MuonAndAdamW(torch.optim.Optimizer):
    """Head, embeddings, experts and norms are AdamW's. Muon's updates are scaled to the size of AdamW's."""

    def __init__(self, draft: nn.Module, args: ConFuTrainingArguments):
        named = [(name, value) for name, value in draft.named_parameters() if value.requires_grad]
        of_muon = {
            name
            for name, value in named
            if value.ndim == 2 and not name.startswith(("lm_head.", "embed_tokens.")) and not name.endswith("experts")
        }
        muon = [value for name, value in named if name in of_muon]
        adamw = [value for name, value in named if name not in of_muon]
        self.parts = [
            torch.optim.Muon(muon, lr=args.muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                adamw,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            ),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
