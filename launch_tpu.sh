#!/usr/bin/env bash
# Trains on a TPU slice with gcloud: creates it, installs, runs, and recovers from preemption.
#
#   ./launch_tpu.sh VERB [--option=value ...] [-- flags of distill.train]
#
#   doctor    checks all that the other verbs need, and prints a remedy for what is missing
#   create    requests the slice (a queued resource) and waits for it; keeps an existing one
#   sync      copies this checkout, with uncommitted changes, and the variables to every worker
#   setup     installs Python 3.12 and requirements-tpu.txt on every worker, and counts devices
#   run       starts `python -m distill.train FLAGS` on every worker, detached
#   up        create, sync, setup and run; may be repeated
#   babysit   up, and again after each preemption, until the run has ended
#   logs      follows the log of worker 0, or of --worker=N or --worker=all
#   status    prints the state of the slice and of each worker
#   stop      ends the run, which saves a checkpoint first; the slice stays and is billed
#   delete    deletes the slice and ends billing
#
#   --name=  --zone=  --project=   of the slice; default project: gcloud's
#   --accelerator=v6e-16           or v5e-64, v5p-128; or as `plan` names it, v5e:8x8
#   --capacity=on-demand           or spot or reserved
#   --slices=1                     above 1: a multislice job
#   --runtime=                     the image; default: the accelerator's
#   --delete-on-exit               babysit: delete the slice when the run has ended
#   --no-check                     skip the check of the run before a slice is asked for
#   --dry-run                      print the commands, run nothing
#
# `up`, `run` and `babysit`, and their dry runs, first call `python -m distill.train --check` here: a
# wrong flag, a row that cannot be used, or too little memory is found before anything is billed.
#
# Options with values can also be set as environment variables: NAME, ZONE, PROJECT, ACCELERATOR,
# CAPACITY, SLICES, RUNTIME; --no-check as CHECK=0. Further ones: POLL (seconds between checks, 20), WAIT (seconds at most
# for a slice, 86400), RETRIES (restarts by babysit without a new checkpoint, 20). HF_TOKEN,
# JAX_COMPILATION_CACHE_DIR, LIBTPU_INIT_ARGS and the variables of trackers (FORWARD below), if set,
# are passed to the run in a file that only you can read.
#
#   ./launch_tpu.sh up --name=opd --zone=us-east5-b --accelerator=v6e-16 --capacity=spot -- \
#       --config=configs/base.py --workdir=gs://bucket/runs/opd --config.opd.steps=500
#
# Exit codes: 0 success; 2 a user error, in one line; 1 another failure.
# This file also runs on the workers, over ssh, with the verbs worker-setup, worker-run, …
# The local part keeps to bash 3.2, the version of macOS.
set -euo pipefail

FORWARD="HF_TOKEN JAX_COMPILATION_CACHE_DIR LIBTPU_INIT_ARGS
  WANDB_API_KEY WANDB_BASE_URL WANDB_ENTITY WANDB_PROJECT WANDB_NAME WANDB_MODE
  TRACKIO_PROJECT TRACKIO_SPACE_ID TRACKIO_SERVER_URL TRACKIO_WRITE_TOKEN
  MLFLOW_TRACKING_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN
  MLFLOW_EXPERIMENT_NAME"
IMPORTS='import importlib.util as u; [u.find_spec(x) or exit(1) for x in ("jax", "transformers")]'
MAX_MB=100 # of the checkout; data belong on gs://

say() { printf '%s\n' "$*" >&2; }
mistake() { say "error: $*" && exit 2; }
note() { if ((DRY)); then printf '# %s\n' "$*" >&3; else say "$*"; fi; }
pause() { ((DRY)) || sleep "$1"; }

quote() { # prints the arguments as one line that a shell parses back into them
  local word line="" one="'" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//$one/$escaped}'"
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

call() { # runs a command; with --dry-run prints it to the script's own stdout
  if ((DRY)); then printf '%s\n' "$(quote "$@")" >&3; else "$@"; fi
}

# --- options --------------------------------------------------------------------------------------

parse() { # parses the command line into VERB, the options and ARGS
  NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} ACCELERATOR=${ACCELERATOR:-}
  CAPACITY=${CAPACITY:-on-demand} SLICES=${SLICES:-1} RUNTIME=${RUNTIME:-}
  POLL=${POLL:-20} WAIT=${WAIT:-86400} RETRIES=${RETRIES:-20}
  CHECK=${CHECK:-1} TOPOLOGY="" WORKER=0 DELETE_ON_EXIT=0 DRY=0 ARGS=() VERB=${1:---help}
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
      --no-check) CHECK=0 ;;
      --dry-run) DRY=1 ;;
      --help) VERB=--help ;;
      --) shift && ARGS=("$@") && break ;;
      *) mistake "$1: no such option; write --name=value, and the run's flags after --" ;;
    esac
    shift
  done
}

