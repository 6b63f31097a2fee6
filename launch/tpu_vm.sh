#!/usr/bin/env bash
# Runs a command on every worker of a Cloud TPU slice until it is done, through preemptions.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --accelerator=TYPE --runtime=VERSION [OPTION...] -- COMMAND...
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --delete
#
# for example (versions of the runtime: cloud.google.com/tpu/docs/runtimes)
#
#   launch/tpu_vm.sh --name=mister --zone=us-west4-a --accelerator=v5litepod-16 \
#     --runtime=v2-alpha-tpuv5-lite --spot -- \
#     python -m launch.train --distributed --config=configs/fusion.py:meld_features \
#     --config.data.data_dir=gs://BUCKET/data --workdir=gs://BUCKET/run
#
# It creates a queued resource, or takes the one of this name; waits for it; copies the tree to
# every worker, installs it there, starts the command on all, and shows what worker 0 prints. When
# the slice is taken away it is deleted, created and the same command started again, which resumes
# from its workdir. The command runs on if this script is stopped: started again, the script shows
# where it is. Data and workdir are to lie on gs://.
#
# The command's status 2 (input that cannot be used) ends this script; other failures start the
# command again, at most --max_restarts times. Needs gcloud, logged in, and git.
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
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  echo "
Options:
  --project=ID           gcloud's own by default
  --spot                 a slice that may be taken away at any time
  --create_flag=FLAG     for gcloud compute tpus queued-resources create; may be repeated
  --python=$python          for the workers
  --max_restarts=$max_restarts      of a command that failed, or of a request that did
  --poll=$poll              seconds between two looks at the state
  --delete               the slice; after the command has ended, if one is given
  --dry-run              print each command, run none"
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
    *) fail "$1: unknown; see --help" ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || fail "--name and --zone are needed; see --help"
if (($#)); then
  [ -n "$accelerator" ] && [ -n "$runtime" ] || fail "--accelerator and --runtime are needed"
elif ! "$delete"; then
  fail "no command; it comes after --, see --help"
fi

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")

archive="${TMPDIR:-/tmp}/mister_jax.$$.tar.gz"
trap 'rm -f "$archive"' EXIT

exec 3>&1 # where --dry-run prints, also from within $(...)

# Runs a command, or prints it.
run() {
  if "$dry_run"; then
    printf '%q ' "$@" >&3
    echo >&3
  else
    "$@"
  fi
}

tell() {
  echo "$(date +%T) $1" >&2
}

# With --dry-run all goes well, and these say how far it has come.
dry_state=""
dry_status=""

state() {
  run gcloud compute tpus queued-resources list "${place[@]}" \
    --filter="name~(^|/)$name\$" --format="value(state.state)"
  if "$dry_run"; then echo "$dry_state"; fi
}

create() {
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" \
    ${create_flags[@]+"${create_flags[@]}"}
  dry_state=ACTIVE
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Runs a command of tpu_worker.sh on the workers $1 (a number or "all").
on_workers() {
  local workers="$1" command
  shift
  command="bash mister_jax/launch/tpu_worker.sh$(printf ' %q' "$@")"
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --quiet --worker="$workers" \
    --command="$command"
}

# What worker 0 says of the command: its exit status, "running", or nothing if it has none.
status() {
  on_workers 0 status 2>/dev/null | tail -n 1
  if "$dry_run"; then echo "$dry_status"; fi
}

restarts=0
count_restart() {
  ((++restarts <= max_restarts)) || return 1
  tell "$1; restart $restarts of $max_restarts"
}

wait_until_active() {
  local found last=""
  while true; do
    found="$(state)" || fail "$name: gcloud cannot tell its state"
    [ "$found" = "$last" ] || tell "$name: ${found:-not there}"
    last="$found"
    case "$found" in
      ACTIVE) return ;;
      "") create || fail "$name: gcloud cannot create it" ;;
      SUSPENDED) delete || fail "$name: gcloud cannot delete it" ;; # preempted
      FAILED)
        delete || fail "$name: gcloud cannot delete it"
        count_restart "$name: the request failed" || fail "$name: the request failed"
        ;;
      *) run sleep "$poll" ;;
    esac
  done
}

install() {
  # The files as they are, but for those that git ignores and those that were removed.
  run bash -c 'git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null |
    tar -czf "$0" -T -' "$archive" &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name":mister_jax.tar.gz "${place[@]}" --quiet \
      --worker=all &&
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --quiet --worker=all \
      --command="mkdir -p mister_jax && tar -xzf mister_jax.tar.gz -C mister_jax" &&
    on_workers all install "$python"
}

# Until the command is done; its exit status.
supervise() {
  local found
  while true; do
    wait_until_active
    if [ "$(status)" != running ]; then
      tell "installing and starting on all workers"
      if ! { install && on_workers all stop && on_workers all start "$@"; }; then
        tell "a worker cannot be reached"
        run sleep "$poll"
        continue
      fi
    fi
    on_workers 0 follow || true
    dry_status=0
    found="$(status)"
    case "$found" in
      0 | 2) return "$found" ;;
      "" | running) # The connection broke, or the slice is gone.
        tell "no word from worker 0"
        run sleep "$poll"
        ;;
      143) tell "stopped by SIGTERM" ;;
      *) count_restart "the command ended with status $found" || return "$found" ;;
    esac
  done
}

ended=0
if (($#)); then
  supervise "$@" || ended=$?
  tell "ended with status $ended"
fi
if "$delete"; then delete; fi
exit "$ended"
