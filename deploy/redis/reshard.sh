#!/usr/bin/env bash
# reshard.sh [--dry-run] MEMBER NEW_MASTER NEW_REPLICA: adds a shard to a Redis Cluster and gives it its part of the slots, while checks go on.
#
#   MEMBER       HOST:PORT of any node of the cluster
#   NEW_MASTER   HOST:PORT of an empty server in cluster mode
#   NEW_REPLICA  HOST:PORT of another one
#   --dry-run    say what would be done, change nothing
#
# Run it again after an interruption: it goes on where it was, and changes nothing where nothing is left to do. It refuses to
# begin on a cluster that is not well. REDISCLI_AUTH is the password; REDIS_CLI is the client with its options, "redis-cli --tls".
set -euo pipefail

say() { echo "reshard: $*"; }
fail() { echo "reshard: $*" >&2; exit 1; }
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=''
if [ "${1:-}" = --dry-run ]; then dry=yes; shift; fi
[ $# -eq 3 ] || usage
member=$1 master=$2 replica=$3
for node in "$@"; do
  [[ $node =~ ^[^:]+:[0-9]{1,5}$ ]] || fail "'$node' is no HOST:PORT: write 10.0.0.7:6379"
done
if [ "$master" = "$replica" ] || [ "$member" = "$replica" ]; then fail "$replica is given twice: a replica on the same server saves nothing"; fi
read -ra client <<< "${REDIS_CLI:-redis-cli}"
command -v "${client[0]}" > /dev/null || fail "${client[0]} is not there: install redis-tools"

at() { local node=$1; shift; "${client[@]}" -e -h "${node%:*}" -p "${node##*:}" "$@" < /dev/null | tr -d '\r'; }
cluster() { "${client[@]}" --no-auth-warning --cluster "$@" < /dev/null; }
told() { at "$1" cluster info | sed -n "s/^$2://p"; }
lines() { at "$1" cluster nodes; }
itself() { lines "$1" | grep myself; }
identity() { itself "$1" | cut -d' ' -f1; }
role() { itself "$1" | awk '{ print ($3 ~ /master/) ? "master" : "slave" }'; }
slots_of() { itself "$1" | awk '{ n = 0; for (i = 9; i <= NF; i++) if ($i !~ /^\[/) { split($i, r, "-"); n += (r[2] == "" ? 1 : r[2] - r[1] + 1) } print n }'; }
# The same seen by the cluster, without what a node says of itself.
is_member() { lines "$member" | grep -q "^$(identity "$1") "; }
members() { lines "$member" | awk '{ split($2, a, "@"); print a[1] }'; }
open_slots() { local node; for node in $(members); do itself "$node" | grep -o '\[[^]]*\]' || true; done; }
wait_until() { # SECONDS WHAT COMMAND...
  local left=$(($1 * 5)) what=$2
  shift 2
  until "$@" > /dev/null 2>&1; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail "this did not come about in time: $what"
    sleep 0.2
  done
}
agree() { local node; for node in $(members); do lines "$node" | grep -q "^$1 " || return 1; done; }
all_well() { local node; for node in $(members); do [ "$(told "$node" cluster_state)" = ok ] || return 1; done; }
in_step() { at "$1" info replication | grep -q '^master_link_status:up'; }

for node in "$member" "$master" "$replica"; do
  [ "$(at "$node" ping 2>&1)" = PONG ] || fail "$node does not answer PING: start it, and see that the password is in REDISCLI_AUTH"
  [ "$(at "$node" info cluster | sed -n 's/^cluster_enabled://p')" = 1 ] || fail "$node is not in cluster mode: set cluster-enabled yes"
done

# Is the cluster well? Slots that an interrupted run left open are no reason to refuse: going on is what closes them.
state=$(told "$member" cluster_state) assigned=$(told "$member" cluster_slots_assigned)
[ "$state" = ok ] || fail "the cluster is not well: cluster_state:$state at $member; mend it first, redis-cli --cluster check $member says how"
[ "$assigned" = 16384 ] || fail "the cluster is not well: $assigned of 16384 slots have a node; redis-cli --cluster fix $member"
ailing=$(lines "$member" | awk '$3 ~ /fail|handshake|noaddr/ { print $2 }')
[ -z "$ailing" ] || fail "the cluster is not well: $(echo "$ailing" | tr '\n' ' ')failed; start it again, or forget it (redis-cli --cluster del-node)"
for node in "$master" "$replica"; do
  if ! is_member "$node"; then
    [ "$(told "$node" cluster_known_nodes)" = 1 ] || fail "$node belongs to another cluster: give an empty server, or CLUSTER RESET it"
    [ "$(at "$node" dbsize)" = 0 ] || fail "$node holds $(at "$node" dbsize) keys: give an empty server, or FLUSHALL it"
  fi
done
if is_member "$master" && [ "$(role "$master")" = slave ]; then fail "$master is a replica in this cluster already: give another server"; fi
if is_member "$replica" && [ "$(role "$replica")" = master ] && [ "$(slots_of "$replica")" -gt 0 ]; then
  fail "$replica is a master with $(slots_of "$replica") slots: give another server"
fi

masters=$(lines "$member" | awk '$3 ~ /master/ && NF > 8' | wc -l)
opened=$(open_slots)
todo=''
if [ -n "$opened" ]; then todo+="finish the slots that are open: $(echo "$opened" | wc -l) entries;"; fi
if ! is_member "$master"; then todo+=" add $master;"; fi
if ! is_member "$replica" || [ "$(role "$replica")" = master ]; then todo+=" make $replica its replica;"; fi
if ! is_member "$master"; then
  todo+=" move about $((16384 / (masters + 1))) of 16384 slots to it;"
elif [ "$(slots_of "$master")" -lt $((16384 / masters * 98 / 100)) ] || [ "$(slots_of "$master")" = 0 ]; then
  todo+=" move slots to it until masters have equal parts (it has $(slots_of "$master"));"
fi
if [ -z "$todo" ]; then
  say "nothing to do: $master counts $(slots_of "$master") slots, $replica is a replica"
  exit 0
fi
say "the cluster is well, $masters masters count. To do: ${todo# }"
if [ -n "$dry" ]; then
  say "dry run: nothing was changed"
  exit 0
fi
trap 'say "interrupted: run me again with the same arguments to go on"; exit 130' INT TERM

if [ -n "$opened" ]; then
  say "finishing open slots"
  out=$(cluster fix "$member" 2>&1) || fail "open slots could not be finished: $(echo "$out" | tail -n 3)"
fi
if ! is_member "$master"; then
  out=$(cluster add-node "$master" "$member" 2>&1) || fail "$master was not added: $(echo "$out" | tail -n 3)"
fi
id=$(identity "$master")
wait_until 60 "every node knows $master" agree "$id"
if ! is_member "$replica"; then
  out=$(cluster add-node "$replica" "$member" 2>&1) || fail "$replica was not added: $(echo "$out" | tail -n 3)"
fi
wait_until 60 "every node knows $replica" agree "$(identity "$replica")"
if [ "$(role "$replica")" = master ]; then
  wait_until 60 "$replica follows $master" at "$replica" cluster replicate "$id"
fi
wait_until 60 "$replica has what $master has" in_step "$replica"
# A node that has just joined refuses keys until it has heard enough of the others.
wait_until 60 "every node says cluster_state:ok" all_well
wait_until 60 "the nodes agree" cluster check "$member"
say "moving slots; checks go on meanwhile"
out=$(cluster rebalance "$member" --cluster-use-empty-masters --cluster-threshold 1 2>&1) ||
  fail "moving slots stopped: $(echo "$out" | grep -v '^[#]*$' | tail -n 3); run me again to go on"
wait_until 60 "every node says cluster_state:ok" all_well
wait_until 60 "the nodes agree on who counts what" cluster check "$member"
say "done: $master counts $(slots_of "$master") slots, $replica is its replica"
