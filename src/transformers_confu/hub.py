"""Publishing a draft."""

from pathlib import Path

from .custom_generate import generate


def custom_generate_source(repo_id: str | None = None) -> str:
    source = Path(generate.__file__).read_text(encoding="utf-8")
    return (
        source
        if repo_id is None
        else source.replace("REPOSITORY: str | None = None", f'REPOSITORY: str | None = "{repo_id}"', 1)
    )


def write_custom_generate(folder, repo_id: str | None = None) -> None:
    path = Path(folder, "custom_generate", "generate.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(custom_generate_source(repo_id), encoding="utf-8")
