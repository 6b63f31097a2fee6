#!/usr/bin/env bash
# Runs a command in the background on a TPU worker. tpu_vm.sh calls this script over SSH. The
# command keeps running when the connection closes.
#
#   tpu_worker.sh install PYTHON_VERSION   installs the project into .venv
#   tpu_worker.sh start COMMAND...         starts the command
#   tpu_worker.sh status                   prints the command's exit status, "running", or nothing
#   tpu_worker.sh follow                   prints the command's output until it ends
#   tpu_worker.sh stop                     sends SIGTERM, and SIGKILL a minute later
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = "--help" ]; then
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' launch/tpu_worker.sh
  exit
fi
mkdir -p .run
process="$(cat .run/process 2>/dev/null || true)"

running() {
  [ -n "$process" ] && kill -0 "$process" 2>/dev/null
}

task="${1:-}"
shift || true
case "$task" in
  install)
    # Python on TPU VM images is too old for this project.
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet "$1"
    PYTHON="$(python3 -m uv python find "$1")" bash -c "source launch/install.sh train,tpu"
    ;;
  start)
    rm -f .run/status
    nohup setsid bash launch/tpu_worker.sh run "$@" >.run/log 2>&1 </dev/null &
    echo "$!" >.run/process
    ;;
  run)
    # `stop` signals the whole process group. The command saves and exits. This shell survives
    # SIGTERM, so that it can record the exit status.
    trap : TERM
    PYTHON=.venv/bin/python source launch/install.sh train,tpu
    source launch/malloc.sh
    status=0
    "$@" || status=$?
    echo "$status" >.run/status
    ;;
  status)
    if running; then
      echo running
    elif [ -n "$process" ]; then
      cat .run/status 2>/dev/null || echo 137 # No status is recorded after SIGKILL.
    fi
    ;;
  follow)
    if [ -z "$process" ]; then
      echo "error: no command was started" >&2
      exit 2
    fi
    tail --lines=+1 --follow --pid="$process" .run/log
    ;;
  stop)
    if running; then
      kill -TERM -- "-$process" 2>/dev/null || exit 0 # The command has just ended.
      for ((second = 0; second < 60; second++)); do
        running || exit 0
        sleep 1
      done
      kill -KILL -- "-$process" 2>/dev/null || true
    fi
    ;;
  *)
    echo "error: unknown task '$task'; allowed: install, start, status, follow, stop" >&2
    exit 2
    ;;
esac
