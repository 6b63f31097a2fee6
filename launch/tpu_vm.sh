#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU slice until it finishes, across preemptions.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --accelerator=TYPE --runtime=VERSION [OPTION...] -- COMMAND...
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --delete
#
# For example (for runtime versions see cloud.google.com/tpu/docs/runtimes):
#
#   launch/tpu_vm.sh --name=mister --zone=us-west4-a --accelerator=v5litepod-16 \
#     --runtime=v2-alpha-tpuv5-lite --spot -- \
#     mister-jax train --distributed --config=fusion:meld_features \
#     --config.data.data_dir=gs://BUCKET/data --workdir=gs://BUCKET/run
#
# The script creates a queued resource, or reuses an existing resource with this name, and waits
# until it is active. Then it copies the repository to all workers, installs the project, starts the
# command on each worker and prints the output of worker 0. If the slice is preempted, the script
# creates the slice again and restarts the command, which resumes from its workdir. Keep data and
# workdir on gs://.
#
# If you stop this script, the command keeps running. Start the script again to see the command's
# output.
#
# The script exits if the command exits with status 2 (invalid input). After any other failure it
# restarts the command, at most --max_restarts times. Requires git, and gcloud with an account.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name="" zone="" project="" accelerator="" runtime=""
create_flags=()
python=3.12
max_restarts=10
poll=60
delete=false
dry_run=false

fail() {
  echo "error: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launch/tpu_vm.sh
  echo "
Options:
  --project=ID           Google Cloud project (default: the project configured in gcloud)
  --spot                 request a spot slice, which can be preempted at any time
  --create_flag=FLAG     flag for gcloud compute tpus queued-resources create; repeatable
  --python=$python          Python version to install on the workers
  --max_restarts=$max_restarts      maximum restarts after a failed command or request
  --poll=$poll              seconds between two checks of the state
  --delete               delete the slice, after the command if there is one
  --dry-run              print every command without running it"
}

while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --accelerator=*) accelerator="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --spot) create_flags+=(--spot) ;;
    --create_flag=*) create_flags+=("${1#*=}") ;;
    --python=*) python="${1#*=}" ;;
    --max_restarts=*) max_restarts="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --delete) delete=true ;;
    --dry-run) dry_run=true ;;
    --help) usage && exit ;;
    --) shift && break ;;
    *) fail "unknown option $1; see --help" ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || fail "--name and --zone are required; see --help"
