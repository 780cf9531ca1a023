#!/usr/bin/env bash
# Start, stop or look at the nodes of a cluster over ssh. Every machine has this repository (or the package) installed
# and its own copy of the configuration; a node outlives the ssh session and is no child of this script.
#
#   launch/start-over-ssh.sh start  mini1 mini2 master
#   launch/start-over-ssh.sh status mini1 mini2 master
#   launch/start-over-ssh.sh stop   mini1 mini2 master
#
# Arguments are ssh destinations; NAME=DESTINATION (mini1=me@10.0.0.1) says the node's name where it differs.
#   MLX_CLUSTER_BIN     command on the machines     (default: mlx-cluster)
#   MLX_CLUSTER_CONFIG  directory on the machines   (default: mlx-cluster/config, below the home directory)
#   MLX_CLUSTER_ARGS    more arguments, such as --insecure
set -euo pipefail

BIN=${MLX_CLUSTER_BIN:-mlx-cluster}
CONFIG=${MLX_CLUSTER_CONFIG:-mlx-cluster/config}
ARGS=${MLX_CLUSTER_ARGS:-}

if [ $# -lt 2 ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
action=$1
shift

for item in "$@"; do
  name=${item%%=*}
  destination=${item#*=}
  name=${name#*@}
  name=${name%%.*}
  pidfile=".mlx-cluster-$name.pid"
  logfile=".mlx-cluster-$name.log"
  running="[ -f $pidfile ] && kill -0 \$(cat $pidfile) 2>/dev/null"
  case $action in
    start)
      # A login shell, so that the PATH is the one a person has; nohup and the closed stdin let the node stay.
      script="if $running; then echo '$name runs already'; else
        nohup $BIN node --config $CONFIG --id $name $ARGS </dev/null >>$logfile 2>&1 & echo \$! >$pidfile
        echo '$name started, log in $logfile'; fi"
      ;;
    stop)
      # SIGTERM only: a hard kill can leak wired memory on a Mac.
      script="if $running; then kill \$(cat $pidfile); rm -f $pidfile; echo '$name stopped'; else echo '$name does not run'; fi"
      ;;
    status)
      script="if $running; then echo '$name runs'; else echo '$name does not run'; tail -n 3 $logfile 2>/dev/null; fi"
      ;;
    *)
      echo "unknown action $action: start, stop or status" >&2
      exit 2
      ;;
  esac
  # Single quotes are understood by every remote shell; one inside the script is closed, escaped and opened again.
  quoted=$(printf '%s' "$script" | sed "s/'/'\\\\''/g")
  ssh -o BatchMode=yes -o ConnectTimeout=10 "$destination" "exec \${SHELL:-sh} -lc '$quoted'" ||
    echo "$name: ssh to $destination failed" >&2
done
