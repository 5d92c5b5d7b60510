#!/usr/bin/env bash
# The whole recipe, from public prompts to a measured draft: see ../launch.sh for what it reads from the environment.
# gpt-oss always thinks before it answers, here as little as it can: a draft serves the effort whose answers it has
# learned from.
[ -n "${CHAT_TEMPLATE_KWARGS:-}" ] || export CHAT_TEMPLATE_KWARGS='{"reasoning_effort": "low"}'
exec "$(dirname "$0")/../launch.sh" "$(dirname "$0")/train.yaml" "$@"