if (($#)); then
  [ -n "$accelerator" ] && [ -n "$runtime" ] || fail "--accelerator and --runtime are required"
elif ! "$delete"; then
  fail "no command; pass it after --, see --help"
fi
[[ "$max_restarts" =~ ^[0-9]+$ ]] || fail "--max_restarts must be a whole number, not $max_restarts"
[[ "$poll" =~ ^[0-9]+$ ]] || fail "--poll must be a whole number of seconds, not $poll"
if ! "$dry_run"; then
  command -v gcloud >/dev/null ||
    fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  if (($#)); then
    command -v git >/dev/null || fail "git is not installed"
    reason="$(git rev-parse --git-dir 2>&1)" ||
      fail "git cannot list the files of the repository: ${reason%%$'\n'*}"
  fi
fi

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")

archive="${TMPDIR:-/tmp}/mister_jax.$$.tar.gz"
trap 'rm -f "$archive"' EXIT

exec 3>&1 # --dry-run prints to this descriptor, even from within $(...).

# Runs a command, or prints it with --dry-run.
run() {
  if "$dry_run"; then
    printf '%q ' "$@" >&3
    echo >&3
  else
    "$@"
  fi
}

log() {
  echo "$(date +%T) $1" >&2
}

# With --dry-run, state() and status() print these values.
dry_state=""
dry_status=""

state() {
  run gcloud compute tpus queued-resources list "${place[@]}" \
    --filter="name~(^|/)$name\$" --format="value(state.state)" || return
  if "$dry_run"; then echo "$dry_state"; fi
}

create() {
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" \
    ${create_flags[@]+"${create_flags[@]}"} || return
  dry_state=ACTIVE
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Runs a shell command on worker $1, a number or "all".
ssh_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --quiet --worker="$1" --command="$2"
}

# Runs a task of tpu_worker.sh on worker $1, a number or "all".
on_workers() {
  local workers="$1"
  shift
  ssh_workers "$workers" "bash mister_jax/launch/tpu_worker.sh$(printf ' %q' "$@")"
}

# Prints the command's exit status on worker 0, "running", or nothing without a command. Fails if
# the worker cannot be reached, but not if tpu_worker.sh is not installed there yet.
status() {
  ssh_workers 0 "bash mister_jax/launch/tpu_worker.sh status 2>/dev/null || true" |
    tail -n 1 || return
  if "$dry_run"; then echo "$dry_status"; fi
}

restarts=0
count_restart() {
  ((++restarts <= max_restarts)) || return 1
  log "$1; restart $restarts of $max_restarts"
}

# Retries of a failed request for the state and of a failed installation. The first request for the
# state is not retried, because retries cannot help if there is no account or the zone is wrong.
retries=5
state_was_read=false

wait_until_active() {
  local current previous="" failures=0
  while true; do
    if ! current="$(state)"; then
      if ! "$state_was_read" || ((++failures > retries)); then
        fail "$name: gcloud cannot read the state of the queued resource"
      fi
      log "$name: gcloud cannot read the state; retry $failures of $retries in $poll s"
      run sleep "$poll"
      continue
    fi
    state_was_read=true
    failures=0
    [ "$current" = "$previous" ] || log "$name: ${current:-does not exist}"
    previous="$current"
    case "$current" in
      ACTIVE) return ;;
      "") create || fail "$name: gcloud cannot create the queued resource" ;;
      SUSPENDED) delete || fail "$name: gcloud cannot delete the queued resource" ;; # preempted
      FAILED)
        delete || fail "$name: gcloud cannot delete the queued resource"
        count_restart "$name: the request failed" || fail "$name: the request failed"
        ;;
    esac
    run sleep "$poll"
  done
}

install() {
  # The archive contains the working tree without ignored and deleted files.
  run bash -c 'git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null |
    tar -czf "$0" -T -' "$archive" &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name":mister_jax.tar.gz "${place[@]}" --quiet \
      --worker=all &&
    ssh_workers all "mkdir -p mister_jax && tar -xzf mister_jax.tar.gz -C mister_jax" &&
    on_workers all install "$python"
}

# Runs the command until it finishes, and returns its exit status.
supervise() {
  local result failures=0
  while true; do
    wait_until_active
    if ! result="$(status)"; then
      # A command that is already running on the workers must not be stopped.
      log "worker 0 cannot be reached"
      run sleep "$poll"
      continue
    fi
    if [ "$result" != running ]; then
      log "installing and starting the command on all workers"
      if ! { install && on_workers all stop && on_workers all start "$@"; }; then
        ((++failures <= retries)) ||
          fail "$name: a worker cannot be reached, or its installation failed; see the output above"
        log "a worker cannot be reached, or its installation failed; retry $failures of $retries"
        run sleep "$poll"
        continue
      fi
      failures=0
    fi
    on_workers 0 follow || true
    dry_status=0
    result="$(status)" || result=""
    case "$result" in
      0 | 2) return "$result" ;;
      "" | running) # The connection broke, or the slice was preempted.
        log "lost the connection to worker 0"
        run sleep "$poll"
        ;;
      143) log "the command was stopped by SIGTERM" ;;
      *) count_restart "the command exited with status $result" || return "$result" ;;
    esac
  done
}

exit_status=0
if (($#)); then
  supervise "$@" || exit_status=$?
  log "the command finished with status $exit_status"
fi
if "$delete"; then delete; fi
exit "$exit_status"
