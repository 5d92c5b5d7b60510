#!/usr/bin/env bash
# The whole recipe, from public prompts to a measured draft: see ../launch.sh for what it reads from the environment.
# Llama 3.2's chat template writes today's date unless told one, so that prompts would have other ids on another day. This
# is the date that Llama 3.1's writes always.
[ -n "${CHAT_TEMPLATE_KWARGS:-}" ] || export CHAT_TEMPLATE_KWARGS='{"date_string": "26 Jul 2024"}'
exec "$(dirname "$0")/../launch.sh" "$(dirname "$0")/train.yaml" "$@"
