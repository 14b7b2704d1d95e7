// How much is allowed and blocked, by which rules, and whether every component is healthy.

import { get } from "../api.js";
import { byTime, chart, finished } from "../charts.js";
import { empty, fill, h, href, link, refill, select, table } from "../dom.js";
import { RANGES, duration, number, share, short, span, subject } from "../format.js";
import { traffic } from "../traffic.js";

export default async function overview(root, view) {
  const range = RANGES[view.parameters.range] ? view.parameters.range : "1h";
  const choice = select(
    Object.entries(RANGES).map(([name, { text }]) => [name, text]),
    range,
    { id: "range", onchange: () => view.set({ range: choice.value }) },
  );
  const health = h("div", {});
  const numbers = h("div", {});
  const lists = h("div.columns", {});
  fill(root, h("div.toolbar", {}, h("label", { for: "range" }, "Range"), choice), health, numbers, lists);
  await view.live(2000, async (options) => refill(health, verdict(await get("/system", {}, options))));
  await view.live(range === "15m" || range === "1h" ? 10_000 : 60_000, async (options) => {
    const { from, to } = span(range);
    const [history, rules, subjects] = await Promise.all([
      traffic({ from, to, step: RANGES[range].step }, options),
      get("/violations/top", { by: "rule", since: from, until: to, limit: 10 }, options),
      get("/violations/top", { by: "subject", since: from, until: to, limit: 10 }, options),
    ]);
    fill(numbers, totals(history, range));
    refill(lists, topRules(history, rules.items, range), topSubjects(subjects.items, range));
  });
}

function verdict(system) {
  const components = Object.entries(system.health?.components ?? {});
  const bad = components.filter(([, each]) => each.status !== "healthy");
  const counters = system.counters ?? {};
  const notes = [];
  if (counters.breakers_open) notes.push(`${counters.breakers_open} circuit breakers open: checks are decided without these shards`);
  if (counters.owed) notes.push(`${number(counters.owed)} counters wait to be put back into the store`);
  if (bad.length === 0 && notes.length === 0) {
    return h("p.verdict.good", {}, `All ${components.length} components are healthy. `, link("/system", {}, "System"));
  }
  return h(
    "div.verdict.bad",
    { role: "status" },
    h("ul", {}, bad.map(([name, each]) => h("li", {}, `${name}: ${each.reason ?? each.status}`)), notes.map((note) => h("li", {}, note))),
    link("/system", {}, "System"),
  );
}

function totals(history, range) {
  if (history === null) {
    return empty("This server records no traffic history.", "What was blocked is listed below; allowed requests are in the metrics.");
  }
  const sums = byTime(history.items);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const [allowed, blocked, over] = [sum(sums.allowed), sum(sums.blocked), sum(sums.over)];
  if (allowed + blocked === 0) {
    return empty(
      `No requests in the last ${RANGES[range].text}.`,
      "Send one: tidegate check KEY GET /path, or POST /v1/check. It appears here within a minute.",
    );
  }
  const tiles = h(
    "dl.tiles",
    {},
    tile("Allowed", short(allowed)),
    tile("Blocked", short(blocked), share(blocked, allowed + blocked)),
    over ? tile("Of the allowed, over a soft limit", short(over)) : null,
    history.latency.length ? tile("Latency p99", `${finished(history.latency, history.step_s).at(-1).p99_ms.toFixed(1)} ms`) : null,
  );
  const drawn = byTime(finished(history.items, history.step_s));
  const lines = { allowed: drawn.allowed, blocked: drawn.blocked, ...(over ? { over: drawn.over } : {}) };
  const summary = `${number(allowed)} allowed, ${number(blocked)} blocked`;
  const charts = [chart(`Requests per ${stepName(history.step_s)}`, summary, drawn.times, lines)];
  const latency = finished(history.latency, history.step_s);
  if (latency.length > 1) {
    const times = latency.map((each) => Date.parse(each.at) / 1000);
    const line = (name) => latency.map((each) => each[`${name}_ms`]);
    charts.push(chart("Time to decide, ms", `p99 ${latency.at(-1).p99_ms} ms at the end`, times, { p50: line("p50"), p90: line("p90"), p99: line("p99") }));
  }
  return [tiles, h("div.columns", {}, charts)];
}

function tile(name, value, note = null) {
  return h("div.tile", {}, h("dt", {}, name), h("dd", {}, value, note === null ? null : h("small", {}, ` ${note}`)));
}

function stepName(seconds) {
  return { 60: "minute", 3600: "hour", 86400: "day" }[seconds] ?? duration(seconds);
}

function topRules(history, blocked, range) {
  const rules = new Map();
  for (const item of history?.items ?? []) {
    const key = JSON.stringify([item.tier, item.rule]);
    const sum = rules.get(key) ?? { tier: item.tier, rule: item.rule, allowed: 0, blocked: 0 };
    sum.allowed += item.allowed;
    sum.blocked += item.blocked;
    rules.set(key, sum);
  }
  const sums = rules.size ? [...rules.values()] : blocked.map((each) => ({ ...each, allowed: null }));
  sums.sort((one, other) => other.blocked - one.blocked || (other.allowed ?? 0) - (one.allowed ?? 0));
  const rows = sums.slice(0, 10).map((each) => [
    each.tier === null ? "(other rules)" : link("/policy", { tier: each.tier, rule: each.rule }, each.rule || "(no rule)"),
    each.tier ?? "",
    number(each.allowed),
    number(each.blocked),
    each.allowed === null ? "–" : share(each.blocked, each.allowed + each.blocked),
  ]);
  const content = rows.length
    ? table("Top rules", ["rule", "tier", "#allowed", "#blocked", "#share"], rows)
    : empty("No rule answered a request.", "Rules are made in ", link("/policy", {}, "Policy"), ".");
  return h("section", {}, h("h2", {}, "Top rules"), content, h("p", {}, link("/violations", { by: "rule", range }, "All that was blocked")));
}

function topSubjects(items, range) {
  const rows = items.map((each) => {
    const who = subject(each.subject);
    return [who.path === null ? who.text : h("a", { href: href(who.path, who.query), "data-view": true }, who.text), who.kind, number(each.blocked)];
  });
  const content = rows.length ? table("Blocked most", ["caller", "kind", "#blocked"], rows) : empty(`Nobody was blocked in the last ${RANGES[range].text}.`);
  return h("section", {}, h("h2", {}, "Blocked most"), content);
}
