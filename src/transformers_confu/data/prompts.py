"""A set of prompts from public sources, for the target to answer.

    confu data prompts --sources paper --output prompts.jsonl

reads conversations in any of the usual forms, keeps the user's turns, drops what overlaps with evaluation questions,
what is there twice and what is too short or too long, and writes beside the prompts where each came from, under which
licence, and whom to credit.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from .rows import load_rows


# Words in a row that a prompt must share with an evaluation question to count as one (GPT-3 paper, appendix C).
OVERLAP_WORDS = 13
# A shorter question counts when a prompt holds all of it, a very short one only when it is the whole turn.
_SHORT_QUESTION = 5

_USERS = {"user", "human", "prompter"}

SPEC_BENCH = (
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/"
    "data/spec_bench/question.jsonl"
)
EVALUATION_SETS = [SPEC_BENCH, "openai/gsm8k:main:test", "openai/openai_humaneval:test"]


def user_turns(row: Mapping[str, Any]) -> list[str]:
    """The user's turns of a row: of `messages`, of ShareGPT's `conversations`, of `turns`, or its one `prompt`,
    `question` or `instruction` (with `input` or `instances` behind it). None if it has none of them, or begins with
    an answer, so that its questions lack what they refer to."""
    conversation = row.get("messages") or row.get("conversations")
    if conversation is None and isinstance(row.get("prompt"), list):
        conversation = row["prompt"]
    if conversation:
        spoken = [
            (message.get("role") or message.get("from"), message.get("content") or message.get("value") or "")
            for message in conversation
        ]
        spoken = [(role, text) for role, text in spoken if role != "system"]
        if not spoken or spoken[0][0] not in _USERS:
            return []
        return [text for role, text in spoken if role in _USERS]
    if row.get("turns"):
        return [turn if isinstance(turn, str) else turn["content"] for turn in row["turns"]]
    for name in ("prompt", "question", "instruction"):
        if isinstance(row.get(name), str):
            given = row.get("input") or next((instance.get("input") for instance in row.get("instances") or ()), "")
            return [row[name] + (f"\n\n{given}" if name == "instruction" and given else "")]
    return []


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from.

    Attributes:
        name: goes into ids and the report.
        data: what `load_rows` reads.
        license: of the texts, as their publisher states it; a row's own `license` wins.
        credit: whom or what to name, with an address.
        turns: the user's turns of a row; none for a row to leave out.
    """

    name: str
    data: str
    license: str
    credit: str
    turns: Callable[[Mapping[str, Any]], list[str]] = user_turns


def _field(name: str, form: str = "{}") -> Callable[[Mapping[str, Any]], list[str]]:
    return lambda row: [form.format(row[name])]


def _raw(repository: str, commit: str, path: str) -> str:
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"


def _first_english_turn(row: Mapping[str, Any]) -> list[str]:
    is_first = row["role"] == "prompter" and row["parent_id"] is None and row["lang"] == "en"
    return [row["text"]] if is_first else []


def _with_options(row: Mapping[str, Any]) -> list[str]:
    return [row["question"] + "\nOptions:\n" + "\n".join(row["options"])]


def _abstract(row: Mapping[str, Any]) -> list[str]:
    return ["Summarize this abstract in one or two sentences:\n\n" + " ".join(row["source"])]


_SELF_INSTRUCT = ("yizhongw/self-instruct", "0b26ccaa415992100fa32df62d41b994cf928e23")
_ARENA_HARD = ("lmarena/arena-hard-auto", "196f6b826783b3da7310e361a805fa36f0be83f3")
_AQUA = ("google-deepmind/AQuA", "26b64ed1f22208c6742f47df547dfd65088ec30d")

