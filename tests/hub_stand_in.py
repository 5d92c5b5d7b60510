"""A Hugging Face Hub without a network: a download cache as huggingface_hub lays it out."""

import hashlib
import shutil
from pathlib import Path


def fill_hub_cache(cache_dir: Path, repo_id: str, revisions: dict[str, Path]) -> dict[str, str]:
    """
    Put folders into a download cache as if they had been fetched.

    Args:
        cache_dir: What to pass as `cache_dir`, with `local_files_only=True`.
        repo_id: Such as `"org/draft"`.
        revisions: Branch or tag name -> folder with its files.

    Returns:
        Branch or tag name -> commit hash.
    """
    repository = cache_dir / f"models--{repo_id.replace('/', '--')}"
    commits = {}
    for name, folder in revisions.items():
        # Of the contents, as Transformers keeps the code of a commit that it has seen.
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        commits[name] = hashlib.sha1(b"".join(str(file).encode() + file.read_bytes() for file in files)).hexdigest()
        shutil.copytree(folder, repository / "snapshots" / commits[name])
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commits[name])
    return commits
