"""From records to figures: pooled rates, spread over runs, confidence intervals over questions.

The unit is the question, all its turns together. Intervals are those of a paired bootstrap, stratified by group:
questions are drawn with replacement within each group, the same for all arms, so that a difference between two arms
is not blurred by how much questions differ.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .arms import Arm, Setting
from .metrics.confu_acceptance.confu_acceptance import acceptance
from .metrics.confu_speedup.confu_speedup import speedup
from .records import Answer


RESAMPLES = 2000
CONFIDENCE = 0.95
PARTS = ("draft", "target", "walk", "compaction")


@dataclass
class Interval:
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass
class Spread:
    """A figure that was measured in several runs: median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(float(np.median(values)), min(values), max(values))


class ArmAnswers:
    r"""
    All answers of one arm under one setting, as arrays over questions and runs.

    Args:
        answers (`list[Answer]`): Of one arm and setting.
        questions (`list[str]`): Question ids, which give the order of the arrays.
        runs (`list[int]`): Runs in which every question was answered by every arm.
    """

    def __init__(self, answers: Iterable[Answer], questions: list[str], runs: list[int]):
        by_place = {(answer.question_id, answer.run): answer for answer in answers}
        self.answers = [[by_place[question, run] for run in runs] for question in questions]  # (Q, R)
        self.arm = self.answers[0][0].arm
        self.tokens = self._each(lambda answer: sum(len(turn.token_ids) for turn in answer.turns))
        self.seconds = self._each(lambda answer: sum(turn.seconds for turn in answer.turns))
        rounds = [turn.rounds for turn in self.answers[0][0].turns]
        self.has_rounds = all(entry is not None for entry in rounds)
        self.has_accepted = self.has_rounds and all(entry.accepted is not None for entry in rounds)
        if self.has_rounds:
            self.rounds = self._each(lambda answer: sum(len(turn.rounds.emitted) for turn in answer.turns))
            self.emitted = self._each(lambda answer: sum(sum(turn.rounds.emitted) for turn in answer.turns))

    def _each(self, count: Callable[[Answer], float]) -> np.ndarray:
        return np.array([[count(answer) for answer in row] for row in self.answers], dtype=float)  # (Q, R)

    @property
    def all(self) -> list[Answer]:
        return [answer for row in self.answers for answer in row]

    def acceptance(self, members: Sequence[int] | None = None) -> dict:
        """The acceptance metric over all runs of some questions (by index), or of all."""
        rows = self.answers if members is None else [self.answers[index] for index in members]
        rounds = [turn.rounds for row in rows for answer in row for turn in answer.turns]
        return acceptance([entry.emitted for entry in rounds], [entry.accepted for entry in rounds])

    def parts(self) -> dict[str, float]:
        r"""
        Mean seconds of a round by part; `rest` is what the call took besides: preparation and the loop itself.

        `prefill` is per call, not per round.
        """
        turns = [turn for answer in self.all for turn in answer.turns]
        rounds = sum(len(turn.rounds.emitted) for turn in turns)
        if not rounds:
            return {}
        means = {part: sum(turn.rounds.seconds[part] for turn in turns) / rounds for part in PARTS}
        rest = sum(turn.seconds - sum(turn.rounds.seconds.values()) for turn in turns) / rounds
        prefill = sum(turn.rounds.seconds["prefill"] for turn in turns) / len(turns)
        return {**means, "rest": rest, "prefill": prefill}

    def round_seconds(self) -> float:
        """Mean seconds of a round, prefill left out."""
        return sum(seconds for part, seconds in self.parts().items() if part != "prefill")


