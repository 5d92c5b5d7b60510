"""A draft is carried over to a target whose table of tokens was resized: same proposals, same text."""

import pytest
import torch

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import cli
from transformers_confu.common.loading import load_draft
from transformers_confu.conversion.resize import resize_vocabulary


@pytest.mark.parametrize(("vocab_size", "own_embeddings"), [(128, True), (90, True), (90, False)])
def test_a_draft_is_carried_over(tmp_path, vocab_size, own_embeddings):
    target, resized = make_tiny_target(), make_tiny_target()
    resized.resize_token_embeddings(vocab_size)
    narrow = {"hidden_size": 16, "head_dim": 4} if own_embeddings else {}
    draft = make_tiny_draft(target, draft_vocab_size=40, **narrow)
    draft.set_draft_vocabulary(torch.arange(5, 85, 2))
    draft.save_pretrained(tmp_path / "draft")
    arguments = ["convert", "resize", str(tmp_path / "draft"), "--output", str(tmp_path / "new")]
    assert cli.main([*arguments, f"--vocab_size={vocab_size}"]) == 0
    carried = load_draft(tmp_path / "new")
    assert torch.equal(carried.draft_token_ids, draft.draft_token_ids)
    # On old tokens the rows of the resized target are those of the old one, and so are text and proposals.
    texts, emitted = [], []
    for model, assistant in ((target, draft), (resized, carried)):
        only_old = {"suppress_tokens": list(range(90, model.config.vocab_size)), "do_sample": False}
        prompt = torch.tensor([[1, 5, 9]])
        texts.append(model.generate(prompt, assistant_model=assistant, max_new_tokens=20, **only_old))
        emitted.append(assistant.last_statistics.emitted)
    assert torch.equal(*texts) and emitted[0] == emitted[1]


def test_tokens_that_a_target_lost_cannot_be_carried_over():
    with pytest.raises(ValueError, match="proposes token 96, but a target of 90 tokens has none such"):
        resize_vocabulary(make_tiny_draft(make_tiny_target()), 90)
