#!/usr/bin/env bash
# reshard.sh [--dry-run] MEMBER NEW_MASTER NEW_REPLICA [NEW_MASTER NEW_REPLICA]...
# Adds shards to a Redis Cluster and gives each its part of the slots, while checks go on. All are added before slots move once.
#
#   MEMBER       HOST:PORT of any node of the cluster
#   NEW_MASTER   HOST:PORT of an empty server in cluster mode
#   NEW_REPLICA  HOST:PORT of another one, its replica
#   --dry-run    say what would be done, change nothing
#
# Run it again after an interruption: it goes on where it was, and changes nothing where nothing is left to do. It refuses to
# begin on a cluster that is not well. REDISCLI_AUTH is the password; REDIS_CLI is the client with its options, "redis-cli --tls".
set -euo pipefail

say() { echo "reshard: $*"; }
fail() { echo "reshard: $*" >&2; exit 1; }
usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=''
if [ "${1:-}" = --dry-run ]; then dry=yes; shift; fi
[ $# -ge 3 ] && [ $(($# % 2)) -eq 1 ] || usage
for node in "$@"; do
  [[ $node =~ ^[^:]+:[0-9]{1,5}$ ]] || fail "'$node' is no HOST:PORT: write 10.0.0.7:6379"
done
member=$1
shift
# The pair of number N is masters[N] and replicas[N].
masters=() replicas=()
while [ $# -gt 0 ]; do
  for node in "$1" "$2"; do
    for known in "${masters[@]}" "${replicas[@]}"; do [ "$node" != "$known" ] || fail "$node is given twice"; done
  done
  [ "$1" != "$2" ] || fail "$2 is given twice: a replica on the same server saves nothing"
  masters+=("$1") replicas+=("$2")
  shift 2
done
# No here-string: a read-only file system has no place for it.
read -ra client < <(echo "${REDIS_CLI:-redis-cli}")
command -v "${client[0]}" > /dev/null || fail "${client[0]} is not there: install redis-tools"

at() { local node=$1; shift; "${client[@]}" -e -h "${node%:*}" -p "${node##*:}" "$@" < /dev/null | tr -d '\r'; }
cluster() { "${client[@]}" --no-auth-warning --cluster "$@" < /dev/null; }
told() { at "$1" cluster info | sed -n "s/^$2://p"; }
lines() { at "$1" cluster nodes; }
itself() { lines "$1" | grep myself; }
identity() { itself "$1" | cut -d' ' -f1; }
role() { itself "$1" | awk '{ print ($3 ~ /master/) ? "master" : "slave" }'; }
follows() { itself "$1" | cut -d' ' -f4; }
slots_of() { itself "$1" | awk '{ n = 0; for (i = 9; i <= NF; i++) if ($i !~ /^\[/) { split($i, r, "-"); n += (r[2] == "" ? 1 : r[2] - r[1] + 1) } print n }'; }
# The same seen by the cluster, without what a node says of itself.
is_member() { lines "$member" | grep -q "^$(identity "$1") "; }
members() { lines "$member" | awk '$3 !~ /fail|noaddr/ { split($2, a, "@"); print a[1] }'; }
# Who is not well in any member's eyes. One without address and slots is no member: another server has taken its place since.
ailing() {
  local node
  { lines "$member"; for node in $(members); do lines "$node" 2> /dev/null || echo "- $node fail"; done; } |
    awk -v as="$1" '$3 ~ as && !($3 ~ /noaddr/ && NF == 8) { sub(/@.*/, "", $2); print $2 }' | sort -u
}
open_slots() { local node; for node in $(members); do itself "$node" | grep -o '\[[^]]*\]' || true; done; }
within() { # SECONDS COMMAND...
  local left=$(($1 * 5))
  shift
  until "$@" > /dev/null 2>&1; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || return 1
    sleep 0.2
  done
}
wait_until() { # SECONDS WHAT COMMAND...
  local seconds=$1 what=$2
  shift 2
  within "$seconds" "$@" || fail "this did not come about in time: $what"
}
agree() { local node; for node in $(members); do lines "$node" | grep -q "^$1 " || return 1; done; }
all_well() { local node; for node in $(members); do [ "$(told "$node" cluster_state)" = ok ] || return 1; done; }
in_step() { at "$1" info replication | grep -q '^master_link_status:up'; }
# Nodes that are just met, or just suspected, are one or the other in a moment.
settled() { [ -z "$(ailing 'fail[?]|handshake')" ]; }

for node in "$member" "${masters[@]}" "${replicas[@]}"; do
  [ "$(at "$node" ping 2>&1)" = PONG ] || fail "$node does not answer PING: start it, and see that the password is in REDISCLI_AUTH"
  [ "$(at "$node" info cluster | sed -n 's/^cluster_enabled://p')" = 1 ] || fail "$node is not in cluster mode: set cluster-enabled yes"
done

# Is the cluster well? Slots that an interrupted run left open are no reason to refuse: going on is what closes them.
state=$(told "$member" cluster_state) assigned=$(told "$member" cluster_slots_assigned)
[ "$state" = ok ] || fail "the cluster is not well: cluster_state:$state at $member; mend it first, redis-cli --cluster check $member says how"
[ "$assigned" = 16384 ] || fail "the cluster is not well: $assigned of 16384 slots have a node; redis-cli --cluster fix $member"
within 15 settled || true
ill=$(ailing 'fail|handshake|noaddr')
[ -z "$ill" ] || fail "the cluster is not well: $(echo "$ill" | tr '\n' ' ')failed; start it again, or forget it (redis-cli --cluster del-node)"
for node in "${masters[@]}" "${replicas[@]}"; do
  if ! is_member "$node"; then
    # It may have been met just before an interruption, and the cluster hears of it in a moment.
    [ "$(told "$node" cluster_known_nodes)" = 1 ] || within 5 is_member "$node" ||
      fail "$node belongs to another cluster: give an empty server, or CLUSTER RESET it"
    [ "$(at "$node" dbsize)" = 0 ] || is_member "$node" || fail "$node holds $(at "$node" dbsize) keys: give an empty server, or FLUSHALL it"
  fi
done
for pair in "${!masters[@]}"; do
  master=${masters[pair]} replica=${replicas[pair]}
  if is_member "$master" && [ "$(role "$master")" = slave ]; then
    [ "$(follows "$master")" = "$(identity "$replica")" ] || fail "$master is a replica in this cluster already: give another server"
    # The replica was promoted since an earlier run.
    masters[pair]=$replica replicas[pair]=$master
  elif is_member "$replica" && [ "$(role "$replica")" = master ] && [ "$(slots_of "$replica")" -gt 0 ]; then
    fail "$replica is a master with $(slots_of "$replica") slots: give another server"
  elif is_member "$replica" && [ "$(role "$replica")" = slave ] && [ "$(follows "$replica")" != "$(identity "$master")" ]; then
    fail "$replica is another master's replica in this cluster already: give another server"
  fi
done

counting=$(lines "$member" | awk '$3 ~ /master/ && NF > 8' | wc -l)
shards=$counting
for master in "${masters[@]}"; do
  if ! is_member "$master" || [ "$(slots_of "$master")" = 0 ]; then shards=$((shards + 1)); fi
done
part=$((16384 / shards))
opened=$(open_slots)
todo=() moving=$opened
if [ -n "$opened" ]; then todo+=("finish the slots that are open: $(echo "$opened" | wc -l) entries"); fi
for pair in "${!masters[@]}"; do
  master=${masters[pair]} replica=${replicas[pair]}
  if ! is_member "$master"; then todo+=("add $master"); fi
  if ! is_member "$replica" || [ "$(role "$replica")" = master ]; then todo+=("make $replica the replica of $master"); fi
done
for master in "${masters[@]}"; do
  if ! is_member "$master"; then
    todo+=("move about $part of 16384 slots to $master") moving=yes
  elif [ "$(slots_of "$master")" -lt $((part * 98 / 100)) ]; then
    todo+=("move slots to $master until masters have equal parts of about $part (it has $(slots_of "$master"))") moving=yes
  fi
done
if [ ${#todo[@]} = 0 ]; then
  for pair in "${!masters[@]}"; do
    say "nothing to do: ${masters[pair]} counts $(slots_of "${masters[pair]}") slots, ${replicas[pair]} is its replica"
  done
  exit 0
fi
say "the cluster is well, $counting masters count. To do:"
for each in "${todo[@]}"; do say "- $each"; done
if [ -n "$dry" ]; then
  say "dry run: nothing was changed"
  exit 0
fi
trap 'say "interrupted: run me again with the same arguments to go on"; exit 130' INT TERM

add() { # NODE
  local node=$1 left=60 out
  if ! is_member "$node"; then
    say "adding $node"
    # Refused while a node that has come just before does not know yet who counts which slots.
    until out=$(cluster add-node "$node" "$member" 2>&1); do
      [[ $out == *"don't agree"* ]] && [ "$left" -gt 0 ] || fail "$node was not added: $(echo "$out" | grep ERR || echo "$out" | tail -n 3)"
      left=$((left - 1))
      sleep 0.5
    done
  fi
  wait_until 60 "every node knows $node" agree "$(identity "$node")"
}

if [ -n "$opened" ]; then
  say "finishing open slots"
  out=$(cluster fix "$member" 2>&1) || fail "open slots could not be finished: $(echo "$out" | tail -n 3)"
fi
for master in "${masters[@]}"; do add "$master"; done
for replica in "${replicas[@]}"; do add "$replica"; done
for pair in "${!masters[@]}"; do
  master=${masters[pair]} replica=${replicas[pair]}
  if [ "$(role "$replica")" = master ]; then
    say "making $replica the replica of $master"
    wait_until 60 "$replica follows $master" at "$replica" cluster replicate "$(identity "$master")"
  fi
done
for pair in "${!masters[@]}"; do
  wait_until 60 "${replicas[pair]} has what ${masters[pair]} has" in_step "${replicas[pair]}"
done
# A node that has just joined refuses keys until it has heard enough of the others.
wait_until 60 "every node says cluster_state:ok" all_well
wait_until 60 "the nodes agree" cluster check "$member"
if [ -n "$moving" ]; then
  say "moving slots until $shards masters have equal parts; checks go on meanwhile"
  out=$(cluster rebalance "$member" --cluster-use-empty-masters --cluster-threshold 1 2>&1) ||
    fail "moving slots stopped: $(echo "$out" | grep -v '^[#]*$' | tail -n 3); run me again to go on"
  wait_until 60 "every node says cluster_state:ok" all_well
  wait_until 60 "the nodes agree on who counts what" cluster check "$member"
fi
for pair in "${!masters[@]}"; do
  say "done: ${masters[pair]} counts $(slots_of "${masters[pair]}") slots, ${replicas[pair]} is its replica"
done
