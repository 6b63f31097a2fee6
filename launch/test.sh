#!/usr/bin/env bash
# Installs into .venv and runs the checks and tests. With --parity then also those that need PyTorch
# (comparison) and libtpu (compiling for TPUs). Further arguments go to pytest.
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