SOURCES = {
    source.name: source
    for source in (
        # The data of the paper (arXiv 2603.08899), and of EAGLE-3's drafts before it.
        PromptSource(
            "sharegpt",
            "Aeala/ShareGPT_Vicuna_unfiltered:train",
            "Apache-2.0 by its card; typed by users of ChatGPT, whose consent it does not speak of",
            "ShareGPT, collected by Aeala, https://huggingface.co/datasets/Aeala/ShareGPT_Vicuna_unfiltered",
        ),
        PromptSource(
            "ultrachat-200k",
            "HuggingFaceH4/ultrachat_200k:train_sft",
            "MIT",
            "UltraChat (Ding et al., arXiv 2305.14233), filtered by Hugging Face, "
            "https://huggingface.co/datasets/HuggingFaceH4/ultrachat_200k",
        ),
        # Openly licensed, without share-alike: the sources of the SmolLM2 draft that can be read row by row.
        PromptSource(
            "oasst2",
            "OpenAssistant/oasst2:train",
            "Apache-2.0",
            "OpenAssistant Conversations (Köpf et al., arXiv 2304.07327), "
            "https://huggingface.co/datasets/OpenAssistant/oasst2",
            _first_english_turn,
        ),
        PromptSource(
            "gsm8k-train",
            "openai/gsm8k:main:train",
            "MIT",
            "GSM8K (Cobbe et al., arXiv 2110.14168), https://github.com/openai/grade-school-math",
        ),
        PromptSource(
            "mbpp-train",
            "google-research-datasets/mbpp:full:train",
            "CC-BY-4.0",
            "MBPP (Austin et al., arXiv 2108.07732), Google Research, "
            "https://github.com/google-research/google-research/tree/master/mbpp",
            _field("text"),
        ),
        PromptSource(
            "ifeval",
            "google/IFEval:train",
            "Apache-2.0",
            "IFEval (Zhou et al., arXiv 2311.07911), https://huggingface.co/datasets/google/IFEval",
        ),
        PromptSource(
            "awesome-chatgpt-prompts",
            "fka/awesome-chatgpt-prompts:train",
            "CC0-1.0",
            "Awesome ChatGPT Prompts, https://github.com/f/awesome-chatgpt-prompts",
        ),
        *(
            PromptSource(
                f"arena-hard-{version}",
                _raw(*_ARENA_HARD, f"data/arena-hard-{version}/question.jsonl"),
                "Apache-2.0",
                "Arena-Hard (Li et al., arXiv 2406.11939), https://github.com/lmarena/arena-hard-auto",
            )
            for version in ("v0.1", "v2.0")
        ),
        PromptSource(
            "strategyqa-train",
            _raw("eladsegal/strategyqa", "1ba1e97452e189569357876f2854b01357ffbe37", "data/strategyqa/train.json"),
            "MIT",
            "StrategyQA (Geva et al., arXiv 2101.02235), https://github.com/eladsegal/strategyqa",
        ),
        PromptSource(
            "self-instruct-user-oriented",
            _raw(*_SELF_INSTRUCT, "human_eval/user_oriented_instructions.jsonl"),
            "Apache-2.0",
            "Self-Instruct (Wang et al., arXiv 2212.10560), https://github.com/yizhongw/self-instruct",
        ),
        PromptSource(
            "self-instruct-seed",
            _raw(*_SELF_INSTRUCT, "data/seed_tasks.jsonl"),
            "Apache-2.0",
            "Self-Instruct (Wang et al., arXiv 2212.10560), https://github.com/yizhongw/self-instruct",
        ),
        PromptSource(
            "vicuna-bench",
            _raw(
                "lm-sys/FastChat",
                "0e6d3e4beaab66f4d3f93db72541a4abab8af28d",
                "fastchat/llm_judge/data/vicuna_bench/question.jsonl",
            ),
            "Apache-2.0",
            "Vicuna's questions, LMSYS, https://github.com/lm-sys/FastChat",
        ),
        PromptSource(
            "webquestions-train",
            _raw(
                "brmson/dataset-factoid-webquestions",
                "668890853388010fe6ae9a5eb035a7917b88933b",
                "main/trainmodel.json",
            ),
            "CC-BY-4.0",
            "WebQuestions (Berant et al., 2013), as edited by https://github.com/brmson/dataset-factoid-webquestions",
            _field("qText"),
        ),
        *(
            PromptSource(
                f"aqua-{split}",
                _raw(*_AQUA, f"{split}.json"),
                "Apache-2.0",
                "AQuA (Ling et al., arXiv 1705.04146), https://github.com/google-deepmind/AQuA",
                _with_options,
            )
            for split in ("dev", "test")
        ),
        PromptSource(
            "scitldr-train",
            _raw("allenai/scitldr", "5ccad9c00a60ad75c9e04abf7f27d0f53f983b20", "SciTLDR-Data/SciTLDR-A/train.jsonl"),
            "Apache-2.0",
            "SciTLDR (Cachola et al., arXiv 2004.15011), abstracts of papers on OpenReview, "
            "https://github.com/allenai/scitldr",
            _abstract,
        ),
    )
}
SETS = {
    "paper": ["sharegpt", "ultrachat-200k"],
    "open": [name for name in SOURCES if name not in ("sharegpt", "ultrachat-200k")],
}


