#!/usr/bin/env bash
# The whole recipe, from public prompts to a measured draft: see ../launch.sh for what it reads from the environment.
exec "$(dirname "$0")/../launch.sh" "$(dirname "$0")/train.yaml" "$@"
