"""What a frozen target says about a dataset, computed once and kept in files.

More than half of a training step is the forward of a target that says the same in every epoch. Of every token the
files hold the taps, and of every teaching position the final hidden state, from which the target's logits over the
draft vocabulary follow by one product with its head. Keys and values are not kept: they are many times larger.

Where soft prompts and `[con]` are frozen, the future predictions at a row's anchors are kept too; training then needs
no forward of the target at all. The anchors of a row are in that case the same in every epoch.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..data.fingerprints import fingerprint_of_dataset, fingerprint_of_module, fingerprint_of_target
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner
from .anchors import Anchors, draft_rows, place_anchors, sample_anchors
from .batch import Texts
from .objective import Objective, Recipe, compute_objective, contemplate
from .teacher import read_texts, summarize, teach_within


@dataclass(frozen=True)
class Field:
    """A tensor of every row: so many vectors for each row, of `shape` each."""

    counts: Sequence[int]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each row."""
        return np.asarray(self.counts, dtype=np.int64) * prod(self.shape) * self.dtype.itemsize


class RowStore:
    r"""
    Tensors of the rows of a dataset in memory-mapped files; each row is written once, in any order, by any process.

    Args:
        folder: Of the files; made where there is none.
        recipe: What the tensors depend on; JSON values.
        fields: By name.
        promised: Bytes that other stores will still take on the same disk, see `unwritten`.

    Raises:
        ValueError: the folder holds tensors of another recipe, or the disk has no room.
    """

    def __init__(self, folder: str | Path, recipe: dict[str, Any], fields: dict[str, Field], promised: int = 0):
        self.folder, self.fields = Path(folder), fields
        record = self.folder / "recipe.json"
        recipe = json.loads(json.dumps(recipe))
        if record.exists():
            found = json.loads(record.read_text(encoding="utf-8"))
            if changed := sorted(name for name in {*found, *recipe} if found.get(name) != recipe.get(name)):
                raise ValueError(
                    f"{self.folder} holds features made with another {' and '.join(changed)}; name another folder, or "
                    "delete this one to make them anew."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        # Before any work, and also where it goes on: a write into a mapped file ends the process if the disk is full.
        needed, free = self.unwritten + promised, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The features not yet written take {needed / 1e9:.1f} GB, and {self.folder} has {free / 1e9:.1f} GB "
                "left; name a folder on a larger disk, or train without them."
            )
        if not record.exists():
            record.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
        self.offsets = {name: np.concatenate([[0], np.cumsum(field.counts)]) for name, field in fields.items()}
        num_rows = len(next(iter(self.offsets.values()))) - 1
        self.tensors = {
            name: self._mapped(name, int(self.offsets[name][-1]), field.shape, field.dtype)
            for name, field in fields.items()
        }
        self.is_written = self._mapped("is_written", num_rows, (), torch.uint8)

    def _mapped(self, name: str, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = count * prod(shape)
        if size == 0:
            return torch.empty((0, *shape), dtype=dtype)
        # A new file is all zeros, and takes room on the disk only where something is written.
        return torch.from_file(str(self.folder / f"{name}.bin"), shared=True, size=size, dtype=dtype).view(-1, *shape)

    @property
    def unwritten(self) -> int:
        """Bytes that the files will still take on the disk: a new one is empty, however long it is."""
        file = self.folder / "is_written.bin"
        sizes = np.sum([field.sizes for field in self.fields.values()], axis=0)  # (rows,)
        return int(sizes[np.fromfile(file, dtype=np.uint8) == 0].sum() if file.exists() else sizes.sum())

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` that are not written yet."""
        return [row for row in rows if not self.is_written[row]]

    def write(self, row: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """All tensors of a row."""
        for name, tensor in tensors.items():
            self._of(name, row).copy_(tensor)
        self.is_written[row] = 1

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """All tensors of a row, still in the files."""
        return {name: self._of(name, row) for name in self.tensors}

    def _of(self, name: str, row: int) -> torch.Tensor:
        first, last = self.offsets[name][row : row + 2]
        return self.tensors[name][first:last]


class CachedFeatures:
    r"""
    The objective of batches of one dataset, whose target features are computed at first sight and read from then on.

    Args:
        draft ([`ConFuDraftModel`]): Trained.
        runner ([`TargetRunner`]): Of the frozen target.
        dataset (`Dataset`): With `input_ids` and `labels`; rows go by their number in it.
        folder: Of the files.
        anchors: `None`, or what [`FixedAnchors`] draws: then future predictions are kept too.

    Raises:
        ValueError: see [`RowStore`]; or the target's scores do not follow from its final hidden state.
    """

    def __init__(
        self,
        draft: ConFuDraftModel,
        runner: TargetRunner,
        dataset: Dataset,
        folder: str | Path,
        anchors: "FixedAnchors | None" = None,
    ):
        self.draft, self.runner, self.anchors = draft, runner, anchors
        config, target = draft.config, runner.target
        dtype = target.get_input_embeddings().weight.dtype
        self.final_state = config.target_num_hidden_layers
        labels = [torch.as_tensor(row) for row in dataset.with_format("numpy")["labels"]]
        teachers = [int(draft_rows(row[None]).sum()) for row in labels]  # a teaching position behind each
        folder = Path(folder)
        recipe: dict[str, Any] = {"dataset": fingerprint_of_dataset(dataset), "target": fingerprint_of_target(target)}
        recipe |= {"taps": config.target_hidden_state_indices, "dtype": str(dtype)}
        self.store = RowStore(
            folder / "target",
            recipe,
            {
                "taps": Field([len(row) for row in labels], (config.taps_size,), dtype),
                "final_states": Field(teachers, (config.target_hidden_size,), dtype),
                "best_tokens": Field(teachers, (), torch.int32),
                "normalizers": Field(teachers, (), torch.promote_types(dtype, torch.float32)),
            },
        )
        self.futures = None
        if anchors is not None:
            counts = [anchors.of(number, row).positions.shape[1] for number, row in enumerate(labels)]
            channel: dict[str, Any] = {
                "channel": fingerprint_of_module(draft.future_channel, anchors.reads),
                "anchors": vars(anchors),
                **{name: getattr(config, name) for name in anchors.reads_of_config},
            }
            self.futures = RowStore(
                folder / "futures",
                recipe | channel,
                {"futures": Field(counts, (config.future_size,), dtype)},
                promised=self.store.unwritten,
            )
        self.head = draft_head(target, draft.draft_token_ids).to(draft.device)

    def compute(self, texts: Texts, rows: Sequence[int], recipe: Recipe) -> Objective:
        """Loss and counts of a batch; `rows` are the numbers of its documents in the dataset, in order."""
        draft = self.draft
        self._complete(texts, rows)
        size = texts.input_ids.shape
        taps = torch.zeros(*size, draft.config.taps_size, device=draft.device, dtype=draft.dtype)
        read = [self.store.read(row) for row in rows]
        for (sequence, first, last), tensors in zip(texts.documents(), read, strict=True):
            taps[sequence, first:last] = tensors["taps"].to(taps)
        of_teachers = {
            name: torch.cat([tensors[name] for tensors in read]).to(draft.device)
            for name in ("final_states", "best_tokens", "normalizers")
        }
        teaching = teach_within(
            draft,
            taps,
            self._draft_logits(of_teachers["final_states"]),
            of_teachers["best_tokens"].long(),
            of_teachers["normalizers"],
        )
        anchors = futures = None
        if self.futures is not None:
            anchors = self._anchors(texts, rows)
            futures = torch.zeros(*anchors.positions.shape, draft.config.future_size).to(taps)
            for sequence, row in enumerate(rows):
                of_row = self.futures.read(row)["futures"]
                futures[sequence, : len(of_row)] = of_row.to(futures)
        return compute_objective(draft, self.runner.embed, texts, teaching, anchors, futures, recipe)

    def _draft_logits(self, final_states: torch.Tensor) -> torch.Tensor:
        """In the target's own dtype, as the target would: autocast is for the draft."""
        with torch.autocast(device_type=final_states.device.type, enabled=False):
            return self.head(final_states)

    def _anchors(self, texts: Texts, rows: Sequence[int]) -> Anchors:
        if texts.document_ids is not None:
            raise ValueError("Kept future predictions belong to rows of their own; train them without packing.")
        drawn = [self.anchors.of(row, labels) for row, labels in zip(rows, texts.labels, strict=True)]
        return place_anchors(
            [anchors.positions[0].cpu() for anchors in drawn],
            [anchors.routed_by[0].cpu() for anchors in drawn],
            texts.labels,
            self.anchors.replication,
        )

    @torch.no_grad()
    def _complete(self, texts: Texts, rows: Sequence[int]) -> None:
        """Let the target read what no file holds yet."""
        lacks_target = set(self.store.missing(rows))
        lacks_futures = set() if self.futures is None else set(self.futures.missing(rows))
        if not lacks_target | lacks_futures:
            return
        config = self.runner.config
        outputs = read_texts(
            self.runner,
            texts,
            keep_logits=texts.teaching_positions,
            hidden_states=sorted({*config.target_hidden_state_indices, self.final_state}),
            keep_cache=bool(lacks_futures),
        )
        is_teacher = texts.teaching_positions
        taps = torch.cat(
            [outputs.hidden_states[index].to(texts.labels.device) for index in config.target_hidden_state_indices], -1
        )
        final_states = outputs.hidden_states[self.final_state].to(texts.labels.device)
        self._check_head(final_states[is_teacher], outputs.logits)
        best_tokens, normalizers = summarize(outputs.logits)
        futures = None
        if lacks_futures:
            anchors = self._anchors(texts, rows)
            futures = contemplate(self.runner, texts, self.runner.taps(outputs.hidden_states), outputs.cache, anchors)
        for (sequence, first, last), row in zip(texts.documents(), rows, strict=True):
            if row in lacks_target:
                place = (sequence, slice(first, last))
                of_row = texts.teacher_numbers[place][is_teacher[place]].to(outputs.logits.device)
                self.store.write(
                    row,
                    {
                        "taps": taps[place],
                        "final_states": final_states[place][is_teacher[place]],
                        "best_tokens": best_tokens[of_row],
                        "normalizers": normalizers[of_row],
                    },
                )
            if row in lacks_futures:
                self.futures.write(row, {"futures": futures[sequence, anchors.exists[sequence]]})

    def _check_head(self, final_states: torch.Tensor, logits: torch.Tensor) -> None:
        """Some targets scale or cap their scores after the head."""
        if not len(logits):
            return
        ours = self._draft_logits(final_states[:1].to(self.head.weight.device)).float()
        theirs = logits[:1, self.draft.draft_token_ids.to(logits.device)].to(ours)
        if (ours - theirs).abs().max() > 0.05 * theirs.abs().max().clamp(min=1):
            raise ValueError(
                f"The scores of {type(self.runner.target).__name__} are no linear map of its final hidden state, so "
                "its features cannot be kept; train without `feature_cache`."
            )


@dataclass(frozen=True)
class FixedAnchors:
    """Anchors that a row has in every epoch; see [`sample_anchors`].

    Attributes:
        replication, max_lag, limit: as there.
        seed: together with the row's number, of the draws.
    """

    replication: int
    max_lag: int
    limit: int | None
    seed: int

    reads = ("soft_prompts", "contemplate_token")
    """Parameters of the future channel that future predictions depend on."""

    reads_of_config = (
        "rotate_soft_prompts",
        "num_contemplate_experts_per_token",
        "rms_norm_eps",
        "future_hidden_state_indices",
    )
    """What they depend on in the draft's configuration, beside the taps."""

    def of(self, row: int, labels: torch.LongTensor) -> Anchors:
        """Anchors of a row, its labels `(T,)`, as a batch of one."""
        with torch.random.fork_rng(devices=[]):  # anchors are drawn on the CPU
            torch.default_generator.manual_seed(int(np.random.SeedSequence((self.seed, row)).generate_state(1)[0]))
            return sample_anchors(labels[None], self.replication, self.max_lag, self.limit)


@torch.no_grad()
def draft_head(target: nn.Module, draft_token_ids: torch.LongTensor) -> nn.Linear:
    """The target's output head for the draft vocabulary alone.

    Its rows are read off by feeding the head unit vectors, so that quantised and adapted heads work too.
    """
    head = target.get_output_embeddings()
    embeddings = target.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=target.device))
    size = embeddings.shape[-1]
    like = {"device": embeddings.device, "dtype": embeddings.dtype}
    token_ids = draft_token_ids.to(embeddings.device)
    bias = head(torch.zeros(1, size, **like))[0, token_ids]
    weight = torch.cat([head(rows)[:, token_ids] - bias for rows in torch.eye(size, **like).split(256)])  # (Ht, Vd)
    ours = nn.Linear(size, len(token_ids), **like)
    ours.weight.copy_(weight.T)
    ours.bias.copy_(bias)
    return ours.requires_grad_(False)
