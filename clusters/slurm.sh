#!/usr/bin/env bash
# One run or search on Slurm. Submit it from the checkout, which all nodes share; its .venv was made by `make setup`:
#   sbatch --nodes=2 clusters/slurm.sh train configs/lstm.toml --run.storage /shared/runs --scale.workers 2
# Options of sbatch override those below; add GPUs, memory, partition and time. After a signal the run saves and ends.
# At the time limit the job is queued again, as Slurm itself does after a preemption, and the run resumes.

#SBATCH --job-name=lanes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

set -euo pipefail
(($#)) || { echo "error: the verb and its arguments are missing; see the top of clusters/slurm.sh" >&2 && exit 2; }
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
folder=/tmp/lanes-$SLURM_JOB_ID # of Ray, on each node; sockets need a short path
start_limit_s=300
running='' stopped='' requeue='' steps=()

# Waits for a process, also if signals interrupt that, and returns its exit status.
await() {
    local status again=0
    while
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2> /dev/null
    do :; done
    wait "$1" 2> /dev/null || again=$?
    ((again == 127)) || status=$again # 127: its status was returned above
    return "$status"
}

# Runs a command in the background, so that this shell handles signals meanwhile. Returns its exit status.
run() {
    local status=0
    "$@" &
    running=$!
    await "$running" || status=$?
    running=''
    return "$status"
}

# Runs Ray on one node until SIGUSR1. Slurm sends SIGTERM to all tasks of a cancelled job, but Ray must outlive the
# driver, which still saves.
# shellcheck disable=SC2329 # start_nodes calls it
run_node() {
    local folder=$1 stopped='' ray
    shift
    trap 'stopped=1' USR1
    trap : TERM INT
    (umask 077 && mkdir -p "$folder")
    [[ -O $folder && ! -L $folder ]] || { echo "error: $folder belongs to another user" >&2 && exit 1; }
    # Port 0 is any free one, so that jobs on one node do not collide.
    setsid ray start --block --disable-usage-stats --temp-dir="$folder" --num-cpus="$SRUN_CPUS_PER_TASK" \
        --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 "$@" > "$folder/start.log" 2>&1 &
    ray=$!
    until [[ $stopped ]] || ! kill -0 "$ray" 2> /dev/null; do wait "$ray" || true; done
    if [[ ! $stopped ]]; then cat "$folder/start.log" >&2; fi
    exec 2> /dev/null # bash reports killed processes
    kill -KILL -- "-$ray" || true # all processes of Ray; when it ends them itself that takes half a minute
    while kill -0 "$ray"; do wait "$ray" || true; done
    rm -rf "$folder"
    [[ $stopped ]]
}

# Starts Ray on nodes: start_nodes NAMES COUNT OPTION …
start_nodes() {
    # The node's shell, and not this one, expands what is in single quotes.
    # shellcheck disable=SC2016
    srun --overlap --nodelist="$1" --nodes="$2" --ntasks="$2" --ntasks-per-node=1 \
        bash -c "$(declare -f run_node)"'; run_node "$@"' run_node "$folder" "${@:3}" &
    steps+=($!)
}

end_nodes() {
    for step in "${steps[@]}"; do kill -USR1 "$step" 2> /dev/null || true; done
    for step in "${steps[@]}"; do await "$step" || true; done
}

# shellcheck disable=SC2329 # traps call it
stop() {
    stopped=1 requeue=$1
    [[ $running ]] || exit 143
    kill -TERM "$running" 2> /dev/null || true
}

fail() {
    [[ ! $stopped ]] || exit 143
    echo "error: $1" >&2
    exit 1
}

start_cluster() {
    local nodes others address client_port
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    others=$(IFS=, && echo "${nodes[*]:1}")
    RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
    export RAY_AUTH_TOKEN # exists in the environment of this job's processes only
    # The head's address in the network that connects the nodes.
    address=$(python -c 'import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    print(probe.getsockname()[0])' "${nodes[1]}")
    # Ray's client server, which a run does not use, must have a port, and 0 is not accepted.
    client_port=$(python -c 'import socket
with socket.create_server(("", 0)) as probe:
    print(probe.getsockname()[1])')
    rm -rf "$folder" # left by a job that was killed and queued again
    start_nodes "${nodes[0]}" 1 --head --port=0 --node-ip-address="$address" --include-dashboard=false \
        --ray-client-server-port="$client_port"
    until [[ -s $folder/ray_current_cluster ]]; do # this script runs on the first node, too
        if ! kill -0 "${steps[0]}" 2> /dev/null || ((SECONDS > start_limit_s)); then
            fail "Ray's head did not start on ${nodes[0]}"
        fi
        sleep 0.5 # nothing reports that Ray has written the file
    done
    RAY_ADDRESS=$(< "$folder/ray_current_cluster")
    export RAY_ADDRESS
    start_nodes "$others" $((${#nodes[@]} - 1)) --address="$RAY_ADDRESS"
    run timeout "$start_limit_s" python -c 'import sys, time, ray
ray.init(log_to_driver=False, logging_level="error")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.5)' "${#nodes[@]}" || fail "not all of $SLURM_JOB_NODELIST joined within $start_limit_s seconds"
}

trap end_nodes EXIT
trap 'stop ""' TERM INT
trap 'stop 1' USR1
# On one node the run starts a cluster of its own, which listens on loopback only.
if ((SLURM_JOB_NUM_NODES > 1)); then start_cluster; fi
status=0
run python -m job "$1" --run.name "lanes-$SLURM_JOB_ID" "${@:2}" || status=$? # a second --run.name overrides this one
end_nodes
steps=()
if [[ $requeue ]] && ((status == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
