"""The model card: metadata that the Hub can read, every fact in its place, and no gap."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuConfig
from transformers_confu.publishing.model_card import CARD_FILE, CardFacts, Evaluation, add_evaluation, model_card


FACTS = CardFacts(
    base_model="org/target",
    license="other",
    license_name="some-licence",
    license_link="https://example.org/licence",
    license_note="A note on the licence.",
    language=["en", "pt-BR"],
    datasets=["org/answers", "squad"],
    summary="A summary.",
    training="Told **here**.\n\n| source | answers |\n|---|---|\n| one | 5 |",
    evaluations=[
        Evaluation(
            dataset="Spec-Bench",
            dataset_id="org/spec-bench",
            setting="480 questions, temperature 0",
            note="Three runs.",
            rows=[
                {"arm": "EAGLE-3 mode", "contemplation": 0, "tau": 2.5, "speed_up": 1.5},
                {"arm": "ConFu", "contemplation": 4, "tau": 2.75, "speed_up": 1.7},
                {"arm": "prompt lookup", "speed_up": 1.3, "others": True},
            ],
        ),
        Evaluation(
            "Spec-Bench", "org/spec-bench", "480 questions, temperature 1", [{"arm": "ConFu", "speed_up_mean": 2.25}]
        ),
    ],
    evaluation="Further words.",
    limits=["One.", "Two."],
)
CONFIG = ConFuConfig.from_target(make_tiny_target().config)


def test_the_metadata_are_those_of_the_hub():
    data = model_card(FACTS, CONFIG, "org/draft").data.to_dict()
    ours = {"base_model_relation": "adapter", "library_name": "transformers", "pipeline_tag": "text-generation"}
    given = ("license", "license_name", "license_link", "base_model", "language", "datasets")
    assert data.pop("model-index") and {"confu", "custom_code", "custom_generate"} <= set(data.pop("tags"))
    assert data == ours | {name: getattr(FACTS, name) for name in given}


def test_every_result_is_in_the_index_once():
    name, results = model_index_to_eval_results(model_card(FACTS, CONFIG, "org/draft").data.to_dict()["model-index"])
    assert name == "draft"
    found = {(r.dataset_config, r.metric_type, r.metric_name): r.metric_value for r in results}
    assert found == {
        ("480 questions, temperature 0", "tau", "tau (EAGLE-3 mode, C = 0)"): 2.5,
        ("480 questions, temperature 0", "speed_up", "speed-up, total (EAGLE-3 mode, C = 0)"): 1.5,
        ("480 questions, temperature 0", "tau", "tau (ConFu, C = 4)"): 2.75,
        ("480 questions, temperature 0", "speed_up", "speed-up, total (ConFu, C = 4)"): 1.7,
        ("480 questions, temperature 1", "speed_up_mean", "speed-up, mean of questions (ConFu)"): 2.25,
    }


def test_every_fact_is_in_the_text():
    text = model_card(FACTS, CONFIG, "org/draft", {"confu_depth": 4}, check="It was checked.").text
    for fact in (
        "# ConFu draft for target\n",
        "A summary.",
        FACTS.training,
        "**Spec-Bench**: 480 questions, temperature 0. Three runs.\n",
        "| EAGLE-3 mode | 0 | 2.500 | 1.500 |  |\n",
        "| ConFu | 4 | 2.750 | 1.700 |  |\n",
        "| prompt lookup |  |  | 1.300 |  |\n",
        "Further words.",
        "It was checked.",
        "- One.\n- Two.\n- Batch size 1.",
        "Weights: [some-licence](https://example.org/licence). Code in this repository: Apache-2.0.\nA note on the",
        "`confu_depth=4`",
        'custom_generate="org/draft", trust_remote_code=True',
        'AutoModel.from_pretrained("org/draft", trust_remote_code=True)',
        'ConFuDraftModel.from_pretrained("org/draft")',
        "assistant_model=draft)",
        "not usable alone",
    ):
        assert fact in text
    assert not any(blank in text for blank in ("\n\n\n", "{{", "{%", "None", "More Information Needed"))


@pytest.mark.parametrize(
    ("facts", "licence"), [(CardFacts(), "not stated yet"), (CardFacts("org/target", "mit"), "MIT")]
)
def test_a_card_is_whole_whatever_is_known(facts, licence):
    card = model_card(facts, CONFIG, "org/draft")
    assert f"Weights: {licence}." in card.text
    assert "model-index" not in card.data.to_dict() and "model_name" not in card.data.to_dict()
    assert ("base_model_relation" in card.data.to_dict()) == (facts.base_model is not None)
    assert "No benchmark has been recorded" in card.text and "How this draft was trained is not recorded." in card.text
    assert not any(blank in card.text for blank in ("\n\n\n", "{{", "{%", "None"))
    assert str(ModelCard(str(card))) == str(card)


@pytest.mark.parametrize("own_embeddings", [False, True])
def test_the_description_counts_what_the_draft_has(own_embeddings):
    draft = make_tiny_draft(make_tiny_target(), **({"hidden_size": 16, "head_dim": 4} if own_embeddings else {}))
    text = model_card(CardFacts(), draft.config, "org/draft").text
    count = sum(parameter.numel() for parameter in draft.parameters())
    assert f"\n| parameters | {count / 1e6:.1f} million: EAGLE-3 core " in text
    assert (" and an embedding table of its own |\n" in text) == own_embeddings
    assert "reads the target's hidden states 1, 2 and 4 and " in text
    assert "\n| draft vocabulary | 97 of the target's 97 tokens |\n| future channel | 4 soft prompts per" in text
    assert "target layer; mixtures of experts: 2 of 8 active for `[con]`, " in text


# card.yaml


def test_facts_survive_the_file(tmp_path):
    FACTS.save(tmp_path / CARD_FILE)
    assert CardFacts.load(tmp_path / CARD_FILE) == FACTS
    CardFacts("org/target", "mit").save(tmp_path / CARD_FILE)
    assert (tmp_path / CARD_FILE).read_text() == "base_model: org/target\nlicense: mit\n"


def test_a_measurement_finds_its_way_into_the_file(tmp_path):
    FACTS.save(tmp_path / CARD_FILE)
    first, again, other = (
        Evaluation("Mine", "mine", setting, [{"arm": "ConFu", "tau": tau}])
        for setting, tau in (("greedy", 2.0), ("greedy", 2.5), ("sampled", 1.5))
    )
    for evaluation in (first, other, again):  # a second measurement takes the place of the first
        add_evaluation(tmp_path, evaluation)
    assert CardFacts.load(tmp_path / CARD_FILE) == replace(FACTS, evaluations=[*FACTS.evaluations, other, again])


def row(**figures) -> dict:
    return {"evaluations": [{"dataset": "x", "dataset_id": "x", "setting": "x", "rows": [figures]}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"licence": "mit"}, "`licence` is not known; there are base_model, license, "),
        ({"license": False}, "`license` of the card is False; it must be a text"),
        ({"base_model": "/models/target"}, "`base_model` of the card is '/models/target'; expected the target's id"),
        ({"license": "other"}, "needs `license_name` and `license_link`"),
        ({"limits": "Slow."}, "`limits` of the card is 'Slow.'; it must be a list of texts"),
        # Both pass the check of a card's form and are refused by the Hub, after everything else is done.
        ({"datasets": ["/data/answers"]}, "names '/data/answers'; expected ids of the Hub, such as 'org/answers'"),
        ({"language": ["English"]}, "names 'English'; expected codes such as 'en'"),
        (["a list"], "expected names and values"),
        ("a: [", "while parsing"),
        ({"evaluations": [{"dataset": "x"}]}, "`evaluations`: missing 3 required positional arguments: 'dataset_id'"),
        (row(arm="ConFu", speedup=1), "'speedup': 1}; expected `arm`, and of the others any of contemplation"),
        (row(arm="ConFu", tau="2"), "`tau` of 'ConFu' is '2'; expected a number"),
    ],
)
def test_facts_that_cannot_be_are_refused_with_the_file_named(content, message, tmp_path):
    path = tmp_path / CARD_FILE
    path.write_text(content if isinstance(content, str) else json.dumps(content))  # which is YAML
    with pytest.raises(ValueError, match=message) as error:
        CardFacts.load(path)
    assert str(error.value).startswith(str(path))