class Comparison:
    r"""
    All arms under one setting, on the questions and runs that every arm has answered.

    Args:
        setting ([`Setting`]): The setting.
        answers (`Iterable[Answer]`): Of all arms; those of other settings are ignored.
        seed (`int`): Of the bootstrap.
    """

    def __init__(self, setting: Setting, answers: Iterable[Answer], seed: int = 0):
        self.setting = setting
        of_setting = [answer for answer in answers if answer.setting == setting]
        by_arm: dict[Arm, list[Answer]] = {}
        for answer in of_setting:
            by_arm.setdefault(answer.arm, []).append(answer)
        places = [{(answer.question_id, answer.run) for answer in members} for members in by_arm.values()]
        common = set.intersection(*places)
        self.questions = list(dict.fromkeys(answer.question_id for answer in of_setting))
        self.runs = sorted({run for _, run in common})
        self.runs = [run for run in self.runs if all((question, run) in common for question in self.questions)]
        if not self.runs:
            # Not one run is complete: what its first has so far.
            self.runs = [min(run for _, run in common)]
            self.questions = [question for question in self.questions if (question, self.runs[0]) in common]
        group_of = {answer.question_id: answer.group for answer in of_setting}
        self.groups: dict[str, list[int]] = {}
        for index, question in enumerate(self.questions):
            self.groups.setdefault(group_of[question], []).append(index)
        self.arms = {arm: ArmAnswers(members, self.questions, self.runs) for arm, members in by_arm.items()}
        self.plain = next(arm for arm in self.arms.values() if arm.arm.kind == "plain")
        self._weights = self._resample(seed)

    def _resample(self, seed: int) -> np.ndarray:
        """How often each question is drawn in each resample, `(RESAMPLES, Q)`."""
        generator = np.random.default_rng(seed)
        weights = np.zeros((RESAMPLES, len(self.questions)))
        for members in self.groups.values():
            counts = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), size=RESAMPLES)
            weights[:, members] = counts
        return weights

    def drafted(self) -> list[ArmAnswers]:
        return [arm for arm in self.arms.values() if arm.has_accepted]

    def interval(self, figure: Callable[[np.ndarray], np.ndarray], members: Sequence[int] | None = None) -> Interval:
        r"""
        A figure and its percentile interval; no interval (NaN) where no group holds two questions to draw from.

        Args:
            figure (`Callable`): Weights of the questions `(resamples, Q)` -> figures `(resamples,)`.
            members (`Sequence[int]`, *optional*): Questions that count, by index; all by default.
        """
        mask = np.ones(len(self.questions))
        if members is not None:
            mask = np.zeros(len(self.questions))
            mask[list(members)] = 1
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(figure(mask[None])[0])
            resampled = figure(self._weights * mask)
        if all(mask[group].sum() < 2 for group in self.groups.values()):
            return Interval(value, np.nan, np.nan)
        tail = (1 - CONFIDENCE) / 2
        finite = resampled[np.isfinite(resampled)]
        low, high = np.quantile(finite, [tail, 1 - tail]) if len(finite) else (np.nan, np.nan)
        return Interval(value, float(low), float(high))

    def tau(self, arm: ArmAnswers, members: Sequence[int] | None = None) -> Interval:
        return self.interval(lambda weights: tau(arm, weights), members)

    def tau_difference(self, arm: ArmAnswers, other: ArmAnswers, members: Sequence[int] | None = None) -> Interval:
        return self.interval(lambda weights: tau(arm, weights) - tau(other, weights), members)

    def speedup_total(
        self, arm: ArmAnswers, members: Sequence[int] | None = None, over: ArmAnswers | None = None
    ) -> Interval:
        """Total tokens over total time, all runs together, against plain generation or another arm."""
        other = over or self.plain
        return self.interval(lambda weights: rate(arm, weights) / rate(other, weights), members)

    def tokens_per_second(self, arm: ArmAnswers, members: Sequence[int] | None = None) -> Interval:
        """Total tokens over total time, all runs together."""
        return self.interval(lambda weights: rate(arm, weights), members)

    def speedup_difference(self, arm: ArmAnswers, other: ArmAnswers) -> Interval:
        """Difference of the two arms' speed-ups over plain generation."""
        return self.interval(
            lambda weights: (rate(arm, weights) - rate(other, weights)) / rate(self.plain, weights)
        )  # fmt: skip

    def speedup_mean(self, arm: ArmAnswers, members: Sequence[int] | None = None) -> Interval:
        """Mean over questions of the ratio of rates."""
        ratios = (arm.tokens.sum(1) / arm.seconds.sum(1)) / (self.plain.tokens.sum(1) / self.plain.seconds.sum(1))
        return self.interval(lambda weights: weights @ ratios / weights.sum(1), members)

    def by_run(self, arm: ArmAnswers, figure: str) -> Spread:
        """Run-to-run spread of a figure of the speed-up metric."""
        return Spread.of(
            speedup(
                arm.tokens[:, run].tolist(),
                arm.seconds[:, run].tolist(),
                self.plain.tokens[:, run].tolist(),
                self.plain.seconds[:, run].tolist(),
            )[figure]
            for run in range(len(self.runs))
        )

    def references(self, arm: ArmAnswers) -> list[ArmAnswers]:
        """What a drafted arm is set against: EAGLE-3 mode with the same tree, of every draft; each pair once."""
        alike = [
            other
            for other in self.drafted()
            if not other.arm.contemplation and other.arm.tree_size == arm.arm.tree_size
        ]
        return alike if arm.arm.contemplation else alike[alike.index(arm) + 1 :]

    def of_main_size(self) -> list[ArmAnswers]:
        """Drafted arms with the tree size that comes first."""
        arms = self.drafted()
        return [arm for arm in arms if arm.arm.tree_size == arms[0].arm.tree_size]


def tau(arm: ArmAnswers, weights: np.ndarray) -> np.ndarray:
    """Tokens emitted in rounds / rounds, `(resamples,)`."""
    return (weights @ arm.emitted.sum(1)) / (weights @ arm.rounds.sum(1))


def rate(arm: ArmAnswers, weights: np.ndarray) -> np.ndarray:
    """Tokens per second, `(resamples,)`."""
    return (weights @ arm.tokens.sum(1)) / (weights @ arm.seconds.sum(1))


def settings_of(answers: Iterable[Answer]) -> list[Setting]:
    """The settings that records hold, in their order."""
    return list(dict.fromkeys(answer.setting for answer in answers))
