"""Stage contemplation against one row at a time, in fp64."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training.anchors import AnchorSampling
from transformers_confu.training.batch import TokenBatch
from transformers_confu.training.contemplation import compute_foresight


@pytest.mark.parametrize("rotated", [False, True])
def test_loss_and_gradients_are_those_of_single_rows(rotated):
    target = make_tiny_target().requires_grad_(False)
    # f is the final state alone, so the target's head on it is what the contemplate row predicts.
    final = [target.config.num_hidden_layers]
    draft = make_tiny_draft(target, future_hidden_state_indices=final, rotate_soft_prompts=rotated)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    torch.manual_seed(0)
    input_ids = torch.randint(97, (3, 20))
    attention_mask = (torch.arange(20) < torch.tensor([[20], [15], [9]])).long()
    labels = input_ids.masked_fill((torch.arange(20) < 5) | (attention_mask == 0), -100)
    anchors = AnchorSampling(replication=2, max_lag=3).draw(labels, range(3))

    batch = TokenBatch.of({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    objective = compute_foresight(draft, runner, batch, anchors)
    objective.loss_sum.backward()
    gradient = draft.future_channel.soft_prompts.grad.clone()
    draft.zero_grad()

    loss, counted, correct = 0.0, 0, 0
    for text, positions, routed_by, exists in zip(
        input_ids, anchors.positions.tolist(), anchors.routed_by.tolist(), anchors.exists.tolist(), strict=True
    ):
        for anchor, router, real in zip(positions, routed_by, exists, strict=True):
            if not real:
                continue
            cache = DynamicCache(config=target.config)
            states = target(text[None, : anchor + 1], cache=cache, output_hidden_states=True).hidden_states
            final = runner.contemplate(
                cache,
                runner.taps(states)[:, router, None],
                torch.tensor([[anchor + 1]]),
                torch.tensor([[router + 1]]),
                torch.ones(1, 1, anchor + 1, dtype=torch.bool),
            )
            logits = target.lm_head(final)[0]
            loss = loss + nn.functional.cross_entropy(logits, text[anchor + 2, None])
            counted += 1
            correct += int(logits.argmax() == text[anchor + 2])
    loss.backward()
    assert counted == objective.counts["counted"].item() == objective.counts["rows"] > 8
    assert correct == objective.counts["correct"].item()
    torch.testing.assert_close(objective.loss_sum, loss)
    torch.testing.assert_close(gradient, draft.future_channel.soft_prompts.grad)
    assert draft.fc.weight.grad is None
