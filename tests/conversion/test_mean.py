"""The mean of drafts: every weight of it, the first one's form, and drafts that have none."""

import pytest
import torch

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import cli
from transformers_confu.common.loading import load_draft
from transformers_confu.conversion.mean import mean_of_drafts


@pytest.fixture
def branches(tmp_path):
    """A draft and two that learned on from it, and their folders."""
    drafts = [make_tiny_draft(make_tiny_target(), draft_vocab_size=40) for _ in range(3)]
    for number, draft in enumerate(drafts):
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter += number * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
    drafts[0].generation_config.confu_tree_size = 5
    folders = [str(tmp_path / str(number)) for number in range(3)]
    for draft, folder in zip(drafts, folders, strict=True):
        draft.save_pretrained(folder)
    return drafts, folders


def test_every_weight_is_the_mean(branches, tmp_path, capsys):
    drafts, folders = branches
    assert cli.main(["convert", "mean", *folders, "--output", str(tmp_path / "mean")]) == 0
    assert capsys.readouterr().out.endswith("mean: the mean of 3 drafts\n")
    mean = load_draft(tmp_path / "mean")
    assert mean.generation_config.confu_tree_size == 5 and mean.dtype == drafts[0].dtype
    states = [draft.state_dict() for draft in drafts]
    for name, value in mean.state_dict().items():
        if value.is_floating_point():
            first, second, third = (state[name] for state in states)
            torch.testing.assert_close(value, first / 3 + second / 3 + third / 3, msg=name)
            assert not torch.equal(value, first), name
        else:
            assert torch.equal(value, states[0][name])


def test_the_first_decides_dtype_and_stays_as_it_was(branches):
    (first, second, _), _ = branches
    before = [parameter.clone() for parameter in first.parameters()]
    mean = mean_of_drafts([first.to(torch.bfloat16), second])
    assert {parameter.dtype for parameter in mean.parameters()} == {torch.bfloat16}
    assert all(torch.equal(old.bfloat16(), now) for old, now in zip(before, first.parameters(), strict=True))


def test_drafts_without_a_mean(branches, tmp_path, capsys):
    (first, *_), folders = branches
    with pytest.raises(ValueError, match="at least two drafts, and got one"):
        mean_of_drafts([first])
    other = make_tiny_draft(make_tiny_target(), draft_vocab_size=41)
    with pytest.raises(ValueError, match="Draft 2 is of another form than the first .draft_vocab_size was 40, is 41"):
        mean_of_drafts([first, other])
    same_size = make_tiny_draft(make_tiny_target(), draft_vocab_size=40)
    same_size.set_draft_vocabulary(torch.arange(50, 90))
    with pytest.raises(ValueError, match="Draft 3 proposes other tokens than the first"):
        mean_of_drafts([first, first, same_size])
    assert cli.main(["convert", "mean", folders[0], "--output", str(tmp_path / "new")]) == 1
    assert "at least two drafts" in capsys.readouterr().err and not (tmp_path / "new").exists()
