"""
From records to figures: pooled rates, spread over runs, confidence intervals over questions.

The unit is the question, all its turns and runs together. Intervals are those of a paired bootstrap, stratified by
group: questions are drawn with replacement within each group, the same for all arms, so that a difference between two
arms is not blurred by how much questions differ.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .arms import Arm, Setting, labels
from .metrics.confu_acceptance import acceptance
from .records import RecordFile


RESAMPLES = 2000
CONFIDENCE = 0.95
FEW = 10  # questions: an interval of fewer looks more certain than it is, and is marked
CACHES = ("target_cache_bytes", "draft_cache_bytes", "transient_cache_bytes")


class Interval(NamedTuple):
    """A figure with its confidence interval (NaN where there is none) and the number of questions behind it."""

    value: float
    low: float
    high: float
    questions: int

    def __format__(self, spec: str) -> str:
        if np.isnan(self.value):
            return ""
        text = format(self.value, spec)
        if np.isnan(self.low) or self.low == self.high:
            return text
        return f"{text} ({self.low:{spec}} to {self.high:{spec}})" + ("*" if self.questions < FEW else "")


class Comparison:
    """
    All arms of a measurement under one setting, on the questions of the first run, in the order of their ids, so that
    resamples of two measurements of the same questions agree; of later runs, those that are complete. `names` is how
    the arms are called, see [`labels`].
    """

    def __init__(self, file: RecordFile, setting: Setting, names: dict[Arm, str] | None = None):
        self.file, self.setting = file, setting
        asked: dict[int, list[str]] = {}  # run -> question ids
        for (of_setting, run, question), unit in file.units.items():
            if of_setting == setting and unit["answers"][0]["turns"]:  # else it exceeds the target's context
                asked.setdefault(run, []).append(question)
        self.questions = sorted(asked[min(asked)], key=lambda question: (len(question), question))
        self.runs = sorted(run for run, questions in asked.items() if set(questions) >= set(self.questions))
        units = [file.units[setting, run, question] for run in self.runs for question in self.questions]
        arms = [Arm(**answer["arm"]) for answer in units[0]["answers"]]
        names = names or labels(arms)
        self.arms = {names[arm]: arm for arm in arms}
        self.plain = next(name for name, arm in self.arms.items() if arm.kind == "plain")
        self.drafted = [name for name, arm in self.arms.items() if arm.kind == "draft"]
        self.answers = pd.DataFrame(
            [
                {"question": unit["question_id"], "group": unit["group"], "run": unit["run"]}
                | {"arm": names[Arm(**answer["arm"])]}
                | _counts(answer)
                for unit in units
                for answer in unit["answers"]
            ]
        )
        self.groups = {
            str(group): [self.questions.index(question) for question in members.unique()]
            for group, members in self.answers.groupby("group", sort=False)["question"]
        }
        sums = self.answers.groupby(["question", "arm"])[["tokens", "seconds", "emitted", "rounds"]].sum()
        by_question = {name: sums[name].unstack("arm").loc[self.questions, list(self.arms)] for name in sums}
        self.tokens, self.seconds, self.emitted, self.rounds = by_question.values()  # each (questions, arms)
        # How often each question counts, (1 + RESAMPLES, questions): once, and in every resample.
        generator = np.random.default_rng(0)
        self._weights = np.ones((1 + RESAMPLES, len(self.questions)))
        for members in self.groups.values():
            shares = np.full(len(members), 1 / len(members))
            self._weights[1:, members] = generator.multinomial(len(members), shares, size=RESAMPLES)

    def __str__(self) -> str:
        return f"{self.file.name} ({len(self.questions)} questions, {self.setting})"

    # Each of these gives samples (1 + RESAMPLES, arms): the figure itself, and that of every resample.

    def tau(self, group: str | None = None) -> pd.DataFrame:
        """Tokens emitted in rounds / rounds."""
        return self._quotient(self.emitted, self.rounds, group)

    def rate(self, group: str | None = None) -> pd.DataFrame:
        """Tokens per second: total tokens over total time, all runs together."""
        return self._quotient(self.tokens, self.seconds, group)

    def speedup_total(self, group: str | None = None) -> pd.DataFrame:
        """Rate over that of plain generation."""
        rate = self.rate(group)
        return rate.div(rate[self.plain], axis=0)

    def speedup_mean(self, group: str | None = None) -> pd.DataFrame:
        """Mean over questions of the ratio of rates."""
        rate = self.tokens / self.seconds
        ratios = rate.div(rate[self.plain], axis=0)
        return self._quotient(ratios, ratios * 0 + 1, group)

    def limit(self, arm: str) -> float:
        """Speed-up, total, if a draft's rounds took the target's forward over their rows and nothing else."""
        if arm not in self.drafted:
            return float("nan")
        sums = self.of(arm)[["tokens", "part_prefill", "part_target"]].sum()
        rate = sums["tokens"] / (sums["part_prefill"] + sums["part_target"])
        return float(rate / self.rate()[self.plain][0])

    def _quotient(self, above: pd.DataFrame, below: pd.DataFrame, group: str | None) -> pd.DataFrame:
        members = self._members(group)
        weights = self._weights[:, members]
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = (weights @ above.to_numpy()[members]) / (weights @ below.to_numpy()[members])
        return pd.DataFrame(samples, columns=above.columns)

    def _members(self, group: str | None) -> list[int]:
        return list(range(len(self.questions))) if group is None else self.groups[group]

    def interval(self, samples: pd.Series, group: str | None = None) -> Interval:
        """A figure from its samples, with the percentile interval if a group holds two questions to draw from."""
        groups = self.groups.values() if group is None else [self.groups[group]]
        low = high = np.nan
        if max(map(len, groups)) > 1:
            low, high = samples[1:].quantile([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(samples[0], float(low), float(high), len(self._members(group)))

    def by_run(self, arm: str) -> pd.DataFrame:
        """Tokens per second (`rate`) of an arm in every run, and its speed-up, total."""
        sums = self.answers.groupby(["run", "arm"])[["tokens", "seconds"]].sum()
        rates = (sums["tokens"] / sums["seconds"]).unstack("arm")  # (runs, arms)
        return pd.DataFrame({"rate": rates[arm], "speedup": rates[arm] / rates[self.plain]})

    def of(self, arm: str) -> pd.DataFrame:
        """The answers of one arm, a row each."""
        return self.answers[self.answers["arm"] == arm]

    def round_parts(self, arm: str) -> dict[str, float]:
        """
        Mean seconds of a round of a draft by part; `rest` is what the call of `generate` took besides: preparation and
        the loop itself. `prefill` is per call, not per round. Empty without a round.
        """
        sums = self.of(arm).filter(regex="^part_|^(seconds|rounds|calls)$").sum()
        if not sums["rounds"]:
            return {}
        parts = {name.removeprefix("part_"): value for name, value in sums.items() if name.startswith("part_")}
        rest = sums["seconds"] - sum(parts.values())
        prefill = parts.pop("prefill")
        means = {name: value / sums["rounds"] for name, value in (parts | {"rest": rest}).items()}
        return means | {"round": sum(means.values()), "prefill": prefill / sums["calls"]}

    def acceptance(self, arm: str) -> dict[str, Any]:
        """The metric of that name over a draft's rounds, survival up to the depth of its tree (if that is fixed)."""
        answers = self.of(arm)
        result = acceptance(answers["by_round"].tolist(), answers["accepted"].tolist())
        result["survival"] += [0.0] * ((self.arms[arm].depth or 0) - len(result["survival"]))
        return result

    def references(self, arm: str) -> list[str]:
        """What a draft's arm is set against: EAGLE-3 mode with the same tree, of every draft; each pair once."""

        def tree(name: str) -> tuple[int, int, int]:
            return self.arms[name].tree_size, self.arms[name].depth, self.arms[name].branching

        alike = [other for other in self.drafted if self.arms[other].contemplation == 0 and tree(other) == tree(arm)]
        return alike[alike.index(arm) + 1 :] if self.arms[arm].contemplation == 0 else alike


