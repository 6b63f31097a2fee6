#!/usr/bin/env bash
# Checks lint, format, spelling, types, shell scripts and docs. With --fix, fixes what ruff can fix.
#
#   launch/lint.sh [--fix]
case "${1:-}" in
  "" | --fix) ;;
  --help)
    sed -n '2,/^case/{/^case/!s/^# \{0,1\}//p;}' "$0"
    exit
    ;;
  *)
    echo "error: unknown argument $1; see --help" >&2
    exit 2
    ;;
esac
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" test

if [ "${1:-}" = "--fix" ]; then
  ruff check --fix .
  ruff format .
else
  ruff check .
  ruff format --check .
fi
codespell
shellcheck --severity=style --external-sources launch/*.sh launch/*.sbatch
# Types are checked while the docs are built.
NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir "$(mktemp -d)" &
status=0
mypy || status=1
wait "$!" || status=1
exit "$status"
