"""What a frozen target says about rows, computed once and kept in files.

More than half of a training step is the forward of a target that says the same in every epoch. Of every token the
files hold the taps, and of every teaching position the final hidden state, from which the target's logits over the
draft vocabulary follow by one product with its head. Keys and values are not kept: they are many times larger.

Where soft prompts and `[con]` are frozen, the future predictions at a row's anchors are kept too; training then needs
no forward of the target at all. The anchors of a row are in that case the same in every epoch.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..common.files import differences, read_json, write_atomically
from ..data.fingerprints import fingerprint_of_module, fingerprint_of_target
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner, main_stream
from .anchors import Anchors, AnchorSampling
from .batch import TokenBatch, row_key, texts_of
from .teacher import Teaching, contemplate, read_batch, summarize, teach_within


# What future predictions depend on, beside the taps: parameters of the future channel, and entries of the draft's
# configuration.
_READ_PARAMETERS = ("soft_prompts", "contemplate_token")
_READ_OPTIONS = (
    "rotate_soft_prompts",
    "num_contemplate_experts_per_token",
    "rms_norm_eps",
    "future_hidden_state_indices",
)


class KeptFeatures:
    r"""
    What the target says about batches, computed at first sight and read from then on. Each row has a file, named by
    its content, so one folder may serve several datasets; it is written once, by any process.

    Args:
        draft ([`ConFuDraftModel`]): Trained.
        runner ([`TargetRunner`]): Of the frozen target.
        folder: Of the files.
        sampling ([`AnchorSampling`], *optional*): Of the anchors whose future predictions are kept too; they are
            drawn at step 0.

    Raises:
        ValueError: the folder holds features that were made with something else; or the target's scores do not follow
            from its final hidden state.
    """

    def __init__(
        self,
        draft: ConFuDraftModel,
        runner: TargetRunner,
        folder: str | Path,
        sampling: AnchorSampling | None = None,
    ):
        self.draft, self.runner = draft, runner
        self.folder = Path(folder, "plain" if sampling is None else "with_futures")
        config, target = draft.config, runner.target
        self.dtype = target.get_input_embeddings().weight.dtype
        made_with: dict[str, Any] = {
            "target": fingerprint_of_target(target),
            "taps": config.target_hidden_state_indices,
            "dtype": str(self.dtype),
        }
        if sampling is not None:
            made_with |= {"channel": fingerprint_of_module(draft.future_channel, _READ_PARAMETERS)}
            made_with |= {"anchors": asdict(sampling)} | {name: getattr(config, name) for name in _READ_OPTIONS}
        record = self.folder / "made_with.json"
        if record.exists() and (changed := differences(read_json(record), made_with)):
            raise ValueError(
                f"{self.folder} holds features made with something else ({changed}); name another folder, or delete "
                "this one to make them anew."
            )
        write_atomically(record, json.dumps(made_with, indent=2))
        self.head = DraftHead(target, draft.draft_token_ids).to(draft.device)

    def _file(self, key: int) -> Path:
        return self.folder / f"{key:016x}.safetensors"

    def check_room(self, datasets: Iterable[Dataset]) -> None:
        """ValueError where the disk has no room for the features of all rows that have none yet."""
        tokens = 0
        for dataset in datasets:
            for rows in dataset.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
                pairs = zip(rows["input_ids"], rows["labels"], strict=True)
                tokens += sum(len(ids) for ids, labels in pairs if not self._file(row_key(ids, labels)).exists())
        config = self.draft.config
        needed = tokens * (config.taps_size + config.target_hidden_size) * self.dtype.itemsize
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise ValueError(
                f"The features not yet written take up to {needed / 1e9:.1f} GB, and {self.folder} has "
                f"{free / 1e9:.1f} GB left; name a folder on a larger disk, or train without them."
            )

    def teach(self, batch: TokenBatch, anchors: Anchors | None) -> Teaching:
        """As [`~teacher.teach`], at the anchors that `sampling` draws for these rows, or none without it."""
        draft, files = self.draft, list(map(self._file, batch.row_keys))
        if missing := [number for number, file in enumerate(files) if not file.exists()]:
            some_anchors = None if anchors is None else texts_of(anchors, missing)
            self._write(texts_of(batch, missing), some_anchors, [files[number] for number in missing])
        rows = [load_file(file) for file in files]
        taps = pad_sequence([row["taps"] for row in rows], batch_first=True).to(draft.device, draft.dtype)
        final_states, *of_all_tokens = (
            torch.cat([row[name] for row in rows]).to(draft.device)
            for name in ("final_states", "best_tokens", "normalizers")
        )
        teaching = teach_within(draft, taps, self.head(final_states), *of_all_tokens)
        if anchors is not None:
            teaching.futures = pad_sequence([row["futures"] for row in rows], batch_first=True).to(taps)
        return teaching

    @torch.no_grad()
    def _write(self, batch: TokenBatch, anchors: Anchors | None, files: list[Path]) -> None:
        """Let the target read a batch, and keep its rows in these files."""
        indices, is_teacher = self.draft.config.target_hidden_state_indices, batch.teaching_positions
        final = self.draft.config.target_num_hidden_layers
        outputs = read_batch(
            self.runner,
            batch,
            keep_logits=is_teacher,
            hidden_states=sorted({*indices, final}),
            keep_cache=anchors is not None,
        )
        states = [main_stream(outputs.hidden_states[index]) for index in (*indices, final)]
        *taps, final_states = (state.to(batch.labels.device) for state in states)
        taps = torch.cat(taps, dim=-1)
        self.head.check(final_states[is_teacher], outputs.logits)
        best_tokens, normalizers = summarize(outputs.logits)
        if anchors is not None:
            futures = contemplate(self.runner, batch, self.runner.taps(outputs.hidden_states), outputs.cache, anchors)
        for number, file in enumerate(files):
            of_row = batch.teacher_numbers[number, is_teacher[number]].to(outputs.logits.device)
            row = {
                "taps": taps[number, batch.attention_mask[number].bool()],
                "final_states": final_states[number, is_teacher[number]],
                "best_tokens": best_tokens[of_row],
                "normalizers": normalizers[of_row],
            }
            if anchors is not None:
                row["futures"] = futures[number, anchors.exists[number]]
            part = file.with_suffix(f".{os.getpid()}")  # a process that dies leaves no torn file
            save_file({name: tensor.cpu().contiguous() for name, tensor in row.items()}, part)
            os.replace(part, file)


class DraftHead(nn.Module):
    r"""
    The target's scores of the draft vocabulary alone, from its final hidden states.

    The rows of its head are read off by feeding it unit vectors, so that quantised and adapted heads work too. Some
    targets scale or cap their scores behind the head; how is read from their configuration, by the names that
    Transformers has for it.

    Args:
        target ([`PreTrainedModel`]): The target.
        draft_token_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`): Its tokens that the draft can predict.
    """

    @torch.no_grad()
    def __init__(self, target: PreTrainedModel, draft_token_ids: torch.LongTensor):
        super().__init__()
        head = target.get_output_embeddings()
        embeddings = target.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=target.device))
        size = embeddings.shape[-1]
        like = {"device": embeddings.device, "dtype": embeddings.dtype}
        self.token_ids = draft_token_ids.to(embeddings.device)
        bias = head(torch.zeros(1, size, **like))[0, self.token_ids]
        weight = torch.cat([head(rows)[:, self.token_ids] - bias for rows in torch.eye(size, **like).split(256)])
        self.linear = nn.Linear(size, len(self.token_ids), **like)
        self.linear.weight.copy_(weight.T)
        self.linear.bias.copy_(bias)
        self.requires_grad_(False)
        config = target.config.get_text_config(decoder=True)
        self.name = type(target).__name__
        self.scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
        self.cap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def forward(self, final_states: torch.Tensor) -> torch.Tensor:
        """`(rows, Ht)` -> `(rows, Vd)`, in the target's own dtype, as the target would: autocast is for the draft."""
        with torch.autocast(device_type=final_states.device.type, enabled=False):
            logits = self.linear(final_states) * self.scale / self.divisor
            return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def check(self, final_states: torch.Tensor, logits: torch.Tensor) -> None:
        """ValueError where scores `(rows, V)` do not follow from final states `(rows, Ht)` in this way."""
        if not len(logits):
            return
        ours = self(final_states.to(self.linear.weight.device)).float()
        theirs = logits[:, self.token_ids.to(logits.device)].to(ours)
        # Each of both is rounded about twice on its way, to half the dtype's precision.
        tolerance = max(1e-4, 3 * torch.finfo(logits.dtype).eps)
        if ((ours - theirs).abs() > tolerance * theirs.abs().amax(dim=-1, keepdim=True).clamp(min=1)).any():
            raise ValueError(
                f"The scores of {self.name} do not follow from its final hidden state in any way known here, so its "
                "features cannot be kept; train without `feature_cache`."
            )
