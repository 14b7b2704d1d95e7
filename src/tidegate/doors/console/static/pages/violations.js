// Who was blocked most, by rule and by tier, and when.

import { get } from "../api.js";
import { byTime, chart } from "../charts.js";
import { empty, field, fill, h, link, select, table } from "../dom.js";
import { RANGES, number, span, subject, time } from "../format.js";

export default async function violations(root, view) {
  const range = RANGES[view.parameters.range] ? view.parameters.range : "24h";
  const by = ["subject", "customer", "rule", "tier"].includes(view.parameters.by) ? view.parameters.by : "subject";
  const { tier, rule } = view.parameters;
  const mode = view.parameters.mode === "shadow" ? "shadow" : "enforce";
  const choose = (label, name, options, chosen) => {
    const control = select(options, chosen, { onchange: () => view.set({ [name]: control.value }) });
    return field(label, control);
  };
  const named = { tier: h("input", { value: tier ?? "", spellcheck: "false" }), rule: h("input", { value: rule ?? "", spellcheck: "false" }) };
  const filters = h(
    "form.inline",
    { onsubmit: (event) => { event.preventDefault(); view.set({ tier: named.tier.value.trim(), rule: named.rule.value.trim() }); } },
    choose("Range", "range", Object.entries(RANGES).map(([name, { text }]) => [name, text]), range),
    choose("Show", "mode", [["enforce", "what was blocked"], ["shadow", "what shadow rules would have blocked"]], mode),
    choose("Group by", "by", [["subject", "caller"], ["customer", "customer"], ["rule", "rule"], ["tier", "tier"]], by),
    field("Tier", named.tier),
    field("Rule", named.rule),
    h("button", { type: "submit" }, "Filter"),
  );
  const content = h("div", {});
  fill(root, filters, content);
  await view.live(10_000, async (options) => {
    const { from, to } = span(range);
    const selected = { since: from, until: to, tier, rule, ...(mode === "shadow" ? { mode } : {}) };
    const [top, minutes] = await Promise.all([
      get("/violations/top", { ...selected, by, limit: 100 }, options),
      get("/violations", { ...selected, limit: 500 }, options),
    ]);
    fill(content, top.items.length ? [timeline(minutes, mode), ranking(top.items, by, range, mode), latest(minutes.items)] : nothing(range, mode));
  });
}

function nothing(range, mode) {
  if (mode === "shadow") {
    return empty(
      `No shadow rule would have blocked anything in the last ${RANGES[range].text}.`,
      "A rule in mode shadow counts and never blocks: make one in ",
      link("/policy", {}, "Policy"),
      " to see here whom it would block. The first ones appear some seconds after the requests.",
    );
  }
  return empty(
    `Nothing was blocked in the last ${RANGES[range].text}.`,
    "If you expected something: ",
    link("/policy", {}, "ask which rule answers the request"),
    ", and check that its mode is enforce. Blocked checks appear here some seconds later.",
  );
}

function timeline(minutes, mode) {
  const sums = byTime(minutes.items.map((each) => ({ at: each.minute, blocked: each.blocked })));
  const total = sums.blocked.reduce((sum, value) => sum + value, 0);
  const what = mode === "shadow" ? "Would have been blocked per minute" : "Blocked per minute";
  const title = minutes.next === null ? what : `${what}, the latest 500 entries`;
  return sums.times.length > 1 ? chart(title, `${number(total)} blocked`, sums.times, { blocked: sums.blocked }) : null;
}

function ranking(items, by, range, mode) {
  const rows = items.map((each) => {
    if (by === "customer") return [each.customer ? link("/customers", { name: each.customer }, each.customer) : "(none)", number(each.blocked)];
    if (by === "rule") return [link("/violations", { by: "subject", range, mode, tier: each.tier, rule: each.rule }, each.rule || "(tier)"), each.tier, number(each.blocked)];
    if (by === "tier") return [link("/violations", { by: "subject", range, mode, tier: each.tier }, each.tier), number(each.blocked)];
    const who = subject(each.subject);
    return [who.path === null ? who.text : link(who.path, who.query, who.text), who.kind, number(each.blocked)];
  });
  const title = mode === "shadow" ? "Would have been blocked most" : "Blocked most";
  const columns = { customer: ["customer", "#blocked"], subject: ["caller", "kind", "#blocked"], rule: ["rule", "tier", "#blocked"], tier: ["tier", "#blocked"] }[by];
  return h("section", {}, h("h2", {}, title), table(title, columns, rows));
}

function latest(items) {
  const rows = items.slice(0, 50).map((each) => {
    const who = subject(each.subject);
    return [time(each.minute), who.path === null ? who.text : link(who.path, who.query, who.text), each.tier, each.rule || "(tier)", number(each.blocked)];
  });
  return h("section", {}, h("h2", {}, "Latest"), table("Latest minutes", ["minute", "caller", "tier", "rule", "#blocked"], rows));
}
