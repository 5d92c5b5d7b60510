"""The target of a training run: sharded, it computes and passes gradients as before."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training.anchors import AnchorSampling
from transformers_confu.training.batch import TokenBatch
from transformers_confu.training.objective import Recipe, compute_live
from transformers_confu.training.teacher import freeze, shard


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_target_teaches_the_same(one_process):
    # That several processes agree is tested in test_processes.py; here, what is sharded and what is not.
    whole, sharded = freeze(make_tiny_target()), freeze(make_tiny_target())
    shard(sharded, torch.device("cpu"))
    shard(sharded, torch.device("cpu"))  # by the next stage
    layers = set(sharded.get_decoder().layers.parameters())
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor) == (parameter in layers), name

    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(12) < 3, -100)
    batch = TokenBatch.of({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    gradients = []
    for target in (whole, sharded):
        draft = make_tiny_draft(whole).train()
        anchors = AnchorSampling(replication=1, max_lag=3).draw(labels, range(2))
        for _ in range(2):
            runner = TargetRunner(target, draft.config, draft.future_channel)
            compute_live(draft, runner, batch, anchors, Recipe(num_steps=3, decay=0.8)).loss_sum.backward()
        gradients.append({name: parameter.grad for name, parameter in draft.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_target_that_names_no_layers_is_not_sharded(one_process):
    target = make_tiny_target()
    target._no_split_modules = None
    with pytest.raises(ValueError, match="LlamaForCausalLM names no layers that may be sharded"):
        shard(target, torch.device("cpu"))
