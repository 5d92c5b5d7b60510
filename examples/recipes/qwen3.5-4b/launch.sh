#!/usr/bin/env bash
# The whole recipe, from public prompts to a measured draft: see ../launch.sh for what it reads from the environment.
# Qwen3.5 answers without its thinking: a draft serves the mode whose answers it has learned from.
[ -n "${CHAT_TEMPLATE_KWARGS:-}" ] || export CHAT_TEMPLATE_KWARGS='{"enable_thinking": false}'
export BASELINES=plain # Transformers has no prompt lookup for targets with recurrent layers
exec "$(dirname "$0")/../launch.sh" "$(dirname "$0")/train.yaml" "$@"
