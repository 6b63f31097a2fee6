#!/usr/bin/env bash
# Installs the project into .venv and runs lint and tests. With --parity, also runs the tests that
# compare with PyTorch or compile for TPUs. Passes all other arguments to pytest.
#
#   launch/test.sh [--parity] [PYTEST_ARGUMENT...]
if [ "${1:-}" = "--help" ]; then
  sed -n '2,/^if/{/^if/!s/^# \{0,1\}//p;}' "$0"
  exit
fi
extras="test"
arguments=()
for argument in "$@"; do
  if [ "$argument" = "--parity" ]; then extras=test,parity; else arguments+=("$argument"); fi
done
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" "$extras"

bash launch/lint.sh
tests=(python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder)
"${tests[@]}" "${arguments[@]}"
if [ "$extras" != "test" ]; then
  "${tests[@]}" --parity "${arguments[@]}"
fi
