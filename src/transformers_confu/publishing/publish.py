"""
Publishing a draft: it is checked against its target, given a model card and pushed to the Hub: `confu publish --help`.

Everything is built in a scratch folder. What fails, or is refused or interrupted, leaves nothing on this machine, and
on the Hub at most a new repository without files.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import distributions
from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoModel, GenerationConfig, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..common.demo_target import HUB_ID
from ..common.files import share
from ..common.jsonl import read_jsonl
from ..common.loading import TargetOptions, dtype_named, load_draft, load_target_config, load_tokenizer
from ..common.option_files import option
from ..inference.configuration_confu import ConFuConfig
from ..inference.custom_generate import generate
from ..inference.knobs import ConFuKnobs
from ..inference.modeling_confu import ConFuDraftModel
from .check_answers import CHECK_PROMPTS, check_exactness, measure_future_gain
from .compatibility import Finding, check_compatibility
from .model_card import CARD_FILE, CardFacts, model_card


logger = logging.get_logger(__name__)

CUSTOM_GENERATE = "custom_generate/generate.py"


def write_custom_generate(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """
    Add `custom_generate/generate.py` to a saved draft, by which a target decodes with `custom_generate=` and the
    repository's id. The file carries the id for callers that give no name, so `save_pretrained`, which does not know
    it, cannot write it.
    """
    source = Path(generate.__file__).read_text(encoding="utf-8")
    unpublished = "REPOSITORY: str | None = None"
    assert source.count(unpublished) == 1
    if repo_id is not None:
        source = source.replace(unpublished, f'REPOSITORY: str | None = "{repo_id}"')
    path = Path(folder, CUSTOM_GENERATE)
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")


def write_card(folder: str | os.PathLike, facts: CardFacts, repo_id: str, check: str = "") -> None:
    """Write the `README.md` of a saved draft's folder, from its configuration files and the facts."""
    knobs = ConFuKnobs.of(GenerationConfig.from_pretrained(folder))
    card = model_card(facts, ConFuConfig.from_pretrained(folder), repo_id, knobs, check)
    Path(folder, "README.md").write_text(f"{card}\n", encoding="utf-8")


def publish(
    draft: ConFuDraftModel,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str | None = None,
    facts: CardFacts | None = None,
    *,
    dry_run: str | os.PathLike | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    prompts: Sequence[str] | None = None,
) -> str:
    """
    Publish a draft, or write the folder that would be.

    The draft is checked against its target, saved with its code, `custom_generate/` and the target's tokenizer, loaded
    again by that code alone, compared with plain `generate` on a few prompts, given a card, and uploaded in one
    commit, which also removes code and weights that an earlier one left in the repository. LICENSE and NOTICE files of
    the folder that it comes from go along; without any, this package's licence, which holds for the code.

    Args:
        draft ([`ConFuDraftModel`]): In the dtype that is published; its `generation_config` holds the knobs that suit
            it.
        target ([`PreTrainedModel`]): In float32 (or 64) a difference from plain `generate` is an error; in half
            precision, for targets too large for that, differences are counted in the card.
        tokenizer ([`PreTrainedTokenizerBase`]): The target's.
        repo_id (`str`, *optional*): `"organisation/name"`. A dry run can do without.
        facts ([`CardFacts`], *optional*): What the card tells that cannot be read from the draft.
        dry_run (`str` or `os.PathLike`, *optional*): A new folder; everything is written there and nothing uploaded.
        private, create_pr: As `push_to_hub` takes them.
        prompts (`Sequence[str]`, *optional*): Held-out prompts to measure `confu_future_gain` on. Without any, those
            of the check serve, unless the draft's generation config has a gain.

    Returns:
        `str`: Address of the commit or pull request; in a dry run, the folder.

    Raises:
        ValueError: draft, target, card or arguments do not fit; before anything is written or sent.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    facts = named(facts or CardFacts(), target.name_or_path)
    check_arguments(repo_id, facts, dry_run)
    require_fit(check_compatibility(target, tokenizer, draft))
    api = HfApi()
    if dry_run is None:
        api.whoami()  # whoever is not logged in shall know before the check, which takes its time
    beside = None if dry_run is None else Path(dry_run).absolute().parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)  # a folder moves in one step only within its file system
    with tempfile.TemporaryDirectory(prefix=".confu-publish-", dir=beside) as scratch:
        folder = Path(scratch, "draft")
        build(folder, draft, target, tokenizer, repo_id, facts, prompts)
        if dry_run is not None:
            os.replace(folder, dry_run)
            return str(dry_run)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # If it is refused, the repository stays: it may have been there before.
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            create_pr=create_pr,
            commit_message="Upload ConFu draft",
            delete_patterns=["*.py", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth"],
        )
    return commit.pr_url or commit.commit_url


def named(facts: CardFacts, target_name: str) -> CardFacts:
    """The facts with the target's name on the Hub, if it was loaded by that; ValueError if the card names another."""
    if target_name.count("/") != 1 or os.path.isdir(target_name):
        return facts
    if facts.base_model not in (None, target_name):
        raise ValueError(
            f"The card names the target {facts.base_model}, but the draft is checked against {target_name}."
        )
    return replace(facts, base_model=target_name)