check() { # checks the options before anything is billed; sets PLACE, GROUP and HOSTS for ssh
  local number='^[0-9]{1,6}$'
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    mistake "--name=$NAME: use lower-case letters, digits and -, a letter first, at most 40"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || mistake "--zone=$ZONE: not a zone like us-east5-b"
  [[ $PROJECT =~ ^([a-z][-a-z0-9.:]*)?$ ]] || mistake "--project=$PROJECT: not a project id"
  [[ $CAPACITY =~ ^(on-demand|spot|reserved)$ ]] ||
    mistake "--capacity=$CAPACITY: must be on-demand, spot or reserved"
  [[ $RUNTIME =~ ^[-a-z0-9.]*$ ]] || mistake "--runtime=$RUNTIME: not the name of an image"
  [[ $SLICES =~ ^[1-9][0-9]{0,2}$ ]] || mistake "--slices=$SLICES: must be a number, 1 or more"
  [[ $WORKER =~ ^([0-9]+|all)$ ]] || mistake "--worker=$WORKER: must be a number, or all"
  [[ $POLL =~ $number && $WAIT =~ $number && $RETRIES =~ $number ]] ||
    mistake "POLL=$POLL WAIT=$WAIT RETRIES=$RETRIES: must be whole numbers"
  accelerator
  PLACE=("--zone=$ZONE" --quiet)
  [[ -z $PROJECT ]] || PLACE+=("--project=$PROJECT")
  GROUP=tpu-vm HOSTS=("${PLACE[@]}")
  ((SLICES == 1)) || { GROUP=queued-resources && HOSTS+=(--node=all); }
  flags ${ARGS[@]+"${ARGS[@]}"}
}

