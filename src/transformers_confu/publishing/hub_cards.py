"""
The generated files of `hub_cards/`: `python -m transformers_confu.publishing.hub_cards` writes
them, `--check` only compares.

A folder holds what its Hub repository holds (model card, config, weights, the inference code, `custom_generate`), and
`card.yaml`, the facts from which the card is made. Config and weights of a trained draft are those of training; all
else is generated and never edited there. A draft that is `untrained` has a config made from its target's sizes below,
and no weights.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.dynamic_module_utils import get_relative_import_files

from ..inference.configuration_confu import ConFuConfig
from ..inference.knobs import ConFuKnobs
from .model_card import CARD_FILE, CardFacts, model_card
from .publish import CUSTOM_GENERATE, custom_generate_source


SOURCE = Path(__file__).parents[1] / "inference"
HUB_CARDS = Path(__file__).parents[3] / "hub_cards"
ORGANISATION = "transformers-confu"

AUTO_MAP = {
    "AutoConfig": "configuration_confu.ConFuConfig",
    "AutoModel": "modeling_confu.ConFuDraftModel",
}

LLAMA3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}


def llama3_rope(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# The paper's targets: what their own `config.json` says, as far as a draft's config or the size of a recipe's run
# depends on it.
UNTRAINED: dict[str, PreTrainedConfig] = {
    "confu-llama-3.2-3b-instruct": LlamaConfig(
        **LLAMA3,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
        rope_parameters=llama3_rope(32.0),
    ),
    "confu-llama-3.1-8b-instruct": LlamaConfig(
        **LLAMA3,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        rope_parameters=llama3_rope(8.0),
    ),
    "confu-qwen3-4b": Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=151643,
        eos_token_id=151645,
    ),
}
DRAFT_VOCAB_SIZE = 32000  # as published EAGLE-3 drafts for these targets have it


def inference_files() -> dict[str, bytes]:
    """Name and content of each code file that a checkpoint needs, as Transformers finds them when it saves a draft."""
    model = SOURCE / "modeling_confu.py"
    files = [model, *map(Path, get_relative_import_files(model))]
    return {file.name: file.read_bytes() for file in sorted(files)}


def untrained_config(target_config: PreTrainedConfig) -> str:
    """`config.json` of a draft that training will make for a target."""
    config = ConFuConfig.from_target(target_config, draft_vocab_size=DRAFT_VOCAB_SIZE, dtype="bfloat16")
    config.architectures = ["ConFuDraftModel"]
    config.auto_map = AUTO_MAP
    values = json.loads(config.to_json_string())
    del values["transformers_version"]  # no version has written these weights
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def generated_files(folder: Path) -> dict[str, bytes]:
    r"""
    Path in the folder and content of every generated file.

    Raises:
        ValueError: `card.yaml` or `config.json` is missing or says what cannot be.
    """
    facts = CardFacts.load(folder / CARD_FILE)
    files = inference_files()
    repo_id = f"{ORGANISATION}/{folder.name}"
    files[CUSTOM_GENERATE] = custom_generate_source(repo_id).encode()
    if facts.untrained:
        if folder.name not in UNTRAINED:
            raise ValueError(
                f"{folder / CARD_FILE} says `untrained`, but no target config is known for {folder.name}."
            )
        files["config.json"] = untrained_config(UNTRAINED[folder.name]).encode()
        config = ConFuConfig.from_dict(json.loads(files["config.json"]))
        knobs = {}
    else:
        check_auto_map(folder)
        config = ConFuConfig.from_pretrained(folder)
        knobs = ConFuKnobs.of(GenerationConfig.from_pretrained(folder))
    files["README.md"] = f"{model_card(facts, config, repo_id, knobs)}\n".encode()
    return files


def differing_files(folder: Path, wanted: dict[str, bytes]) -> list[str]:
    """Those that are missing or other than generated, and code files that are none of them."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.py")}
    found |= {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def update(folder: Path, wanted: dict[str, bytes]) -> list[str]:
    """Write the generated files of a folder and remove other code; names of the files that changed."""
    changed = differing_files(folder, wanted)
    for name in changed:
        if name in wanted:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(wanted[name])
        else:
            (folder / name).unlink()
    return changed


def check_auto_map(folder: Path) -> None:
    r"""
    Raises:
        ValueError: `config.json` is missing or does not lead `AutoConfig` and `AutoModel` to ConFu's classes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: save a draft into this folder with `save_pretrained`.")
    auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map")
    if auto_map != AUTO_MAP:
        raise ValueError(f"{path} has the `auto_map` {auto_map}, expected {AUTO_MAP}: save the draft again.")


def main(argv: list[str] | None = None, root: Path = HUB_CARDS) -> int:
    """The command; its exit status. `root` holds one folder per checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m transformers_confu.publishing.hub_cards",
        description="Write the generated files of hub_cards/.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check = parser.parse_args(argv).check

    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        print(f"No checkpoint folder in {root}: run this in a clone of the repository.", file=sys.stderr)
        return 1
    failed = False
    for folder in folders:
        try:
            wanted = generated_files(folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        changed = differing_files(folder, wanted) if check else update(folder, wanted)
        failed |= check and bool(changed)
        for name in changed:
            print(f"{folder.name}/{name}: {'differs from what is generated' if check else 'written'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
