#!/usr/bin/env bash
# Training on a TPU slice with gcloud, from nothing to a finished run.
#
#   ./launch_tpu.sh VERB [--option=value ...] [-- flags of distill.train]
#
#   doctor    is everything there that the other verbs need, and what to do where it is not
#   create    asks for the slice (a queued resource) and waits for it; keeps one that is there
#   sync      copies this checkout as it lies here, and the forwarded variables, to every worker
#   setup     installs Python 3.12 and requirements-tpu.txt on every worker, and counts devices
#   run       starts `python -m distill.train FLAGS` on every worker, detached
#   up        create, sync, setup and run; may be repeated
#   babysit   up, and up again after each preemption, until the run has ended
#   logs      follows the log of worker 0, or of --worker=N or --worker=all
#   status    the slice, and what each worker does
#   stop      ends the run, which saves a checkpoint first; the slice stays, and costs
#   delete    deletes the slice, which ends the costs
#
#   --name=  --zone=  --project=   of the slice; without --project, that of gcloud's configuration
#   --accelerator=v6e-16           or v5e-64, v5p-128; or as `plan` names it, v5e:8x8
#   --capacity=on-demand           or spot or reserved
#   --slices=1                     more of them make a multislice job
#   --runtime=                     the image, where the accelerator's usual one will not do
#   --delete-on-exit               babysit: delete the slice when the run has ended
#   --dry-run                      print the commands, run nothing
#
# The options with values are environment variables too: NAME, ZONE, PROJECT, ACCELERATOR,
# CAPACITY, SLICES, RUNTIME. So are POLL (seconds between looks, 20), WAIT (the longest for a slice,
# 86400) and RETRIES (of babysit without a new checkpoint, 20). HF_TOKEN, WANDB_API_KEY,
# JAX_COMPILATION_CACHE_DIR and LIBTPU_INIT_ARGS, where set, reach the run through a file that only
# you can read.
#
#   ./launch_tpu.sh up --name=opd --zone=us-east5-b --accelerator=v6e-16 --capacity=spot -- \
#       --config=configs/base.py --workdir=gs://bucket/runs/opd --config.opd.steps=500
#
# Exit codes: 0 done; 2 a mistake of yours, told in one line; 1 other trouble.
# This file works on both ends: over ssh it is called with the verbs worker-setup, worker-run, …
# Your end of it keeps to bash 3.2, which is what macOS has.
set -euo pipefail

FORWARD="HF_TOKEN WANDB_API_KEY JAX_COMPILATION_CACHE_DIR LIBTPU_INIT_ARGS"
MAX_MB=100 # of the checkout: data belong on gs://

say() { printf '%s\n' "$*" >&2; }
mistake() { say "error: $*" && exit 2; }
note() { if ((DRY)); then printf '# %s\n' "$*" >&3; else say "$*"; fi; }
pause() { ((DRY)) || sleep "$1"; }

quote() { # the arguments as one line that a shell reads back as the same arguments
  local word line="" one="'" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//$one/$escaped}'"
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

call() { # runs a command; with --dry-run prints it, to what was stdout when the script began
  if ((DRY)); then printf '%s\n' "$(quote "$@")" >&3; else "$@"; fi
}

# --- what was asked -------------------------------------------------------------------------------

parse() { # the command line into VERB, the options and ARGS
  NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} ACCELERATOR=${ACCELERATOR:-}
  CAPACITY=${CAPACITY:-on-demand} SLICES=${SLICES:-1} RUNTIME=${RUNTIME:-}
  POLL=${POLL:-20} WAIT=${WAIT:-86400} RETRIES=${RETRIES:-20}
  WORKER=0 DELETE_ON_EXIT=0 DRY=0 ARGS=() VERB=${1:---help}
  (($# == 0)) || shift
  while (($#)); do
    case $1 in
      --name=*) NAME=${1#*=} ;;
      --zone=*) ZONE=${1#*=} ;;
      --project=*) PROJECT=${1#*=} ;;
      --accelerator=*) ACCELERATOR=${1#*=} ;;
      --capacity=*) CAPACITY=${1#*=} ;;
      --slices=*) SLICES=${1#*=} ;;
      --runtime=*) RUNTIME=${1#*=} ;;
      --worker=*) WORKER=${1#*=} ;;
      --delete-on-exit) DELETE_ON_EXIT=1 ;;
      --dry-run) DRY=1 ;;
      --help) VERB=--help ;;
      --) shift && ARGS=("$@") && break ;;
      *) mistake "$1: no such option; they are written --name=value, the run's flags after --" ;;
    esac
    shift
  done
}