accelerator() { # resolves ACCELERATOR and RUNTIME; sets WORKERS, the hosts of all slices, and
  # TOPOLOGY, the shape of one slice with the chips of all
  local asked=$ACCELERATOR kind n image sizes shape shapes=""
  local flat="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
  local cubic="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
  WORKERS=1
  if [[ -z $asked ]]; then
    [[ ! $VERB =~ ^(create|up|babysit|doctor)$ ]] ||
      mistake "--accelerator: is required, for example v6e-16"
    return 0
  fi
  [[ ! $asked =~ ^(tpu-?7|v7|7x|ironwood) ]] ||
    mistake "--accelerator=$asked: the Cloud TPU API does not offer TPU7x; use GKE (xpk) or" \
      "Compute Engine for it, or v6e or v5p here"
  kind=${asked%%[:-]*} n=${asked#*[:-]}
  if [[ $asked == *:* ]]; then # a topology: chips along each dimension
    case $kind in v5e | v6e) sizes=$flat ;; v4 | v5p) sizes=$cubic ;; *) sizes=none ;; esac
    [[ " $sizes " == *" $n "* ]] || mistake "--accelerator=$asked: not a topology; $kind has $sizes"
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
    mistake "--accelerator=$asked: unknown; v5e-N and v6e-N have 1, 4, 8, 16, 32, 64, 128 or 256" \
      "chips; v4-N and v5p-N have N cores, a multiple of 8"
  ACCELERATOR=$kind-$n RUNTIME=${RUNTIME:-$image}
  case $kind in
    v4 | v5p) shapes=$cubic n=$((n / 2)) ;;
    *) shapes=$flat ;;
  esac
  for shape in $shapes; do
    ((${shape//x/*} != n * SLICES)) || TOPOLOGY=${kind/litepod/e}:$shape
  done
}

flags() { # checks the run's flags before a slice is billed; sets WORKDIR
  local flag config=""
  WORKDIR=""
  for flag in "$@"; do
    case $flag in --config=*) config=${flag#*=} ;; --workdir=*) WORKDIR=${flag#*=} ;; esac
  done
  [[ $VERB =~ ^(run|up|babysit)$ ]] || return 0
  [[ -n $config && -n $WORKDIR ]] ||
    mistake "nothing to run: pass -- --config=FILE --workdir=gs://BUCKET/RUN"
  [[ -f $HERE/${config%%:*} ]] || mistake "--config=$config: no such file in $HERE"
  [[ $WORKDIR == gs://* ]] || { [[ $VERB != babysit ]] && ((WORKERS == 1)); } ||
    mistake "--workdir=$WORKDIR: a worker's disk is lost with the slice; use gs://…"
}

inspect() { # checks the run itself, as far as this machine can; ends if anything is wrong
  local python found=""
  ((CHECK)) || return 0
  for python in "$HERE/.venv/bin/python" python3; do
    [[ -n $found ]] || ! "$python" -c "$IMPORTS" 2>/dev/null || found=$python
  done
  [[ -n $found && -n $TOPOLOGY ]] || {
    say "not checked: the run's flags, models and data: that takes --accelerator, and what" \
      "\`make quickstart\` installs here"
    return 0
  }
  (cd "$HERE" && "$found" -m distill.train --check "--topology=$TOPOLOGY" "$@") || exit
}

# --- the slice ------------------------------------------------------------------------------------

trouble() { # prints gcloud's stderr in one line; returns 2 if the user can fix it, else 1
  case $(<"$ERR") in
    *"active account"* | *"auth login"* | *Reauth* | *invalid_grant* | *UNAUTHENTICATED*)
      say "error: not logged in; run: gcloud auth login" && return 2 ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
      say "error: the API is off; run: gcloud services enable tpu.googleapis.com" && return 2 ;;
  esac
  say "error: $( (grep -m 1 ERROR "$ERR" || tail -n 1 "$ERR") | sed 's/^ERROR: ([^)]*) //')"
  ! grep -qE 'PERMISSION_DENIED|INVALID_ARGUMENT|required property' "$ERR" || return 2
  return 1
}

ask() { # ask GROUP NAME FIELDS: prints the fields of a resource, or ABSENT
  local ask=(gcloud compute tpus "$1" describe "$2" "${PLACE[@]}" "--format=value($3)")
  call "${ask[@]}" 2>"$ERR" && return
  # After any other error a slice may exist: creating one could bill a second.
  if grep -q NOT_FOUND "$ERR"; then echo ABSENT; else trouble; fi
}

look() { # sets STATE: ABSENT, or the state of the queued resource and its nodes
  local found i node
  found=$(ask queued-resources "$NAME" "state.state,tpu.nodeSpec[0].node.acceleratorType") || return
  ((!DRY)) || return 0
  STATE=${found%%$'\t'*} found=${found#*$'\t'}
  [[ -z $ACCELERATOR || $STATE == ABSENT || $found == "$ACCELERATOR" ]] || {
    say "error: --name=$NAME exists as $found, not $ACCELERATOR: delete it, or use another name"
    return 2
  }
  [[ $STATE == ACTIVE ]] || return 0
  for ((i = 0; i < SLICES; i++)); do # a request can be ACTIVE with a preempted node
    if ((SLICES == 1)); then node=$NAME; else node=$NAME-$i; fi
    found=$(ask tpu-vm "$node" state) || return
    case $found in
      READY) ;;
      PREEMPTED | TERMINATED | ABSENT) STATE=SUSPENDED && return ;;
      STOP*)
        say "error: $node is stopped; run: gcloud compute tpus tpu-vm start $node --zone=$ZONE"
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

delete() { # --force deletes the nodes too
  call gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force 2>"$ERR" ||
    grep -q NOT_FOUND "$ERR" || trouble
}

ensure() { # waits for an ACTIVE slice, and creates it where there is none
  local before="" made=0 begun=$SECONDS
  STATE=ABSENT # for a dry run
  ((!DRY)) || note "only if there is no slice; one that is FAILED or SUSPENDED is deleted first:"
  while look || return; do
    [[ $STATE == "$before" ]] || ((DRY)) || say "$NAME: $STATE"
    before=$STATE
    case $STATE in
      ACTIVE) return 0 ;;
      ABSENT | FAILED | SUSPENDED)
        ((!made)) || break
        if [[ $STATE == ABSENT ]]; then create && made=1; else delete; fi || return ;;
    esac
    ((!DRY)) || { note "until it is ACTIVE and its nodes are READY:" && look && return; }
    ((SECONDS - begun <= WAIT)) || break
    pause "$POLL"
  done
  say "error: $NAME is $STATE after $((SECONDS - begun)) s: gcloud compute tpus queued-resources" \
    "describe $NAME --zone=$ZONE shows why"
  return 1
}

# --- workers --------------------------------------------------------------------------------------

