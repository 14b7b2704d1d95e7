// The process that answers: its components, its stores, and the settings in use.

import { get } from "../api.js";
import { empty, fill, h, refill, table } from "../dom.js";
import { number, time } from "../format.js";

export default async function system(root, view) {
  const state = h("div", {});
  const settings = h("div", {});
  fill(root, state, settings);
  let shown = false;
  await view.live(2000, async (options) => {
    const found = await get("/system", {}, options);
    refill(state, facts(found), components(found), instances(found.instances ?? []), counters(found.counters), holds(found.holds), catalog(found.catalog));
    if (!shown) fill(settings, settingsList(found.settings));
    shown = true;
  });
}

function list(entries) {
  return h("dl.facts", {}, entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function facts(found) {
  const requests = found.requests ?? {};
  return list([
    ["version", found.version],
    ["started", time(found.started_at)],
    ["instance", found.instance ?? "single"],
    ["connections", number(requests.connections)],
    ["requests in flight", number(requests.in_flight)],
  ]);
}

function instances(items) {
  const newest = Math.max(...items.map((each) => each.catalog_version));
  const rows = items.map((each, place) => [
    place === 0 ? `${each.name} (this one)` : each.name,
    each.address,
    each.version,
    h(`span.badge.${each.catalog_version === newest ? "healthy" : "shadow"}`, {}, each.catalog_version === newest ? String(each.catalog_version) : `${each.catalog_version}, behind`),
    number(each.holds_open),
    number(each.holds_expired),
    time(each.started_at),
  ]);
  if (rows.length === 0) return null;
  return h("section", {}, h("h2", {}, "Instances"), table("Instances", ["instance", "address", "Tidegate", "catalog version", "#open holds", "#expired holds", "started"], rows));
}

function components(found) {
  const entries = Object.entries(found.health?.components ?? {});
  const rows = entries.map(([name, each]) => [
    name,
    h(`span.badge.${each.status}`, {}, each.status),
    each.latency_ms ? `${each.latency_ms.toFixed(1)} ms` : "",
    each.reason ?? "",
  ]);
  return h("section", {}, h("h2", {}, "Components"), rows.length ? table("Components", ["component", "status", "#probe", "reason"], rows) : empty("No components are reported."));
}

function counters(found) {
  if (!found) return null;
  const title = h("h2", {}, "Counters");
  if (found.kind === "memory") {
    const note = h("p.muted", {}, "In the memory of this process: for several instances, set [counters] url to Redis.");
    return h("section", {}, title, list([["counters", number(found.subjects)], ["evicted", number(found.evicted)]]), note);
  }
  const shards = Object.entries(found.shards ?? {}).map(([shard, breaker]) => [shard, h(`span.badge.${breaker === "closed" ? "healthy" : "unhealthy"}`, {}, breaker)]);
  const without = Object.entries(found.without_store ?? {}).map(([reason, count]) => [reason, number(count)]);
  return h(
    "section",
    {},
    title,
    list([
      ["instances alive", number(found.instances)],
      ["connections up", `${number(found.connections_up)} of ${number(found.connections)}`],
      ["breakers open", number(found.breakers_open)],
      ["waiting to be put back", number(found.owed)],
      ["put back", number(found.put_back)],
    ]),
    found.leases
      ? [
          h("h3", {}, "Leases: units charged in advance, from which this process decides alone"),
          list([
            ["leases", number(found.leases.leases)],
            ["decisions from leases", number(found.leases.decisions_from_leases)],
            ["units leased", number(found.leases.leased)],
            ["units returned", number(found.leases.returned)],
            ["units lost", number(found.leases.lost)],
          ]),
        ]
      : null,
    shards.length ? table("Shards", ["shard", "circuit breaker"], shards) : null,
    without.length ? [h("h3", {}, "Decided without the store, since the start"), table("Decided without the store", ["reason", "#checks"], without)] : null,
  );
}

function holds(found) {
  if (!found) return null;
  return h(
    "section",
    {},
    h("h2", {}, "Holds"),
    list([
      ["open, of all instances", number(found.open)],
      ["expired unsettled, of all instances", number(found.expired_unsettled)],
      ["opened here", number(found.opened)],
      ["denied", number(found.denied)],
      ["settled in time", number(found.settled)],
      ["settled late", number(found.late)],
      ["opened without the store", number(found.degraded)],
    ]),
  );
}

function catalog(found) {
  if (!found) return null;
  const replicas = found.replicas.map((each) => [each.name, `${each.lag_s.toFixed(1)} s`, each.removed_because ?? "in rotation"]);
  return h(
    "section",
    {},
    h("h2", {}, "Catalog"),
    list([
      ["database", `${found.kind}: ${found.database}`],
      ["version", String(found.version)],
      ["keys in memory", number(found.cached_keys)],
      ["look-ups from memory", number(found.hits)],
      ["look-ups loaded", number(found.misses)],
      ["answered with stale entries", number(found.stale)],
    ]),
    replicas.length ? table("Replicas", ["replica", "#lag", "state"], replicas) : null,
  );
}

function settingsList(sections) {
  if (!sections) return null;
  const rows = Object.entries(sections).flatMap(([section, values]) =>
    Object.entries(values).map(([name, value]) => [`${section}.${name}`, value === "" || value === null ? "–" : Array.isArray(value) ? value.join(", ") || "–" : String(value)]),
  );
  return h("details", {}, h("summary", {}, "Settings in use (secrets are hidden)"), table("Settings", ["setting", "value"], rows));
}
