#!/usr/bin/env bash
# A Ray cluster of a few nodes on one Linux machine, each with a raylet and an address of its own.
# shellcheck disable=SC2086 # Lists of pids are split where they are used.
set -euo pipefail

usage() {
  cat >&2 <<'END'
usage: cluster/laptop.sh COMMAND [--dir DIR]

  up [NODES] [--cpus C] [--port P]  start NODES nodes (2) of C CPUs (the cores shared out)
  add [--cpus C]                    start one more
  kill N                            end all of node N at once, as the loss of its machine does
  drain N SECONDS                   give notice that node N will be taken away in SECONDS
  status                            list the nodes, and the lines that connect a shell
  down                              end the cluster and remove its files

`eval "$(cluster/laptop.sh up)"` also connects the shell, and `eval "$(cluster/laptop.sh down)"`
takes it off again. Node 1 is the head.
DIR (${TMPDIR:-/tmp}/mlvicx-laptop) holds the files of one cluster; another DIR is another cluster.
END
  exit 2
}

die() {
  echo "laptop.sh: $*" >&2
  exit "${code:-1}"
}

whole() { # VALUE LEAST WHAT
  if [[ ! $1 =~ ^(0|[1-9][0-9]{0,4})$ ]] || (($1 < $2)); then
    code=2 die "$3 is a whole number from $2, not '$1'."
  fi
}

# --- processes

with_env() { # NAME=VALUE: the pids that have it in their environment
  grep -lzsxF -e "$1" /proc/[0-9]*/environ | cut -d/ -f3 || true
}

# The pids of all that this cluster started: the environment tells those whose parent has died,
# ancestry those that were started with another environment.
ours() {
  { grep -s '^PPid:' /proc/[0-9]*/status || true; } | awk -F '[/:\t]+' '
    NR == FNR {ours[$1]; next}
    {parent[$3] = $6}
    END {
      do {
        grew = 0
        for (p in parent) if (!(p in ours) && parent[p] in ours) {ours[p]; grew = 1}
      } while (grew)
      for (p in ours) if (p) print p
    }' <(with_env "MLVICX_LAPTOP=$dir" && echo) -
}

alive() { # PIDS: those that still run, each once; a zombie does not
  local pid
  for pid in $1; do
    if grep -qs '^State:.[^ZX]' "/proc/$pid/status"; then echo "$pid"; fi
  done | sort -u
}

raylet() { # N: the pid, address and id of node N if it is up
  local pid
  for pid in $(with_env "MLVICX_LAPTOP_NODE=$dir/$1"); do
    { tr '\0' ' ' <"/proc/$pid/cmdline" || true; } 2>/dev/null |
      sed -nE "s|^[^ ]*/raylet .* --node_id=([^ ]+) --node_ip_address=([^ ]+) .*|$pid \2 \1|p"
  done
}

# --- nodes

end_node() { # N
  local pids
  while pids=$(alive "$(with_env "MLVICX_LAPTOP_NODE=$dir/$1")") && [[ $pids ]]; do
    kill -KILL $pids 2>/dev/null || true
    sleep 0.05
  done
}

start() { # N ARGUMENTS
  local n=$1 found=''
  shift
  # setsid: or the terminal's Ctrl-C would reach the node. A port of 0 is a free one. Without
  # --num-gpus each node would offer every GPU of the machine.
  if setsid env MLVICX_LAPTOP="$dir" MLVICX_LAPTOP_NODE="$dir/$n" "$ray" start "$@" \
    --num-cpus "$cpus" --num-gpus 0 --object-store-memory $((128 << 20)) --temp-dir "$dir/$n" \
    --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0 \
    </dev/null >"$dir/$n.log" 2>&1; then found=$(raylet "$n"); fi
  if [[ ! $found ]]; then
    tail -n 3 "$dir/$n.log" >&2
    if [[ $command == add ]]; then end_node "$n"; else down; fi
    die "node $n did not start; the lines above are Ray's."
  fi
  echo "$n $cpus $found" >>"$dir/nodes.txt"
}

worker() { # N
  start "$1" --address "$(<"$dir/1/ray_current_cluster")" --node-ip-address "127.0.0.$1"
}

must_be_up() { [[ -s $dir/env.sh && $(ours) ]] || die "no cluster is up in $dir: see 'up'."; }
known() { [[ $(raylet "$1") ]] || die "node $1 is not up in $dir: see 'status'."; }
remove_files() { rm -rf "$dir"/[0-9]* "$dir/nodes.txt" "$dir/env.sh" "$dir/token"; }

# --- commands