again() { # runs a command up to five times, while it exits with 255: no connection
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

remote() { # remote WORKER LINE: runs a line of shell there; gcloud itself retries 255 ten times
  again call gcloud compute tpus "$GROUP" ssh "$NAME" "${HOSTS[@]}" --worker="$1" \
    --command="$2" </dev/null
}

on_all() { remote all "$(quote bash pod/code/launch_tpu.sh "$@")"; } # on_all WORKER_VERB WORD...

pack() { # packs the checkout: all existing files that git does not ignore
  local sizes
  if ((DRY)); then
    note "in $CACHE/files: git ls-files --cached --others --exclude-standard"
  else
    mkdir -p "$CACHE" && chmod 700 "$CACHE"
    git -C "$HERE" rev-parse 2>"$ERR" || mistake "$HERE is not a git checkout"
    (cd "$HERE" && git ls-files -coz --exclude-standard | while IFS= read -r -d '' file; do
      if [[ -f $file || -L $file ]]; then printf '%s\0' "$file"; fi
    done) | sort -zu >"$CACHE/files"
    sizes=$(cd "$HERE" && xargs -0 du -k <"$CACHE/files" | sort -rn)
    (($(awk '{s += $1} END {print s}' <<<"$sizes") <= MAX_MB * 1024)) ||
      mistake "$HERE exceeds $MAX_MB MB; largest:" "$(head -n 3 <<<"$sizes" | cut -f 2 | xargs)"
  fi
  call env COPYFILE_DISABLE=1 tar -C "$HERE" -czf "$CACHE/pod.tar.gz" --null -T "$CACHE/files"
}

variables() { # prints the environment of the workers
  local name
  printf 'export REVISION=%q\n' "$(git -C "$HERE" describe --always --dirty --abbrev=40 || true)"
  for name in $FORWARD; do
    [[ -z ${!name:-} ]] || printf 'export %s=%q\n' "$name" "${!name}"
  done
}

# shellcheck disable=SC2016 # $v is the worker's
send() { # copies the packed checkout and the variables to every worker
  local name line
  # Each version has a folder, and a link names the newest: a run keeps the code it started with.
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
costs() { note "$NAME is still billed; to end: ./launch_tpu.sh delete --name=$NAME --zone=$ZONE"; }

status() {
  look || return
  ((DRY)) || echo "$NAME: $STATE"
  if ((DRY)) || [[ $STATE == ACTIVE ]]; then on_all worker-status; fi
}

# --- preemption -----------------------------------------------------------------------------------

watch() { # polls until something has happened, and sets END to it
  local lines states misses=0
  while ((misses++ < RETRIES)); do
    pause "$POLL"
    lines=$(on_all worker-status) || lines=""
    states=$(sed -nE 's/^worker [^ ]+: (running|stopped|lost|exited [0-9]+) .*/\1/p' <<<"$lines")
    if (($(grep -c . <<<"$states") < WORKERS)); then # the slice is gone, or just unreachable
      if look && [[ $STATE != ACTIVE ]]; then END=$STATE && return; fi
      continue
    fi
    case $states in
      *running*) misses=0 ;;
      *stopped*) END=stopped && return ;;
      *lost*) END=lost && return ;; # a worker restarted during the run
      *) # when one worker fails, those waiting for it abort with a greater code
        END=$(sort -k 2n <<<"$states" | grep -vm 1 ' 0$') || END=ended
        [[ $END == ended ]] || say "$lines"
        return ;;
    esac
  done
}

newest() { # prints the step of the newest checkpoint, or none
  gcloud storage ls "${WORKDIR%/}/checkpoints/" 2>"$ERR" | sed -nE 's|.*/([0-9]+)/$|\1|p' |
    sort -n | tail -n 1 | grep . || echo none
}

farewell() { # farewell CODE: ends babysit
  if ((DELETE_ON_EXIT)); then say "deleting $NAME" && delete; else costs; fi
  exit "$1"
}

babysit() {
  local code at before=none last="" tries=0
  if ((DRY)); then
    up && note "then every $POLL s this, and all of it again after a preemption:"
    on_all worker-status
    return
  fi
  trap 'say "the run continues without babysit" && costs && exit 130' INT
  while :; do
    END="the slice did not come up" code=0
    up || code=$?
    ((code != 2)) || exit 2
    ((code)) || watch
    at=$(newest)
    case $END in
      ended) say "the run has ended" && farewell 0 ;;
      stopped) say "the run was stopped by the user" && farewell 0 ;;
      ABSENT | DELETING) say "error: $NAME was deleted by the user" && exit 1 ;;
      "exited 130" | "exited 143") ;; # stopped by a signal, as before a preemption
      "exited 2") say "error: wrong flags or data of the run, see above" && farewell 2 ;;
      exited*) [[ $END != "$last" || $at != "$before" ]] || {
        say "error: $END again, without a new checkpoint (newest: $at)" && farewell 1; } ;;
    esac
    if [[ $at == "$before" ]]; then tries=$((tries + 1)); else tries=0; fi
    ((tries < RETRIES)) || { say "error: $tries attempts without a new checkpoint" && farewell 1; }
    say "$NAME: $END, newest checkpoint: $at; trying again"
    last=$END before=$at
    pause $((POLL << (tries < 5 ? tries : 5)))
  done
}