check() { # the options, before anything is spent; sets PLACE, and GROUP and HOSTS for ssh
  local number='^[0-9]{1,6}$'
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    mistake "--name=$NAME: small letters, digits and -, a letter first, at most 40"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || mistake "--zone=$ZONE: is none; us-east5-b is one"
  [[ $PROJECT =~ ^([a-z][-a-z0-9.:]*)?$ ]] || mistake "--project=$PROJECT: is no project's id"
  [[ $CAPACITY =~ ^(on-demand|spot|reserved)$ ]] ||
    mistake "--capacity=$CAPACITY: is none of on-demand, spot, reserved"
  [[ $RUNTIME =~ ^[-a-z0-9.]*$ ]] || mistake "--runtime=$RUNTIME: is no image's name"
  [[ $SLICES =~ ^[1-9][0-9]{0,2}$ ]] || mistake "--slices=$SLICES: a number is needed, 1 or more"
  [[ $WORKER =~ ^([0-9]+|all)$ ]] || mistake "--worker=$WORKER: a number is needed, or all"
  [[ $POLL =~ $number && $WAIT =~ $number && $RETRIES =~ $number ]] ||
    mistake "POLL=$POLL WAIT=$WAIT RETRIES=$RETRIES: whole numbers are needed"
  accelerator
  PLACE=("--zone=$ZONE" --quiet)
  [[ -z $PROJECT ]] || PLACE+=("--project=$PROJECT")
  GROUP=tpu-vm HOSTS=("${PLACE[@]}")
  ((SLICES == 1)) || { GROUP=queued-resources && HOSTS+=(--node=all); }
  flags ${ARGS[@]+"${ARGS[@]}"}
}

accelerator() { # resolves ACCELERATOR and RUNTIME; sets WORKERS, the hosts of all slices
  local asked=$ACCELERATOR kind n image sizes
  local flat="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
  local cubic="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
  WORKERS=1
  if [[ -z $asked ]]; then
    [[ ! $VERB =~ ^(create|up|babysit|doctor)$ ]] || mistake "--accelerator: is needed, v6e-16 say"
    return 0
  fi
  [[ ! $asked =~ ^(tpu-?7|v7|7x|ironwood) ]] ||
    mistake "--accelerator=$asked: the Cloud TPU API does not serve TPU7x: use GKE (xpk) or" \
      "Compute Engine for it, or v6e or v5p here"
  kind=${asked%%[:-]*} n=${asked#*[:-]}
  if [[ $asked == *:* ]]; then # a topology: chips along each dimension
    case $kind in v5e | v6e) sizes=$flat ;; v4 | v5p) sizes=$cubic ;; *) sizes=none ;; esac
    [[ " $sizes " == *" $n "* ]] || mistake "--accelerator=$asked: is no topology; of $kind: $sizes"
    n=$((${n//x/*}))
    [[ $kind == v?e ]] || n=$((2 * n)) # v4 and v5p are counted in cores
  fi
  [[ $n =~ ^[1-9][0-9]{0,4}$ ]] || n=0
  case $kind in
    v4) image=tpu-ubuntu2204-base ;;
    v5p) image=v2-alpha-tpuv5 ;;
    v5e | v5litepod) kind=v5litepod image=v2-alpha-tpuv5-lite ;;
    v6e) image=v2-alpha-tpuv6e ;;
    *) n=0 image="" ;;
  esac
  case $kind in
    v4 | v5p) sizes=$((n - n % 8)) WORKERS=$((n * SLICES / 8)) ;;
    *) sizes="1 4 8 16 32 64 128 256" WORKERS=$(((n <= 8 ? 1 : n / 4) * SLICES)) ;;
  esac
  ((n)) && [[ " $sizes " == *" $n "* ]] ||
    mistake "--accelerator=$asked: is not known; v5e-N and v6e-N have 1, 4, 8, 16, 32, 64, 128 or" \
      "256 chips; the N cores of v4-N and v5p-N divide by 8"
  ACCELERATOR=$kind-$n RUNTIME=${RUNTIME:-$image}
}

