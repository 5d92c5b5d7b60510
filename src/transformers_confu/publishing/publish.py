"""
Publishing a draft: it is checked against its target, given a model card and pushed to the Hub: `confu publish --help`.

Everything is built in a scratch folder. What fails, or is refused or interrupted, leaves nothing on this machine, and
on the Hub at most a new repository without files.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..common.loading import default_device, dtype_named, load_draft, load_target
from ..inference.custom_generate import generate
from ..inference.knobs import ConFuKnobs
from ..inference.modeling_confu import ConFuDraftModel
from .compatibility import Finding, check_fit
from .model_card import CARD_FILE, CardFacts, model_card


logger = logging.get_logger(__name__)

CUSTOM_GENERATE = "custom_generate/generate.py"

CHECK_PROMPTS = [
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "A train travels 60 miles in 1.5 hours. What is its average speed? Explain step by step.",
    "Translate into French: Good morning! The train to Paris leaves at nine.",
]
CHECK_TOKENS = 64
TIE = 1e-4  # the largest gap of two scores that fp32 rounding explains


@dataclass
class ShortCheck:
    r"""
    What greedy answers with a draft were, against plain `generate`.

    Args:
        dtype (`torch.dtype`): Of the target.
        identical, ties (`int`): Answers that are the same; that part where two scores lie within 1e-4.
        answers (`int`): All answers.
        emitted, rounds (`int`): Tokens emitted in rounds, and rounds.
    """

    dtype: torch.dtype
    identical: int = 0
    ties: int = 0
    answers: int = 0
    emitted: int = 0
    rounds: int = 0

    def __str__(self) -> str:
        tau = f"; tau {self.emitted / self.rounds:.2f}" if self.rounds else ""
        ties = f", {self.ties} part at a tie of two scores" if self.ties else ""
        return (
            f"A check before publishing: of {self.answers} greedy answers of up to {CHECK_TOKENS} tokens, target in "
            f"{str(self.dtype).removeprefix('torch.')}, {self.identical} equal plain `generate`'s{ties}{tau}."
        )


def check_exactness(
    target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> ShortCheck:
    r"""
    Greedy answers with and without a draft.

    Raises:
        ValueError: an answer differs in a way that rounding does not explain. In half precision it is only counted.
    """
    check = ShortCheck(target.dtype)
    options = {"do_sample": False, "max_new_tokens": CHECK_TOKENS}
    for prompt in tqdm(prompts, desc="Checking", unit="answer"):
        inputs = encode(prompt, tokenizer).to(target.device)
        length = inputs["input_ids"].shape[1]
        plain = target.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        expected = plain.sequences[0, length:].tolist()
        ids = target.generate(**inputs, **options, assistant_model=draft, return_dict_in_generate=False)
        found = ids[0, length:].tolist()
        check.answers += 1
        check.emitted += sum(draft.last_statistics.emitted)
        check.rounds += draft.last_statistics.rounds
        if found == expected:
            check.identical += 1
            continue
        place = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
        gap = float("inf")
        if place is not None:
            scores = plain.scores[place][0]
            gap = float(scores[expected[place]] - scores[found[place]])
        if gap <= TIE:
            check.ties += 1
        elif target.dtype in (torch.float32, torch.float64):
            raise ValueError(
                f"With this draft the answer to {prompt!r} is not plain generate's: it differs from token "
                f"{'(its end)' if place is None else place + 1} on, where the scores differ by {gap:.2g}. That is a "
                "fault of the decoding code, not of the draft; please report it. Nothing was published."
            )
    return check


def encode(prompt: str, tokenizer: PreTrainedTokenizerBase):
    """A prompt as the target's users would put it: a chat turn where there is a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def custom_generate_source(repo_id: str | None = None) -> str:
    r"""
    The file that lets a target decode with `custom_generate="<repository>"`.

    It belongs to a repository, whose id it carries for callers that give no name, so publishing writes it and
    `save_pretrained` does not. (Nor could it: a draft that was loaded by its own code has not got the file.)
    """
    source = Path(generate.__file__).read_text(encoding="utf-8")
    unpublished = "REPOSITORY: str | None = None"
    assert source.count(unpublished) == 1
    return source if repo_id is None else source.replace(unpublished, f'REPOSITORY: str | None = "{repo_id}"')


