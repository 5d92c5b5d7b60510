"""What to ask: Spec-Bench's questions, any file of that form, or plain prompts."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.extras import require
from ..common.jsonl import read_jsonl
from ..common.spec_bench import SPEC_BENCH_URL


MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True)
class Question:
    """One conversation: what the user says, turn by turn. The answers in between are the model's own."""

    id: str
    category: str
    turns: tuple[str, ...]

    @property
    def group(self) -> str:
        """Spec-Bench's six groups: MT-bench's eight categories are one. Any other category is a group of its own."""
        return "mt_bench" if self.category in MT_BENCH_CATEGORIES else self.category


def load_questions(source: str | Path | None) -> list[Question]:
    r"""
    Read a file of questions, or what [`fetch`] makes of its URL.

    It is a `.txt` file of one prompt a line, or a JSONL file (also `.gz`) whose rows hold `question_id`, `category`
    and `turns`, as Spec-Bench's do, or `prompt` and optionally `id` and `category`. ValueError for any other.
    """
    path = fetch(source)
    if not path.is_file():
        raise ValueError(f"There is no file {path}; give a JSONL file of questions or a text file of prompts.")
    if str(source).endswith(".txt"):  # the copy of a URL has a name of its own
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 ({error}); save it as such.") from error
        rows: list[dict[str, Any]] = [{"prompt": line} for line in lines if line.strip()]
    else:
        rows = list(read_jsonl(path))
    questions = [_question(row, number, path) for number, row in enumerate(rows, start=1)]
    if not questions:
        raise ValueError(f"{path} holds no question.")
    identity, times = Counter(question.id for question in questions).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} holds question {identity} twice; make the ids unique.")
    return questions


def _question(row: dict[str, Any], number: int, path: Path) -> Question:
    where = f"{path}, question {number}"
    if "turns" in row and "question_id" in row and "category" in row:
        identity, category, turns = row["question_id"], row["category"], row["turns"]
    elif "prompt" in row:
        identity, category, turns = row.get("id", number), row.get("category", "prompts"), [row["prompt"]]
    else:
        raise ValueError(
            f"{where} has the fields {sorted(row)}; expected `question_id`, `category` and `turns`, or `prompt`."
        )
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{where} (id {identity}) has the turns {turns!r}; expected one or more texts.")
    return Question(str(identity), str(category), tuple(turns))


def stratified(questions: Iterable[Question], num_per_group: int | None) -> list[Question]:
    """
    `num_per_group` questions of each group, in the file's order; all of them for `None`. Within a group the categories
    take turns, so that MT-bench's eight are all there. ValueError if a group holds fewer.
    """
    questions = list(questions)
    if num_per_group is None:
        return questions
    seen: Counter[str] = Counter()
    ranks: dict[Question, int] = {}  # of each in its category
    for question in questions:
        ranks[question] = seen[question.category]
        seen[question.category] += 1
    groups: dict[str, list[Question]] = {}
    for question in sorted(questions, key=ranks.__getitem__):
        groups.setdefault(question.group, []).append(question)
    for group, members in groups.items():
        if len(members) < num_per_group:
            raise ValueError(
                f"Group {group} holds {len(members)} questions, `num_per_group` asks for {num_per_group}; lower it."
            )
    chosen = {question for members in groups.values() for question in members[:num_per_group]}
    return [question for question in questions if question in chosen]


def fetch(source: str | Path | None) -> Path:
    """
    The path of a file of questions: `source` itself; of an `https://` or `hf://datasets/<repository>/<file>` URL the
    copy that `datasets` downloads, decompresses and keeps; without a source Spec-Bench as its authors publish it.
    """
    source = SPEC_BENCH_URL if source is None else str(source)
    if "://" not in source:
        return Path(source)
    datasets: Any = require("datasets")
    try:
        return Path(datasets.DownloadManager(dataset_name="questions").download_and_extract(source))
    except Exception as error:  # offline, a proxy, a mirror: each fails in a class of its own
        raise ValueError(
            f"The questions could not be fetched from {source} ({type(error).__name__}); download them and give the "
            "file as `questions`."
        ) from error
