"""
A draft for a target of your own, from nothing: let the target answer prompts, train, save, generate.

A dozen prompts show the steps; a useful draft needs thousands, and a GPU for targets of a useful size. The same steps
with files and a command line are `confu data regenerate` and `confu train`, as in `train_smollm2/`.
"""

from pathlib import Path

from _targets import chat_inputs, example_arguments, load_target

from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.data import (
    build_draft_vocabulary,
    count_assistant_tokens,
    prepare_dataset,
    regenerate,
)
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments, warm_start


parser = example_arguments(__doc__)
parser.add_argument("--output", type=Path, default=Path("runs/finetune"), help="folder of answers and draft")
arguments = parser.parse_args()
target, tokenizer = load_target(arguments.tiny)

# 1. Data. A draft learns to foretell the target, so the answers must be the target's own.
subjects = ["the moon", "bread", "a bicycle", "the number 7", "rain", "chess", "a violin", "sleep", "tea", "maps"]
prompts = [{"id": number, "prompt": f"Tell me about {subject}."} for number, subject in enumerate(subjects)]
answers = arguments.output / "answers.jsonl"
print(
    regenerate(
        target,
        tokenizer,
        prompts,
        answers,
        max_new_tokens=24 if arguments.tiny else 96,
        batch_size=5,
        max_prompt_length=256,
    )
)
dataset = prepare_dataset(answers, tokenizer, max_length=512, vocab_size=target.vocab_size)

# 2. A draft that starts from the target's own last layer and predicts the tokens that the target uses most.
vocabulary = build_draft_vocabulary(
    count_assistant_tokens(dataset, target.vocab_size),
    draft_vocab_size=128 if arguments.tiny else 2048,
    always_include=[tokenizer.eos_token_id],
)
form = {"draft_vocab_size": len(vocabulary.token_ids), "fc_norm": True, "norm_output": True}
config = ConFuConfig.from_target(target.config, **form)
draft = warm_start(target, vocabulary.token_ids, config)

# 3. Training, with Transformers' Trainer. The target is frozen and stays out of checkpoints.
trainer = ConFuTrainer(
    model=draft,
    target_model=target,
    processing_class=tokenizer,
    args=ConFuTrainingArguments(
        output_dir=str(arguments.output / "draft"),
        num_train_epochs=1 if arguments.tiny else 3,
        tokens_per_batch=512,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()

# 4. Use. The folder also holds the inference code, so it can be pushed to the Hub as it is.
draft = ConFuDraftModel.from_pretrained(arguments.output / "draft", dtype=target.dtype).to(target.device)
inputs = chat_inputs(target, tokenizer, "Tell me about tea.")
sequences = target.generate(**inputs, assistant_model=draft, max_new_tokens=64)
print(tokenizer.decode(sequences[0], skip_special_tokens=True))
print(draft.last_statistics)