flags() { # the run's: finds what would fail on the slice, once that is paid for; sets WORKDIR
  local flag config=""
  WORKDIR=""
  for flag in "$@"; do
    case $flag in --config=*) config=${flag#*=} ;; --workdir=*) WORKDIR=${flag#*=} ;; esac
  done
  [[ $VERB =~ ^(run|up|babysit)$ ]] || return 0
  [[ -n $config && -n $WORKDIR ]] ||
    mistake "there is nothing to run: -- --config=FILE --workdir=gs://BUCKET/RUN are needed"
  [[ -f $HERE/${config%%:*} ]] || mistake "--config=$config: there is no such file in $HERE"
  [[ $WORKDIR == gs://* ]] || { [[ $VERB != babysit ]] && ((WORKERS == 1)); } ||
    mistake "--workdir=$WORKDIR: is one worker's own disk, lost with the slice; gs://… is needed"
}

# --- the slice ------------------------------------------------------------------------------------

trouble() { # tells gcloud's stderr in one line; returns 2 where the user can mend it, else 1
  case $(<"$ERR") in
    *"active account"* | *"auth login"* | *Reauth* | *invalid_grant* | *UNAUTHENTICATED*)
      say "error: not logged in: gcloud auth login" && return 2 ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
      say "error: the API is off: gcloud services enable tpu.googleapis.com" && return 2 ;;
  esac
  say "error: $( (grep -m 1 ERROR "$ERR" || tail -n 1 "$ERR") | sed 's/^ERROR: ([^)]*) //')"
  ! grep -qE 'PERMISSION_DENIED|INVALID_ARGUMENT|required property' "$ERR" || return 2
  return 1
}

ask() { # ask GROUP NAME FIELDS: prints them, of a thing that may be ABSENT
  local ask=(gcloud compute tpus "$1" describe "$2" "${PLACE[@]}" "--format=value($3)")
  call "${ask[@]}" 2>"$ERR" && return
  # Any other error says nothing of the slice: to create one then may make, and bill, a second.
  if grep -q NOT_FOUND "$ERR"; then echo ABSENT; else trouble; fi
}

look() { # sets STATE: ABSENT, or that of the queued resource and its nodes
  local found i node
  found=$(ask queued-resources "$NAME" "state.state,tpu.nodeSpec[0].node.acceleratorType") || return
  ((!DRY)) || return 0
  STATE=${found%%$'\t'*} found=${found#*$'\t'}
  [[ -z $ACCELERATOR || $STATE == ABSENT || $found == "$ACCELERATOR" ]] || {
    say "error: --name=$NAME is there as $found, not $ACCELERATOR: delete it, or name another"
    return 2
  }
  [[ $STATE == ACTIVE ]] || return 0
  for ((i = 0; i < SLICES; i++)); do # a preempted node may lie in a request that is still ACTIVE
    if ((SLICES == 1)); then node=$NAME; else node=$NAME-$i; fi
    found=$(ask tpu-vm "$node" state) || return
    case $found in
      READY) ;;
      PREEMPTED | TERMINATED | ABSENT) STATE=SUSPENDED && return ;;
      STOP*)
        say "error: $node was stopped: gcloud compute tpus tpu-vm start $node --zone=$ZONE"
        return 2 ;;
      *) STATE=PROVISIONING ;;
    esac
  done
}