def find_sources(names: Iterable[str]) -> list[PromptSource]:
    """Sources by the names of `SETS` and `SOURCES`; anything else is data for `load_rows`, whose rows may name their
    own `source` and `license`."""
    sources = []
    for name in names:
        for member in SETS.get(name, [name]):
            unknown = PromptSource(Path(member).name.split(".")[0], member, "not stated", member)
            sources.append(SOURCES.get(member, unknown))
    return sources


class EvaluationOverlap:
    """Tells whether a text holds an evaluation question: any 13 words in a row of one, or the whole of a shorter one.

    Words are runs of letters and digits, in lower case.
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self.runs: dict[int, set[str]] = {}  # by their number of words
        self.wholes: set[str] = set()
        for question in questions:
            words = _words(question)
            if len(words) < _SHORT_QUESTION:
                self.wholes.add(" ".join(words))
            else:
                length = min(len(words), OVERLAP_WORDS)
                self.runs.setdefault(length, set()).update(_runs(words, length))

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        return " ".join(words) in self.wholes or any(
            run in known for length, known in self.runs.items() for run in _runs(words, length)
        )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _runs(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[first : first + length]) for first in range(len(words) - length + 1))


@dataclass
class PromptReport:
    """What `build_prompts` took from where.

    Attributes:
        read, kept: rows by source.
        dropped: rows by source and reason.
        licenses: of each source, as the rows that were kept state it.
        credits: of each source.
    """

    read: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    dropped: dict[str, Counter] = field(default_factory=dict)
    licenses: dict[str, str] = field(default_factory=dict)
    credits: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table in Markdown, for the model card too."""
        lines = [
            "| source | licence | credit | rows | prompts | left out |",
            "|---|---|---|---|---|---|",
        ]
        for name in self.credits:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in self.dropped[name].most_common())
            lines.append(
                f"| {name} | {self.licenses[name]} | {self.credits[name]} | {self.read[name]:,} | "
                f"{self.kept[name]:,} | {reasons} |"
            )
        return "\n".join(lines)