def write_custom_generate(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """Add `custom_generate/generate.py` to a saved draft."""
    path = Path(folder, CUSTOM_GENERATE)
    path.parent.mkdir(exist_ok=True)
    path.write_text(custom_generate_source(repo_id), encoding="utf-8")


def publish(
    draft: ConFuDraftModel,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    facts: CardFacts,
    *,
    dry_run: str | os.PathLike | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload ConFu draft",
) -> str:
    r"""
    Publish a draft, or write the folder that would be.

    The draft is checked against its target, saved with its code and `custom_generate/`, loaded again by that code
    alone, compared with plain `generate` on a few prompts, given a card, and uploaded in one commit, which also
    removes code and weights that an earlier one left in the repository.

    ```python
    >>> publish(draft, target, tokenizer, "org/confu-draft", CardFacts.load("card.yaml"), private=True)
    ```

    Args:
        draft ([`ConFuDraftModel`]): In the dtype that is published; its `generation_config` holds the knobs that suit
            it.
        target ([`PreTrainedModel`]): In float32 (or 64) a difference from plain `generate` is an error; in half
            precision, for targets too large for that, differences are counted in the card.
        tokenizer ([`PreTrainedTokenizerBase`]): The target's.
        repo_id (`str`): `"organisation/name"`.
        facts ([`CardFacts`]): What the card tells that cannot be read from the draft.
        dry_run (`str` or `os.PathLike`, *optional*): A new folder; everything is written there and nothing uploaded.
        private, revision, create_pr, token, commit_message: As `push_to_hub` takes them. A branch `revision` is made
            if it is not there.

    Returns:
        `str`: Address of the commit or pull request; in a dry run, the folder.

    Raises:
        ValueError: draft, target, card or arguments do not fit; before anything is written or sent.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    check_arguments(target, repo_id, facts, dry_run, revision, create_pr)
    require_fit(check_fit(target, tokenizer, draft))
    api = HfApi(token=token)
    if dry_run is None:
        api.whoami()  # whoever is not logged in shall know before the check, which takes its time
    beside = None if dry_run is None else Path(dry_run).absolute().parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)  # a folder moves in one step only within its file system
    with tempfile.TemporaryDirectory(prefix=".confu-publish-", dir=beside) as scratch:
        folder = Path(scratch, repo_id.rsplit("/", 1)[-1])
        build(folder, draft, target, tokenizer, repo_id, facts)
        if dry_run is not None:
            os.replace(folder, dry_run)
            return str(dry_run)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # If it is refused, the repository stays: it may have been there before.
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            delete_patterns=["*.py", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth"],
        )
    return commit.pr_url or commit.commit_url


def check_arguments(
    target: PreTrainedModel,
    repo_id: str,
    facts: CardFacts,
    dry_run: str | os.PathLike | None,
    revision: str | None,
    create_pr: bool,
) -> None:
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"The repository is {repo_id!r}; expected 'organisation/name'.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request goes to main, but `revision` is {revision!r}; give one of the two.")
    if dry_run is not None and Path(dry_run).exists():
        raise ValueError(f"{dry_run} exists; a dry run writes a new folder. Delete it or choose another.")
    if facts.untrained:
        raise ValueError("The card says `untrained: true`; a draft is published with its weights. Remove that line.")
    name = target.name_or_path
    if name.count("/") == 1 and not os.path.isdir(name) and name != facts.base_model:
        raise ValueError(f"The card names the target {facts.base_model}, but the draft is checked against {name}.")


def require_fit(findings: list[Finding]) -> None:
    """Refuse what cannot work; warn of the rest."""
    for finding in findings:
        if not finding.is_error:
            logger.warning_once(finding.sentence)  # a folder is checked, and the model that is loaded from it
    if errors := [finding.sentence for finding in findings if finding.is_error]:
        raise ValueError("\n".join(errors))


def build(
    folder: Path,
    draft: ConFuDraftModel,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    facts: CardFacts,
) -> None:
    """Write all that is published into a new folder, after a check of what was written."""
    draft.save_pretrained(folder)
    write_custom_generate(folder, repo_id)
    saved = AutoModel.from_pretrained(folder, trust_remote_code=True).to(target.device)
    check = check_exactness(target, saved, tokenizer, CHECK_PROMPTS)
    card = model_card(facts, saved.config, repo_id, ConFuKnobs.of(saved.generation_config), str(check))
    card.save(folder / "README.md")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="confu publish",
        description="Check a draft against its target, write its model card, and push it to the Hub.",
        epilog="Log in first with `hf auth login`. With --dry-run OUT only the folder OUT is written.",
    )
    parser.add_argument("draft", help="folder of the trained draft")
    parser.add_argument("target", help="folder or Hub id of its target, or 'demo' for SmolLM2-135M-Instruct")
    parser.add_argument("repository", help="organisation/name on the Hub")
    parser.add_argument("--card", help=f"facts of the model card (default: {CARD_FILE} in the draft's folder)")
    parser.add_argument("--dry-run", metavar="OUT", help="write everything to a new folder and upload nothing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; made if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--token", help="access token, in place of the one you are logged in with")
    parser.add_argument("--commit-message", default="Upload ConFu draft", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the published weights (default: %(default)s)")
    parser.add_argument(
        "--target-dtype",
        default="float32",
        help="in which the target runs in the check; half precision proves less (default: %(default)s)",
    )
    for knob in ConFuKnobs.names():
        parser.add_argument(
            f"--{knob.replace('_', '-')}", type=int, metavar="N", help="knob that the published draft decodes with"
        )
    arguments = parser.parse_args(argv)

    try:
        facts = CardFacts.load(arguments.card or Path(arguments.draft, CARD_FILE))
        device = default_device()
        target, tokenizer = load_target(arguments.target, arguments.target_dtype, device)
        require_fit(check_fit(target, tokenizer, arguments.draft))  # its files and its tokenizer, too
        draft = load_draft(arguments.draft, dtype_named(arguments.dtype))
        for knob in ConFuKnobs.names():
            if getattr(arguments, knob) is not None:
                setattr(draft.generation_config, knob, getattr(arguments, knob))
        place = publish(
            draft,
            target,
            tokenizer,
            arguments.repository,
            facts,
            dry_run=arguments.dry_run,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            token=arguments.token,
            commit_message=arguments.commit_message,
        )
    except OSError as error:  # all that the Hub refuses is one
        raise OSError(f"Not published: {error}") from error
    print(place)