# --- doctor ---------------------------------------------------------------------------------------

probe() { # probe WHAT REMEDY COMMAND...: ok if the command prints something
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

# --- on a worker, called over ssh -----------------------------------------------------------------
# gcloud repeats a line after a lost connection, while the first one may still run: hence the locks.

POD=$HOME/pod PYTHON=$HOME/pod/venv/bin/python # holds code, venv, train.log and the run's state

running() { ! flock -n "$POD/lock" true; } # worker_job holds the lock while it lives

worker_setup() {
  local list try
  export PATH="$HOME/.local/bin:$PATH"
  cd "$HERE"
  exec 8>"$POD/setup.lock" && flock 8
  list=$(cat requirements.txt requirements-tpu.txt | sha256sum)
  if [[ -e $POD/installed && $(<"$POD/installed") == "$list" ]]; then return; fi
  ! running || mistake "the requirements changed during a run: stop it first"
  for try in 1 2 3 4 5 failed; do
    [[ $try != failed ]] || { say "error: the requirements could not be installed" && return 1; }
    if { command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh; } >&2 &&
      { [[ -x $PYTHON ]] || uv venv --python 3.12 "$POD/venv"; } &&
      uv pip install --python "$PYTHON" -r requirements-tpu.txt; then break; fi
    sleep "${POLL:-20}"
  done
  printf '%s' "$list" >"$POD/installed"
}

worker_check() { # prints devices; on all workers at once, as each waits for all; not during a run
  running || flock -w 5 "$POD/lock" "$PYTHON" -c '
import jax
jax.distributed.initialize(initialization_timeout=300)
here = jax.local_devices()
hbm = (here[0].memory_stats() or {}).get("bytes_limit", 0) / 2**30
print(f"worker {jax.process_index()} of {jax.process_count()}: jax {jax.__version__}, "
      f"{len(here)} of {jax.device_count()} {here[0].device_kind}, {hbm:.1f} GiB each")'
}

worker_run() { # starts worker_job in its own session, which outlives the connection
  local line
  line=$(quote "$@")
  exec 9>"$POD/lock"
  if ! flock -w 1 9; then
    [[ $(<"$POD/command") == "$line" ]] || mistake "another run is active here: stop it first"
    echo "worker $HOSTNAME: already running" && return
  fi
  rm -f "$POD/exit_code" "$POD/stopped"
  printf '%s\n' "$line" >"$POD/command"
  setsid nohup bash "$HERE/launch_tpu.sh" worker-job "$@" </dev/null >>"$POD/train.log" 2>&1 &
  echo "worker $HOSTNAME: started; log: ~/pod/train.log"
}

worker_job() {
  local code=0
  cd "$HERE"
  # shellcheck source=/dev/null
  source "$HOME/pod.env"
  echo "--- $(date -u +%FT%TZ) $REVISION LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}"
  echo "--- python -m distill.train $(quote "$@")"
  export JAX_COORDINATOR_ADDRESS=auto # the slice knows the other workers
  "$PYTHON" -u -m distill.train "$@" 9>&- & # without the lock, which must end with this shell
  echo $! >"$POD/pid"
  wait $! || code=$?
  echo $code >"$POD/exit_code"
}

worker_status() { # prints "worker HOST: STATE | LAST LINE OF THE LOG"
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
  *) mistake "$VERB: no such verb; --help lists them" ;;
esac
[[ ! $VERB =~ ^(run|up|babysit)$ ]] || inspect ${ARGS[@]+"${ARGS[@]}"}
exec 3>&1
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/launch_tpu/$NAME ERR=/dev/null
if ((!DRY)); then
  command -v gcloud >/dev/null ||
    mistake "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  if [[ -z $PROJECT && $VERB != doctor ]]; then
    [[ $(gcloud config get-value project 2>/dev/null) =~ ^[a-z] ]] ||
      mistake "no project: pass --project=ID, or run: gcloud config set project ID"
  fi
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
