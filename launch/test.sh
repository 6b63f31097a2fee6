#!/usr/bin/env bash
# Installs into .venv and runs the checks and tests. With --parity also those that need PyTorch
# (comparison) and libtpu (compiling for TPUs). Further arguments go to pytest.
extras="test"
for argument in "$@"; do
  [ "$argument" = "--parity" ] && extras=test,parity
done
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" "$extras"

bash launch/lint.sh
python -m pytest --numprocesses=auto --dist=loadfile "$@"