def build_prompts(
    sources: Sequence[PromptSource],
    evaluation: EvaluationOverlap,
    *,
    max_prompts: int | None = None,
    max_per_source: int | None = None,
    max_turns: int = 4,
    min_characters: int = 12,
    max_characters: int = 6000,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], PromptReport]:
    """Prompt rows for `regenerate`, `regenerate_served` and `regenerate_turns`, in random order.

    A row is `{"id", "source", "license", "prompt"}`, or with `turns` in place of `prompt` where the user says more
    than one thing. A conversation ends before a turn that is empty or too long, and goes whole if its first turn is
    too short or too long, if any turn holds an evaluation question, or if another row of these sources begins with
    the same words. Answers and system messages are not taken.

    Args:
        sources: see `find_sources`.
        evaluation: the questions to keep out.
        max_prompts: most rows, drawn from all that passed.
        max_per_source: most rows of one source, drawn likewise.
        max_turns: turns of a conversation; further ones are cut.
        min_characters, max_characters: of a turn; the least applies to the first.
        seed: of the drawing and of the order.
    """
    report = PromptReport()
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for source in sources:
        taken = []
        for index, row in enumerate(tqdm(load_rows(source.data), desc=source.name, unit="row")):
            name = row.get("source") or source.name
            report.read[name] += 1
            report.credits.setdefault(name, source.credit)
            report.licenses.setdefault(name, row.get("license") or source.license)
            dropped = report.dropped.setdefault(name, Counter())
            turns = [turn.strip() for turn in source.turns(row)][:max_turns]
            words = " ".join(_words(turns[0])) if turns else ""
            if not turns:
                dropped["no prompt"] += 1
            elif len(turns[0]) < min_characters:
                dropped["too short"] += 1
            elif len(turns[0]) > max_characters:
                dropped["too long"] += 1
            elif any(turn in evaluation for turn in turns):
                dropped["in an evaluation set"] += 1
            elif words in seen:
                dropped["there already"] += 1
            else:
                seen.add(words)
                unfit = (place for place, turn in enumerate(turns) if not turn or len(turn) > max_characters)
                turns = turns[: next(unfit, None)]
                prompt = {"prompt": turns[0]} if len(turns) == 1 else {"turns": turns}
                license = row.get("license") or source.license
                taken.append({"id": f"{source.name}-{index:06d}", "source": name, "license": license} | prompt)
        rows += _draw(taken, max_per_source, f"{seed}/{source.name}", report)
    rows = _draw(rows, max_prompts, f"{seed}", report)
    report.kept = Counter(row["source"] for row in rows)
    return rows, report


def _draw(rows: list[dict[str, Any]], most: int | None, seed: str, report: PromptReport) -> list[dict[str, Any]]:
    random.Random(seed).shuffle(rows)
    most = len(rows) if most is None else most
    for row in rows[most:]:
        report.dropped[row["source"]]["not drawn"] += 1
    return rows[:most]


@dataclass
class PromptArguments:
    """Arguments of the command line."""

    output: str = field(metadata={"help": "JSONL file of the prompts; its provenance goes beside it, as .md."})
    sources: list[str] = field(
        default_factory=lambda: ["open"],
        metadata={"help": "'open', 'paper', single sources of them, files or Hub datasets (id:configuration:split)."},
    )
    evaluation: list[str] = field(
        default_factory=lambda: list(EVALUATION_SETS),
        metadata={"help": "Files or Hub datasets of questions to keep out; Spec-Bench, GSM8K's test, HumanEval."},
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Most prompts, drawn from all."})
    max_per_source: int | None = field(default=None, metadata={"help": "Most prompts of one source."})
    max_turns: int = field(default=4, metadata={"help": "User's turns of a conversation."})
    min_characters: int = field(default=12, metadata={"help": "Shortest first turn."})
    max_characters: int = field(default=6000, metadata={"help": "Longest turn."})
    seed: int = field(default=0, metadata={"help": "Seed of drawing and order."})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `build_prompts` from the command line; `argv` defaults to the process's arguments."""
    (arguments,) = HfArgumentParser(PromptArguments).parse_args_into_dataclasses(args=argv)
    output = Path(arguments.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"output is {output}, expected a .jsonl file.")
    questions = [turn for name in arguments.evaluation for row in load_rows(name) for turn in user_turns(row)]
    rows, report = build_prompts(
        find_sources(arguments.sources),
        EvaluationOverlap(questions),
        max_prompts=arguments.max_prompts,
        max_per_source=arguments.max_per_source,
        max_turns=arguments.max_turns,
        min_characters=arguments.min_characters,
        max_characters=arguments.max_characters,
        seed=arguments.seed,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    provenance = (
        f"# Prompts of {output.name}\n\n{len(rows):,} prompts, seed {arguments.seed}.\n\n{report}\n\n"
        f"Left out as in an evaluation set: a turn that shares {OVERLAP_WORDS} words in a row with one of "
        f"{len(questions):,} questions, or holds a shorter one, of:\n\n"
        + "".join(f"- {name}\n" for name in arguments.evaluation)
    )
    output.with_suffix(".md").write_text(provenance, encoding="utf-8")
    # Last, and at once: where it is, it is whole.
    unfinished = output.with_suffix(".jsonl.unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(output)
    print(report)
    print(f"{len(rows):,} prompts: {output}, their provenance: {output.with_suffix('.md')}")
