"""Which arms run under which settings."""

from dataclasses import fields
from pathlib import Path

import pytest
from transformers import GenerationConfig, HfArgumentParser

from transformers_confu.common.option_files import read_option_file
from transformers_confu.evaluation.arguments import EvaluationArguments
from transformers_confu.evaluation.arms import Arm, arms_of, drafts_of, labels, settings_of


KNOBS = {"confu_tree_size": 16, "confu_depth": 4, "confu_contemplation": 4}
EAGLE3 = KNOBS | {"confu_contemplation": 0}  # of a draft whose future channel is not trained


def plan(**options):
    arguments = EvaluationArguments(output="o.jsonl", **options)
    own = {name: GenerationConfig(**EAGLE3 if "eagle3" in name else KNOBS) for name in drafts_of(arguments)}
    return arms_of(arguments, own)


def names(**options):
    return list(labels(plan(**options)).values())


def test_budgets_are_those_of_the_draft_and_no_arm_runs_twice():
    drafted = ["EAGLE-3 mode, N = 16", "ConFu, C = 4, N = 16", "ConFu, C = N, N = 16"]
    assert names(drafts=["d"]) == ["plain generate", "prompt lookup", *drafted]
    # 4 is the default, and 4 and 99 are all rows of a tree of 4.
    budgets = ["default", "4", "99", "full"]
    assert names(drafts=["d"], tree_sizes=["4"], contemplations=budgets)[2:] == ["ConFu, C = N, N = 4"]


def test_several_drafts_are_told_apart_by_name():
    found = names(drafts=["confu=runs/a", "runs/b", "c/eagle3"], contemplations=["0", "full"])
    assert found[2:] == [
        "confu: EAGLE-3 mode, N = 16",
        "confu: ConFu, C = N, N = 16",
        "b: EAGLE-3 mode, N = 16",
        "b: ConFu, C = N, N = 16",
        "eagle3: EAGLE-3 mode, N = 16",
    ]
    with pytest.raises(ValueError, match="More than one draft is called b; name them, as in `first=runs/b`"):
        names(drafts=["runs/b", "other/b"])


def test_all_combinations():
    arguments = EvaluationArguments(output="", dtypes=["bfloat16", "float32"], temperatures=[0.0, 1.0])
    assert [(setting.dtype, setting.temperature) for setting in settings_of(arguments)] == [
        (dtype, temperature) for dtype in ("bfloat16", "float32") for temperature in (0.0, 1.0)
    ]
    assert {arm.tree_size for arm in plan(drafts=["d"], tree_sizes=["16", "8"])} == {None, 16, 8}
    pairs = [(3, 2), (3, 4), (5, 2), (5, 4)]
    found = names(drafts=["d"], contemplations=["0"], depths=[3, 5], branchings=[2, 4])
    assert found[2:] == [f"EAGLE-3 mode, N = 16, depth {depth}, branching {b}" for depth, b in pairs]


def test_automatic_rounds_stay_automatic_beside_fixed_trees():
    def automatic(own=GenerationConfig(), **options):  # noqa: B008 - not changed
        arguments = EvaluationArguments(output="o.jsonl", drafts=["d"], baselines=["plain"], **options)
        return {name: arm.knobs for arm, name in labels(arms_of(arguments, {"d": own})).items() if arm.draft}

    found = automatic(tree_sizes=["own", "8"])
    fixed = ["EAGLE-3 mode, N = 8", "ConFu, C = N, N = 8"]
    assert list(found) == ["EAGLE-3 mode, automatic, with lookup", "ConFu, automatic, with lookup", *fixed]
    assert list(found.values())[:2] == [{"confu_contemplation": 0}, {}]
    # A channel that adds nothing: automatic rounds do not contemplate anyway.
    useless = GenerationConfig(confu_future_gain=0.0)
    options = {"contemplations": ["0", "default"], "depths": [3, 4]}
    fixed = ["EAGLE-3 mode, N = 8, depth 3", "EAGLE-3 mode, N = 8, depth 4"]
    found = automatic(useless, tree_sizes=["own", "8"], **options)
    assert list(found) == ["EAGLE-3 mode, automatic, with lookup", *fixed]
    with pytest.raises(ValueError, match="d's own rounds are automatic; give `tree_sizes` a number of nodes"):
        automatic(useless, **options)
    options = {"tree_sizes": ["own", "8"], "contemplations": ["default"], "lookups": ["without", "with"]}
    found = {
        name.removeprefix("EAGLE-3 mode, "): knobs.get("confu_lookup")
        for name, knobs in automatic(useless, **options).items()
    }
    assert found == {"automatic": False, "automatic, with lookup": None, "N = 8": None, "N = 8, with lookup": True}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"runs": 0}, "`runs` is 0; expected at least 1"),
        ({"temperatures": [-1.0]}, "expected temperatures of 0 or above"),
        ({"max_new_tokens": [1]}, "limits of at least 2 tokens"),
        ({"baselines": ["prompt_lookup"]}, "expected 'plain', which every speed-up refers to"),
        ({"contemplations": ["some"]}, "holds 'some'; expected a number of rows, 'default' or 'full'"),
        ({"lookups": ["yes"]}, "`lookups` holds 'yes'; expected one of default, without, with"),
        ({"tree_sizes": ["0"]}, "`confu_tree_size` is 0"),
        ({"tree_sizes": ["big"]}, "`tree_sizes` holds 'big'; expected a number of nodes, or 'own'"),
        ({"depths": [0]}, "`confu_depth` is 0"),
        ({"device": "cpu", "device_map": "auto"}, "give one of the two"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(drafts=["d"], **options)


def test_the_published_measurements_can_be_planned():
    root = Path(__file__).parents[2]
    shipped = GenerationConfig.from_pretrained(root / "hub_cards" / "confu-smollm2-135m-instruct")
    types = {option.name: option.type for option in fields(EvaluationArguments)}
    for path in (root / "examples" / "evaluate_smollm2").glob("*.yaml"):
        (options,) = read_option_file([str(path)], types)
        (arguments,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(options)
        arms = arms_of(arguments, dict.fromkeys(drafts_of(arguments), shipped))
        assert arms[0] == Arm("plain") and any(arm.draft for arm in arms), path
