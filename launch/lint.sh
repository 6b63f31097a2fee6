#!/usr/bin/env bash
# Lint, format and types, in one command. With --fix, mends what can be mended by itself.
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" test

if [ "${1:-}" = "--fix" ]; then
  ruff check --fix .
  ruff format .
else
  ruff check .
  ruff format --check .
fi
mypy
shellcheck --severity=style --external-sources launch/*.sh launch/*.sbatch