create() {
  local nodes="--node-id=$NAME"
  ((SLICES == 1)) || nodes=--node-count=$SLICES
  set -- --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "$nodes"
  [[ $CAPACITY == on-demand ]] || set -- "$@" "--$CAPACITY"
  call gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "$@" 2>"$ERR" || trouble
}

delete() { # with --force, the nodes too
  call gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force 2>"$ERR" ||
    grep -q NOT_FOUND "$ERR" || trouble
}

ensure() { # a slice that is ACTIVE: the one that is there, or else a new one
  local before="" made=0 begun=$SECONDS
  STATE=ABSENT # in a dry run
  ((!DRY)) || note "creates only what is not there, and deletes first what is FAILED or SUSPENDED:"
  while look || return; do
    [[ $STATE == "$before" ]] || ((DRY)) || say "$NAME: $STATE"
    before=$STATE
    case $STATE in
      ACTIVE) return 0 ;;
      ABSENT | FAILED | SUSPENDED)
        ((!made)) || break
        if [[ $STATE == ABSENT ]]; then create && made=1; else delete; fi || return ;;
    esac
    ((!DRY)) || { note "until it is ACTIVE and its nodes READY:" && look && return; }
    ((SECONDS - begun <= WAIT)) || break
    pause "$POLL"
  done
  say "error: $NAME is $STATE after $((SECONDS - begun)) s: gcloud compute tpus queued-resources" \
    "describe $NAME --zone=$ZONE says why"
  return 1
}

# --- its workers ----------------------------------------------------------------------------------

again() { # runs a command up to five times, as long as it ends with 255: no connection
  local try code
  for try in 1 2 3 4 5; do
    code=0
    "$@" || code=$?
    ((code == 255)) || return $code
    say "$NAME: no connection ($try of 5)"
    pause "$POLL"
  done
  return 255
}

remote() { # remote WORKER LINE: runs a line of shell there. gcloud repeats it, on 255, ten times
  again call gcloud compute tpus "$GROUP" ssh "$NAME" "${HOSTS[@]}" --worker="$1" \
    --command="$2" </dev/null
}

on_all() { remote all "$(quote bash pod/code/launch_tpu.sh "$@")"; } # on_all WORKER_VERB WORD...

pack() { # the checkout as it lies here: what git tracks or does not ignore, and is there
  local sizes
  if ((DRY)); then
    note "in $CACHE/files: git ls-files --cached --others --exclude-standard"
  else
    mkdir -p "$CACHE" && chmod 700 "$CACHE"
    git -C "$HERE" rev-parse 2>"$ERR" || mistake "$HERE is no git checkout"
    (cd "$HERE" && git ls-files -coz --exclude-standard | while IFS= read -r -d '' file; do
      if [[ -f $file || -L $file ]]; then printf '%s\0' "$file"; fi
    done) | sort -zu >"$CACHE/files"
    sizes=$(cd "$HERE" && xargs -0 du -k <"$CACHE/files" | sort -rn)
    (($(awk '{s += $1} END {print s}' <<<"$sizes") <= MAX_MB * 1024)) ||
      mistake "$HERE exceeds $MAX_MB MB; largest:" "$(head -n 3 <<<"$sizes" | cut -f 2 | xargs)"
  fi
  call env COPYFILE_DISABLE=1 tar -C "$HERE" -czf "$CACHE/pod.tar.gz" --null -T "$CACHE/files"
}

variables() { # what the workers are told
  local name
  printf 'export REVISION=%q\n' "$(git -C "$HERE" describe --always --dirty --abbrev=40 || true)"
  for name in $FORWARD; do
    [[ -z ${!name:-} ]] || printf 'export %s=%q\n' "$name" "${!name}"
  done
}