up() {
  local n client dashboard
  [[ ! $(ours) ]] || code=2 die "the cluster in $dir is up already: see 'status', end it by 'down'."
  # The names of a session and a socket take 66 of the 107 bytes of a Unix socket's path.
  ((${#dir} <= 40)) || code=2 die "$dir is too long for a socket's path: at most 40 characters."
  umask 077
  mkdir -p "$dir" 2>/dev/null && [[ -O $dir && -w $dir ]] || die "$dir is not your own folder: give --dir."
  remove_files
  # Ray listens on every address of the machine: only a reader of this file gets in.
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$dir/token"
  client=$((20000 + RANDOM % 10000))
  while (: <>"/dev/tcp/127.0.0.1/$client") 2>/dev/null; do client=$((client + 1)); done
  start 1 --head --port "$port" --ray-client-server-port "$client" \
    --dashboard-host 127.0.0.1 --dashboard-port 0
  dashboard=$(grep -om1 'http://127[0-9.]*:[0-9]*' "$dir/1.log") || die "Ray named no dashboard."
  cat >"$dir/env.sh" <<END
export RAY_ADDRESS=$(<"$dir/1/ray_current_cluster")
export RAY_API_SERVER_ADDRESS=$dashboard
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$dir/token
END
  for ((n = 2; n <= nodes; n++)); do worker "$n"; done
  echo "Up: $nodes nodes of $cpus CPU; the dashboard asks for the token in $dir/token." \
    "Next, in a shell with these lines (or: . $dir/env.sh): mlvicx, ray status, ray job submit." >&2
  cat "$dir/env.sh"
}

add() {
  must_be_up
  cpus=${cpus:-$(awk 'NR == 1 {print $2}' "$dir/nodes.txt")}
  worker "$(awk 'END {print $1 + 1}' "$dir/nodes.txt")"
  echo "Node up: $(tail -n 1 "$dir/nodes.txt")" >&2
}

drain() { # N SECONDS
  local found
  known "$1"
  found=$(raylet "$1")
  "$ray" drain-node --address "$(<"$dir/1/ray_current_cluster")" --node-id "${found##* }" \
    --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "laptop.sh drain" \
    --deadline-remaining-seconds "$2" || die "Ray did not take the notice; see above."
}

status() {
  local n cores found
  must_be_up
  while read -r n cores found; do
    echo "# node $n: $cores CPU, raylet, address, id: $found, $([[ $(raylet "$n") ]] || echo dead)"
  done <"$dir/nodes.txt"
  cat "$dir/env.sh"
}

down() {
  local all i
  all=$(ours)
  if [[ ! $all && ! -e $dir/token ]]; then
    echo "No cluster is up in $dir." >&2
    return
  fi
  kill -TERM $all 2>/dev/null || true
  for ((i = 0; i < 100; i++)); do
    all=$(alive "$all $(ours)")
    [[ $all ]] || break
    # Ray's own end of a whole cluster takes more than 12 s; nothing in it is worth that wait.
    if ((i >= 10)); then kill -KILL $all 2>/dev/null || true; fi
    sleep 0.2
  done
  [[ ! $all ]] || die "these processes do not end: ${all//$'\n'/ }."
  remove_files
  rmdir "$dir" 2>/dev/null || true
  echo "The cluster in $dir is down. Next, in a shell that it was joined to: the line below." >&2
  echo "unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN_PATH"
}

# --- the command line

(($#)) || usage
command=$1 nodes=2 cpus='' port=0 plain=''
dir=${TMPDIR:-/tmp}/mlvicx-laptop
shift
while (($#)); do
  case $1 in
    --dir) dir=${2:-} && shift ;;
    --cpus) whole "${2:-}" 1 --cpus && cpus=$2 && shift ;;
    --port) whole "${2:-}" 1024 --port && port=$2 && shift ;;
    -*) usage ;;
    *) plain="$plain $1" ;;
  esac
  shift
done
[[ $dir ]] || usage
set -- $plain
case $command:$# in
  up:0 | add:0 | status:0 | down:0) ;;
  up:1) whole "$1" 1 NODES && nodes=$1 ;;
  kill:1) whole "$1" 1 N ;;
  drain:2) whole "$1" 1 N && whole "$2" 0 SECONDS ;;
  *) usage ;;
esac

[[ -d /proc/self ]] || die "this needs Linux: processes are found by /proc."
dir=$(realpath -m "$dir")
ray=$(realpath "${BASH_SOURCE[0]}")
ray=${ray%/*/*}/.venv/bin/ray
[[ -x $ray ]] || ray=$(command -v ray) || die "there is no ray: install mlvicx_dist first."
if [[ $command == up && ! $cpus ]]; then
  cpus=$(($(nproc) > nodes ? $(nproc) / nodes : 1))
fi

unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token RAY_USAGE_STATS_ENABLED=0
# Ray's workers are nice by 15: beside any other load they get almost nothing.
export RAY_worker_niceness=0
# A job that is stopped has this long to write a checkpoint; Ray's own is 3 s.
export RAY_JOB_STOP_WAIT_TIME_S=60
# A node is dead after 5 failed checks: 5 s, not 13, where nothing listens any more. One that is
# only slow has the 10 s of a check's timeout each time.
export RAY_health_check_period_ms=1000
# Or the titles that Ray gives its processes would be written over the environment that finds them.
export SPT_NOENV=1

case $command in kill) known "$1" && end_node "$1" ;; *) "$command" "$@" ;; esac
