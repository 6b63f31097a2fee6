#!/usr/bin/env bash
# Checks lint, format, types and shell scripts. With --fix, fixes what ruff can fix first.
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
