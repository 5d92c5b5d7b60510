#!/usr/bin/env bash
# usage: launch.sh TRAIN_YAML [options of `confu data serve-regenerate`]
#
# Prompts -> answers by the target -> core, contemplation, joint -> measurement -> publishing if asked for. Every step that is
# done is skipped and an interrupted one goes on where it stopped, so the same command resumes. In the environment:
#
#   WORK      folder of data and results              (default: the folder of TRAIN_YAML's name in the current one)
#   GPUS      number of GPUs                          (default: all that nvidia-smi lists)
#   SOURCES   of the prompts                          (default: paper, which is ShareGPT and UltraChat-200K)
#   SERVER    URL of a server that serves the target  (default: this script starts `vllm serve` and stops it again)
#   CORE      draft that the result is compared with  (default: WORK/runs/core)
#   CHAT_TEMPLATE_KWARGS  options of the target's chat template, as JSON, for the answers and the measurement; set by
#             the recipes of targets that need some         (default: none)
#   BASELINES what drafts are measured against         (default: that of `confu evaluate`; set by qwen3.5-4b)
#   REPOSITORY  Hub repository to publish to, as org/name  (default: nothing is published)
#   CARD      facts of its model card, such as ../../hub_cards/*/card.yaml with your figures  (default: WORK/card.yaml)
#   DRY_RUN   if set, the commands are printed and not run
set -euo pipefail

yaml=$1
shift
name=$(basename "$(cd "$(dirname "$yaml")" && pwd)")
target=$(sed -n 's/^target: *//p' "$yaml")
work=${WORK:-$name}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

if [ ! -e "$work/prompts.jsonl" ]; then
  run confu data prompts --sources ${SOURCES:-paper} --output "$work/prompts.jsonl"
fi

if [ ! -e "$work/answers.complete" ]; then
  if [ -z "${SERVER:-}" ]; then
    serve=(vllm serve "$target" --data-parallel-size "$gpus" --max-model-len 8192)
    if [ -n "${DRY_RUN:-}" ]; then
      run "${serve[@]}"
    else
      "${serve[@]}" &
      server=$!
      trap 'kill "$server" 2>/dev/null || true' EXIT
      until curl --silent --fail --output /dev/null http://localhost:8000/v1/models; do
        kill -0 "$server" # ends this script if the server has ended
        sleep 10
      done
    fi
  fi
  run confu data serve-regenerate --server "${SERVER:-http://localhost:8000/v1}" --tokenizer "$target" \
    --prompts "$work/prompts.jsonl" --output "$work/answers.jsonl" --concurrency 512 \
    --max_prompt_length 1536 --max_new_tokens 1024 \
    ${CHAT_TEMPLATE_KWARGS:+--chat_template_kwargs "$CHAT_TEMPLATE_KWARGS"} "$@"
  if [ -n "${server:-}" ]; then
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  run touch "$work/answers.complete"
fi

# Each stage, and the command as a whole, resumes by itself. Without `--multi_gpu` a configuration file of
# accelerate for one GPU would have the last word.
several=()
if [ "$gpus" -gt 1 ]; then several=(--multi_gpu); fi
run accelerate launch ${several[@]+"${several[@]}"} --num_processes "$gpus" --num_machines 1 --mixed_precision no --dynamo_backend no --module transformers_confu.cli train \
  "$yaml" --data "$work/answers.jsonl" --output_dir "$work/runs"

last=$(sed -n 's/^ *- stage: *//p' "$yaml" | tail -n 1) # its folder holds the draft that comes out
drafts=("core=${CORE:-$work/runs/core}")
if [ "$last" != core ]; then drafts=("confu=$work/runs/$last" "${drafts[@]}"); fi
run confu evaluate --target "$target" --drafts "${drafts[@]}" \
  --tree_sizes 30 60 --temperatures 0 0.7 1 --runs 1 --output "$work/results.jsonl" --report "$work/report" \
  ${BASELINES:+--baselines $BASELINES} ${CHAT_TEMPLATE_KWARGS:+--chat_template_kwargs "$CHAT_TEMPLATE_KWARGS"}

if [ -n "${REPOSITORY:-}" ]; then
  run confu publish "$work/runs/$last" "$target" "$REPOSITORY" --card "${CARD:-$work/card.yaml}"
fi