def check_arguments(repo_id: str | None, facts: CardFacts, dry_run: str | os.PathLike | None) -> None:
    """Refuse what cannot be published, before any work."""
    if dry_run is None and repo_id is None:
        raise ValueError("Name the repository to publish to, or a new folder for a dry run.")
    if repo_id is not None and (repo_id.count("/") != 1 or not all(repo_id.split("/"))):
        raise ValueError(f"The repository is {repo_id!r}; expected 'organisation/name'.")
    if dry_run is not None and Path(dry_run).exists():
        raise ValueError(f"{dry_run} exists; a dry run writes a new folder. Delete it or choose another.")
    if dry_run is None and facts.base_model is None:
        raise ValueError(
            "The target was not loaded from the Hub, so its name there is not known; give it as `base_model` in "
            f"{CARD_FILE}, such as 'Qwen/Qwen3-4B'."
        )
    if facts.license in (None, "unknown"):
        logger.warning_once(f"No licence is stated; give it as `license` in {CARD_FILE}, such as 'mit'.")


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
    repo_id: str | None,
    facts: CardFacts,
    prompts: Sequence[str] | None = None,
) -> None:
    """Write all that is published into a new folder, after a check of what was written."""
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_custom_generate(folder, repo_id)
    if os.path.isdir(draft.name_or_path):
        for pattern in ("LICENSE*", "NOTICE*"):
            for file in Path(draft.name_or_path).glob(pattern):
                shutil.copyfile(file, folder / file.name)
    if not (folder / "LICENSE").exists():
        # A checkout on the path may come first, whose metadata holds no licence.
        texts = (found.read_text("licenses/LICENSE") for found in distributions(name="transformers-confu"))
        (folder / "LICENSE").write_text(next(filter(None, texts)), encoding="utf-8")
    saved = AutoModel.from_pretrained(folder, trust_remote_code=True).to(target.device)
    gain = ""
    if prompts or getattr(saved.generation_config, "confu_future_gain", None) is None:
        gain = measure_future_gain(target, saved, tokenizer, prompts or CHECK_PROMPTS)
        print(gain, file=sys.stderr)
        saved.generation_config.save_pretrained(folder)
    check = f"{check_exactness(target, saved, tokenizer, CHECK_PROMPTS)} {gain}".rstrip()
    write_card(folder, facts, repo_id or f"your-organisation/{Path(draft.name_or_path or 'draft').name}", check)
    share(folder)


@dataclass(kw_only=True)
class PublishOptions(TargetOptions):
    """Options of `confu publish` beside draft, target, repository and knobs."""

    dry_run: str | None = option("New folder to write everything to; nothing is uploaded.")
    card: str | None = option(f"Facts of the model card; {CARD_FILE} in the draft's folder if not given.")
    card_only: bool = option("Only write README.md into the draft's folder, from its facts.", False)
    prompts: str | None = option(
        "JSONL file of held-out rows with a `prompt`, to measure `confu_future_gain` on; by default a few of our own."
    )
    private: bool = option("Make a new repository private.", False)
    create_pr: bool = option("Open a pull request.", False)
    dtype: str = option("Of the published weights.", "bfloat16")
    target_dtype: str = option("In which the target runs in the check; half precision proves less.", "float32")


def read_prompts(path: str) -> list[str]:
    """The texts `prompt` of a JSONL file."""
    prompts = [row.get("prompt") for row in read_jsonl(path)]
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError(f"{path}: expected rows with a text `prompt`, and at least one.")
    return prompts


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = HfArgumentParser(
        PublishOptions,
        allow_abbrev=False,
        description="Check a draft against its target, write its model card, and push it to the Hub.",
        epilog="Log in first with `hf auth login`. With --dry_run OUT only the folder OUT is written.",
    )
    parser.add_argument("draft", help="folder of the trained draft")
    parser.add_argument("target", help="folder or Hub id of its target, or 'demo' for SmolLM2-135M-Instruct")
    parser.add_argument("repository", nargs="?", help="organisation/name on the Hub; not needed for a dry run")
    for entry in fields(ConFuKnobs):
        name = ConFuKnobs.PREFIX + entry.name
        parser.add_argument(
            f"--{name}",
            f"--{name.replace('_', '-')}",
            type=float if entry.type is float else int,
            help="knob that the published draft decodes with",
        )
    options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)

    # All that can be refused without the target's weights goes first.
    target_name = HUB_ID if positional.target == "demo" else positional.target
    card = Path(options.card or Path(positional.draft, CARD_FILE))
    facts = named(CardFacts.load(card) if options.card or card.is_file() else CardFacts(), target_name)
    if options.card_only:
        write_card(positional.draft, facts, positional.repository or positional.draft)
        print(Path(positional.draft, "README.md"))
        return
    check_arguments(positional.repository, facts, options.dry_run)
    if options.prompts and positional.confu_future_gain is not None:
        raise ValueError("--confu_future_gain says what --prompts would measure; give one of the two.")
    prompts = read_prompts(options.prompts) if options.prompts else None
    tokenizer = load_tokenizer(positional.target, options.trust_remote_code)
    target_config = load_target_config(positional.target, options.trust_remote_code)
    require_fit(check_compatibility(target_config, tokenizer, positional.draft, options.trust_remote_code))

    target, tokenizer = options.load(positional.target, options.target_dtype)
    draft = load_draft(positional.draft, dtype_named(options.dtype))
    for knob in ConFuKnobs.names():
        if getattr(positional, knob) is not None:
            setattr(draft.generation_config, knob, getattr(positional, knob))
    try:
        place = publish(
            draft,
            target,
            tokenizer,
            positional.repository,
            facts,
            dry_run=options.dry_run,
            private=options.private or None,
            create_pr=options.create_pr,
            prompts=prompts,
        )
    except OSError as error:  # all that the Hub refuses is one
        raise OSError(f"Not published: {error}") from error
    print(place)
