# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the repository and installs the project with the
# extras named in $1, unless that was done before for the same setup.cfg.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version) found; Python 3.11 or later is needed (set PYTHON=...)" >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=".venv/installed-$extras"
# What was installed with further extras behind these will do.
if ! find .venv -maxdepth 1 -name "installed-$extras*" -exec cmp -s setup.cfg {} \; -print | grep -q .; then
  echo "installing mister_jax[$extras] into .venv"
  .venv/bin/python -m pip install --quiet --upgrade pip
  # setuptools warns of what an editable installation is.
  PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --editable ".[$extras]"
  cp setup.cfg "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
