"""Figures of a measurement for the model card of a draft: `confu report RECORDS --output OUT --card FOLDER`."""

from pathlib import Path
from typing import Any

import numpy as np

from ..publishing.model_card import Evaluation
from .figures import Comparison


def card_evaluation(c: Comparison, folder: Path) -> Evaluation:
    """
    One setting of a measurement as the card of the draft in `folder` shows it. The folder's name is the draft's in the
    measurement, unless that has one draft only; ValueError if it has several, and none of that name. Arms of other
    drafts and methods count as others.
    """
    drafts = {c.arms[name].draft for name in c.drafted}
    draft = folder.absolute().name if len(drafts) != 1 else next(iter(drafts))
    if draft not in drafts:
        raise ValueError(
            f"{c.file.path} measured the drafts {', '.join(sorted(drafts)) or '(none)'}, not {draft}; give the folder "
            "of one of these."
        )
    figures = {"tau": c.tau(), "speed_up": c.speedup_total(), "speed_up_mean": c.speedup_mean()}
    rows: list[dict[str, Any]] = []
    for name, arm in c.arms.items():
        if name == c.plain:
            continue
        values = {figure: round(float(samples[name][0]), 3) for figure, samples in figures.items()}
        row = {"arm": name} | {figure: value for figure, value in values.items() if np.isfinite(value)}
        if arm.contemplation is not None:
            row["contemplation"] = arm.contemplation
        if arm.draft != draft:
            row["others"] = True
        rows.append(row)
    machine = c.file.settings["machine"]
    on = f"{machine['device']} ({machine['processor']}, {machine['threads']} threads)"
    return Evaluation(
        dataset=c.file.name,
        dataset_id=c.file.name,
        setting=f"{len(c.questions)} questions, {c.setting}; on {on}",
        rows=rows,
        note=f"{len(c.runs)} runs, all together. Records: SHA-256 {c.file.sha256()[:12]}.",
    )