# shellcheck disable=SC2016 # $v is the worker's
send() { # what was packed, and the variables, to every worker
  local name line
  # A folder for each version, and a link that moves: a run keeps the code that it began with.
  line='set -e; umask 077; chmod 600 pod.env; v=code-$(sha256sum <pod.tar.gz | cut -c 1-12); '
  line+='mkdir -p pod/$v; tar -xzf pod.tar.gz -C pod/$v; ln -sfn $v pod/new; mv -T pod/new pod/code'
  if ((DRY)); then
    for name in $FORWARD; do [[ -z ${!name:-} ]] || note "in $CACHE/pod.env: $name=***"; done
  else
    (umask 077 && variables >"$CACHE/pod.env") || return
  fi
  again call gcloud compute tpus "$GROUP" scp "$CACHE/pod.tar.gz" "$CACHE/pod.env" "$NAME:" \
    "${HOSTS[@]}" --worker=all </dev/null || return
  ((DRY)) || rm -f "$CACHE/pod.env"
  remote all "$line"
}

setup() { on_all worker-setup && on_all worker-check; }
start() { on_all worker-run ${ARGS[@]+"${ARGS[@]}"}; }
up() { ensure && send && setup && start; }
logs() { remote "$WORKER" "tail -n 100 -F pod/train.log"; }
stop() { on_all worker-stop && costs; }
costs() { note "$NAME still costs: ./launch_tpu.sh delete --name=$NAME --zone=$ZONE"; }

status() {
  look || return
  ((DRY)) || echo "$NAME: $STATE"
  if ((DRY)) || [[ $STATE == ACTIVE ]]; then on_all worker-status; fi
}

# --- through preemption ---------------------------------------------------------------------------

watch() { # looks until something has happened, and says what in END
  local lines states misses=0
  while ((misses++ < RETRIES)); do
    pause "$POLL"
    lines=$(on_all worker-status) || lines=""
    states=$(sed -nE 's/^worker [^ ]+: (running|stopped|lost|exited [0-9]+) .*/\1/p' <<<"$lines")
    if (($(grep -c . <<<"$states") < WORKERS)); then # the slice is gone, or only the way to it
      if look && [[ $STATE != ACTIVE ]]; then END=$STATE && return; fi
      continue
    fi
    case $states in
      *running*) misses=0 ;;
      *stopped*) END=stopped && return ;;
      *lost*) END=lost && return ;; # a worker was restarted under the run
      *) # where one fails, those that waited for it abort with a greater code
        END=$(sort -k 2n <<<"$states" | grep -vm 1 ' 0$') || END=ended
        [[ $END == ended ]] || say "$lines"
        return ;;
    esac
  done
}

newest() { # the step of the newest checkpoint, or none
  gcloud storage ls "${WORKDIR%/}/checkpoints/" 2>"$ERR" | sed -nE 's|.*/([0-9]+)/$|\1|p' |
    sort -n | tail -n 1 | grep . || echo none
}

farewell() { # farewell CODE: the end of babysit
  if ((DELETE_ON_EXIT)); then say "deletes $NAME" && delete; else costs; fi
  exit "$1"
}

babysit() {
  local code at before=none last="" tries=0
  if ((DRY)); then
    up && note "then this, every $POLL s; and all of it again after a preemption:"
    on_all worker-status
    return
  fi
  trap 'say "the run goes on, unwatched" && costs && exit 130' INT
  while :; do
    END="not brought up" code=0
    up || code=$?
    ((code != 2)) || exit 2
    ((code)) || watch
    at=$(newest)
    case $END in
      ended) say "the run has ended" && farewell 0 ;;
      stopped) say "the run was stopped by hand" && farewell 0 ;;
      ABSENT | DELETING) say "error: $NAME was deleted by hand" && exit 1 ;;
      "exited 2") say "error: a mistake in the run's flags or data, see above" && farewell 2 ;;
      exited*) [[ $END != "$last" || $at != "$before" ]] || {
        say "error: $END again, with no new checkpoint (newest: $at)" && farewell 1; } ;;
    esac
    if [[ $at == "$before" ]]; then tries=$((tries + 1)); else tries=0; fi
    ((tries < RETRIES)) || { say "error: $tries tries with no new checkpoint" && farewell 1; }
    say "$NAME: $END, newest checkpoint: $at; again"
    last=$END before=$at
    pause $((POLL << (tries < 5 ? tries : 5)))
  done
}