def _counts(answer: dict[str, Any]) -> dict[str, Any]:
    """What an answer adds to the sums, and where it departs from plain generation."""
    turns = answer["turns"]
    counts: dict[str, Any] = {
        "calls": len(turns),
        "tokens": sum(len(turn["token_ids"]) for turn in turns),
        "seconds": sum(turn["seconds"] for turn in turns),
        "peak": max(turn["peak_memory_bytes"] or np.nan for turn in turns),
        "departs": answer["departure"] is not None,
        **{name: (answer["departure"] or {}).get(name, np.nan) for name in ("position", "gap")},
    }
    rounds = [turn["rounds"] for turn in turns]
    if rounds[0] is None:  # plain: every forward but prefill's emits one token
        emitted = [1] * (counts["tokens"] - len(turns))
    else:
        emitted = [count for entry in rounds for count in entry["emitted"]]
    counts |= {"rounds": len(emitted), "emitted": sum(emitted), "by_round": emitted}
    if rounds[0] is not None and "accepted" in rounds[0]:
        counts["accepted"] = [count for entry in rounds for count in entry["accepted"]]
        counts |= {name: sum(entry[name] for entry in rounds) for name in ("tree_nodes", "contemplate_rows")}
        counts |= {name: max(entry[name] for entry in rounds) for name in CACHES}
        counts |= {f"part_{part}": sum(entry["seconds"][part] for entry in rounds) for part in rounds[0]["seconds"]}
    return counts


def comparisons_of(files: Iterable[RecordFile]) -> list[Comparison]:
    """Every setting of every file, with one set of names for all arms."""
    files = list(files)
    settings: list[tuple[RecordFile, Setting]] = []
    for file in files:
        answered = dict.fromkeys(setting for (setting, *_), unit in file.units.items() if unit["answers"][0]["turns"])
        if not answered:
            raise ValueError(f"{file.path} holds no answers; run its `confu evaluate`, with questions that fit.")
        settings += [(file, setting) for setting in answered]
    names = labels(Arm(**answer["arm"]) for file in files for _, answer in file.answers)
    return [Comparison(file, setting, names) for file, setting in settings]
