#!/usr/bin/env bash
# What tpu_vm.sh does on a worker: keeps one command running there, apart from any connection.
#
#   tpu_worker.sh install PYTHON_VERSION   into .venv
#   tpu_worker.sh start COMMAND...
#   tpu_worker.sh status                   its exit status, or "running"; nothing if there is none
#   tpu_worker.sh follow                   shows what it prints until it has ended
#   tpu_worker.sh stop                     SIGTERM, a minute later SIGKILL
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p .run
process="$(cat .run/process 2>/dev/null || true)"

running() {
  [ -n "$process" ] && kill -0 "$process" 2>/dev/null
}

task="${1:-}"
shift || true
case "$task" in
  install)
    # The images of TPU VMs have an older Python than this project needs.
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet "$1"
    PYTHON="$(python3 -m uv python find "$1")" bash -c "source launch/install.sh tpu"
    ;;
  start)
    rm -f .run/status
    nohup setsid bash launch/tpu_worker.sh run "$@" >.run/log 2>&1 </dev/null &
    echo "$!" >.run/process
    ;;
  run)
    # The command gets SIGTERM, too, and ends when it has saved; its status is waited for.
    trap : TERM
    PYTHON=.venv/bin/python source launch/install.sh tpu
    source launch/malloc.sh
    status=0
    "$@" || status=$?
    echo "$status" >.run/status
    ;;
  status)
    if running; then
      echo running
    elif [ -n "$process" ]; then
      cat .run/status 2>/dev/null || echo 137 # killed before it could say
    fi
    ;;
  follow)
    tail --lines=+1 --follow --pid="$process" .run/log
    ;;
  stop)
    if running; then
      kill -TERM -- "-$process"
      for ((second = 0; second < 60; second++)); do
        running || exit 0
        sleep 1
      done
      kill -KILL -- "-$process"
    fi
    ;;
  *)
    echo "error: $task: unknown" >&2
    exit 2
    ;;
esac