# --- what all this needs --------------------------------------------------------------------------

probe() { # probe WHAT REMEDY COMMAND...: fine if the command prints something
  local what=$1 remedy=$2 out
  shift 2
  if ((DRY)); then call "$@"; elif out=$("$@" 2>"$ERR") && [[ -n $out ]]; then
    echo "ok       $what: ${out//$'\n'/; }"
  else
    echo "MISSING  $what: $remedy"
    MISSING=1
  fi
}

doctor() {
  local bucket=${WORKDIR#gs://} here
  MISSING=0
  probe account "gcloud auth login" \
    gcloud auth list --filter=status:ACTIVE '--format=value(account)'
  ((DRY)) || PROJECT=${PROJECT:-$(gcloud config get-value project 2>"$ERR")}
  here=(--quiet "--project=$PROJECT")
  probe project "gcloud config set project ID, or --project=ID" \
    gcloud projects describe "$PROJECT" '--format=value(projectId)'
  probe "TPU API" "gcloud services enable tpu.googleapis.com" gcloud services list --enabled \
    "${here[@]}" --filter=config.name=tpu.googleapis.com '--format=value(config.name)'
  probe zone "gcloud compute tpus locations list" \
    gcloud compute tpus locations list "${here[@]}" "--filter=locationId=$ZONE" \
    '--format=value(locationId)'
  probe accelerator "gcloud compute tpus tpu-vm accelerator-types list --zone=$ZONE" \
    gcloud compute tpus tpu-vm accelerator-types list "${PLACE[@]}" \
    "--filter=type=$ACCELERATOR" '--format=value(type)'
  probe image "gcloud compute tpus tpu-vm versions list --zone=$ZONE" \
    gcloud compute tpus tpu-vm versions list "${PLACE[@]}" "--filter=version=$RUNTIME" \
    '--format=value(version)'
  probe quota "https://console.cloud.google.com/iam-admin/quotas, service tpu.googleapis.com" \
    gcloud beta quotas info list --service=tpu.googleapis.com "${here[@]}" \
    --flatten=dimensionsInfos '--format=value(quotaId,dimensionsInfos.details.value)' \
    "--filter=dimensionsInfos.applicableLocations:$ZONE AND dimensionsInfos.details.value>0"
  ((WORKERS == 1)) || probe "ssh key in the agent" "ssh-add ~/.ssh/google_compute_engine" ssh-add -l
  [[ $WORKDIR != gs://* ]] || probe "bucket, best in ${ZONE%-*}" "gcloud storage ls" \
    gcloud storage buckets describe "gs://${bucket%%/*}" '--format=value(location)'
  return $MISSING
}

# --- the other end: called on a worker, over ssh --------------------------------------------------
# gcloud repeats a line whose connection broke, beside the first that may still be at work: locks.

POD=$HOME/pod PYTHON=$HOME/pod/venv/bin/python # holds code, venv, train.log, and the run's state

running() { ! flock -n "$POD/lock" true; } # worker_job holds it as long as it lives

worker_setup() {
  local list try
  export PATH="$HOME/.local/bin:$PATH"
  cd "$HERE"
  exec 8>"$POD/setup.lock" && flock 8
  list=$(cat requirements.txt requirements-tpu.txt | sha256sum)
  if [[ -e $POD/installed && $(<"$POD/installed") == "$list" ]]; then return; fi
  ! running || mistake "the requirements have changed under a run: stop it first"
  for try in 1 2 3 4 5 failed; do
    [[ $try != failed ]] || { say "error: the requirements could not be installed" && return 1; }
    if { command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh; } >&2 &&
      { [[ -x $PYTHON ]] || uv venv --python 3.12 "$POD/venv"; } &&
      uv pip install --python "$PYTHON" -r requirements-tpu.txt; then break; fi
    sleep "${POLL:-20}"
  done
  printf '%s' "$list" >"$POD/installed"
}

worker_check() { # all workers at once, or the first waits for the others; not beside a run
  running || flock -w 5 "$POD/lock" "$PYTHON" -c '
import jax
jax.distributed.initialize(initialization_timeout=300)
here = jax.local_devices()
hbm = (here[0].memory_stats() or {}).get("bytes_limit", 0) / 2**30
print(f"worker {jax.process_index()} of {jax.process_count()}: jax {jax.__version__}, "
      f"{len(here)} of {jax.device_count()} {here[0].device_kind}, {hbm:.1f} GiB each")'
}

worker_run() { # starts worker_job in a session of its own, which outlives the connection
  local line
  line=$(quote "$@")
  exec 9>"$POD/lock"
  if ! flock -w 1 9; then
    [[ $(<"$POD/command") == "$line" ]] || mistake "another run is going on here: stop it first"
    echo "worker $HOSTNAME: is running already" && return
  fi
  rm -f "$POD/exit_code" "$POD/stopped"
  printf '%s\n' "$line" >"$POD/command"
  setsid nohup bash "$HERE/launch_tpu.sh" worker-job "$@" </dev/null >>"$POD/train.log" 2>&1 &
  echo "worker $HOSTNAME: started; its log: ~/pod/train.log"
}

worker_job() {
  local code=0
  cd "$HERE"
  # shellcheck source=/dev/null
  source "$HOME/pod.env"
  echo "--- $(date -u +%FT%TZ) $REVISION LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}"
  echo "--- python -m distill.train $(quote "$@")"
  export JAX_COORDINATOR_ADDRESS=auto # the slice says who else runs this
  "$PYTHON" -u -m distill.train "$@" 9>&- & # without the lock, which must not outlive this shell
  echo $! >"$POD/pid"
  wait $! || code=$?
  echo $code >"$POD/exit_code"
}

worker_status() { # worker HOST: running, or exited CODE, …, then the last line of the log
  local state=lost
  if running; then state=running
  elif [[ -e $POD/stopped ]]; then state=stopped
  elif [[ -e $POD/exit_code ]]; then state="exited $(<"$POD/exit_code")"; fi
  echo "worker $HOSTNAME: $state | $(tail -n 1 "$POD/train.log" 2>&1 | cut -c 1-300)"
}

worker_stop() {
  touch "$POD/stopped"
  running || return 0
  kill "$(<"$POD/pid")" || true
  flock -w 300 "$POD/lock" true || kill -KILL -- "-$(ps -o pgid= -p "$(<"$POD/pid")" | xargs)"
}

# --- main -----------------------------------------------------------------------------------------

HERE=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
case ${1:-} in
  worker-setup | worker-check | worker-run | worker-job | worker-status | worker-stop)
    verb=${1//-/_} && shift
    "$verb" "$@"
    exit ;;
esac
parse "$@"
case $VERB in
  --help) sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p' && exit ;;
  doctor | create | sync | setup | run | up | babysit | logs | status | stop | delete) check ;;
  *) mistake "$VERB: there is no such verb; --help lists them" ;;
esac
exec 3>&1
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/launch_tpu/$NAME ERR=/dev/null
if ((!DRY)); then
  command -v gcloud >/dev/null ||
    mistake "there is no gcloud here: https://cloud.google.com/sdk/docs/install"
  ERR=$(mktemp)
  trap 'rm -f "$ERR" "$CACHE/pod.env"' EXIT
fi
case $VERB in
  create) ensure ;;
  sync) pack && send ;;
  run) start ;;
  up | babysit) pack && "$VERB" ;;
  *) "$VERB" ;;
esac
