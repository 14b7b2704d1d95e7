// Customers: their quotas, keys and limits of their own.

import { all, get, send } from "../api.js";
import { block, blocks } from "../blocks.js";
import { chart } from "../charts.js";
import { confirm, form, saveChange } from "../dialogs.js";
import { announce, empty, field, fill, h, link, refill, select, table } from "../dom.js";
import { number, time } from "../format.js";
import { override, overrides } from "../overrides.js";
import { createKey, keyTable, pages, reset, usageTable } from "./callers.js";

const FIELDS = [
  ["external_id", "Id in other systems", "Such as that of the billing system"],
  ["anchor", "Quota periods begin on the day of", "Such as 2026-01-31: on the 31st, or the last day of a shorter month; empty: the 1st"],
  ["timezone", "Time zone of quota periods", "IANA name such as Europe/Berlin; empty: UTC"],
];

export default async function customers(root, view) {
  const { name, q = "" } = view.parameters;
  const search = h("input", { type: "search", id: "search", value: name ?? q, placeholder: "beginning of the name", spellcheck: "false" });
  function submit(event) {
    event.preventDefault();
    view.set({ q: search.value.trim(), name: null, after: null }, { replace: false });
  }
  const bar = h(
    "form.toolbar",
    { onsubmit: submit, role: "search" },
    h("label", { for: "search" }, "Find a customer"),
    search,
    h("button", { type: "submit" }, "Find"),
    view.operator ? h("button.primary", { type: "button", onclick: () => edit(view, null) }, "New customer") : null,
  );
  const content = h("div", {});
  fill(root, bar, content);
  if (name) await showCustomer(content, view, name);
  else await showList(content, view, q);
}

async function showList(root, view, q) {
  const { tier, after } = view.parameters;
  await view.live(5000, async (options) => {
    const page = await get("/customers", { limit: 50, after, tier, name_prefix: q }, options);
    const rows = page.items.map((each) => [
      link("/customers", { name: each.name }, each.name),
      each.external_id ?? "",
      each.tier ?? "",
      each.limits !== null || each.overrides.length ? "yes" : "",
      time(each.created_at),
    ]);
    const nothing = q || tier
      ? empty("No customer matches.", "Search by the beginning of its name.")
      : empty("There are no customers yet.", "Quotas count all API keys of a customer together. ", view.operator ? "Make one with New customer, or in the policy file." : "An operator makes one with New customer.");
    refill(root, rows.length ? table("Customers", ["name", "id in other systems", "tier", "overrides", "created"], rows) : nothing, pages(view, after, page.next));
  });
}

async function showCustomer(root, view, name) {
  const path = `/customers/${encodeURIComponent(name)}`;
  const record = await get(path, {}, { signal: view.signal });
  const isOwn = view.operator && !record.managed_by_file;
  const usage = h("div", {});
  const keys = h("div", {});
  const past = h("section", {});
  const stopped = h("section", {});
  fill(
    root,
    h("h2", {}, record.name),
    facts(record),
    view.operator ? actions(view, record, path) : null,
    overrides(view, record, path, isOwn),
    h("section", {}, h("h2", {}, "Quotas and counters now"), usage),
    h("section", {}, h("h2", {}, "API keys"), keys),
    past,
    stopped,
    h("p", {}, link("/audit", { kind: "customer", target: name }, "Changes of this customer")),
  );
  await view.live(5000, async (options) => {
    const page = await get("/api-keys", { limit: 50, customer: name, after: view.parameters.after }, options);
    const none = empty("It has no API keys.", "Without one, the attributes in its fields say which requests are its own.");
    refill(keys, page.items.length ? keyTable(view, page.items, true) : none, pages(view, view.parameters.after, page.next));
  });
  await view.live(2000, async (options) => {
    try {
      refill(usage, usageTable(await get("/usage", { customer: name }, options)));
    } catch (error) {
      if (error.status !== 400 && error.status !== 404) throw error;
      refill(usage, empty("Nothing is counted for this customer.", error.message));
    }
  });
  await view.live(60_000, async ({ signal }) => fill(past, await month(name, signal)));
  await blocks(view, stopped, { kind: "customer", target: name });
}

function facts(record) {
  const matched = Object.entries(record.match).map(([attribute, values]) => `${attribute} = ${values.join(" or ")}`);
  const entries = [
    ["tier", record.tier === null ? "none: that of each key" : link("/policy", { tier: record.tier }, record.tier)],
    record.external_id ? ["id in other systems", record.external_id] : null,
    ["quota periods begin", `${record.anchor ? `on day ${Number(record.anchor.slice(8))}` : "on the 1st"}, ${record.timezone ?? "UTC"}`],
    matched.length ? ["requests with", matched.join(", ")] : null,
    Object.keys(record.metadata).length ? ["metadata", h("code", {}, JSON.stringify(record.metadata))] : null,
    ["created", time(record.created_at)],
  ];
  return h("dl.facts", {}, entries.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function actions(view, record, path) {
  const button = (text, action, properties = {}) => h("button", { type: "button", onclick: action, ...properties }, text);
  const whom = { customer: record.name };
  return h(
    "div.buttons",
    {},
    record.managed_by_file ? null : button("Override limits", () => override(view, record, { path, name: record.name, kind: "customer", quotas: true })),
    button("New key", () => createKey(view, record.name)),
    button("Reset counters", () => reset(view, whom, `the customer ${record.name}`)),
    button("Block", () => block(view, whom, `the customer ${record.name}`)),
    record.managed_by_file ? null : button("Change", () => edit(view, record)),
    record.managed_by_file ? null : button("Delete", () => remove(view, record, path), { class: "danger" }),
    record.managed_by_file ? h("p.muted", {}, "The policy file owns this customer: change it there.") : null,
  );
}

async function edit(view, record) {
  const { items: tiers } = await all("/tiers", {}, { signal: view.signal });
  const name = h("input", { required: true, maxlength: "64", spellcheck: "false" });
  const tier = select([["", "none: that of each key"], ...tiers.map((each) => [each.name, each.name])], record?.tier ?? tiers[0]?.name ?? "");
  const inputs = Object.fromEntries(FIELDS.map(([key]) => [key, h("input", { value: record?.[key] ?? "", spellcheck: "false" })]));
  const content = [
    record === null ? field("Name", name, "Letters, digits, '_', '.' and '-'; it never changes") : null,
    field("Tier", tier),
    ...FIELDS.map(([key, label, hint]) => field(label, inputs[key], hint)),
  ];
  const save = async () => {
    const values = Object.fromEntries(FIELDS.map(([key]) => [key, inputs[key].value.trim() || null]));
    const body = { ...values, tier: tier.value || null };
    if (record === null) return (await send("POST", "/customers", { body: { ...body, name: name.value.trim() } })).data;
    const path = `/customers/${encodeURIComponent(record.name)}`;
    return saveChange({ method: "PATCH", path, read: path, before: record, body });
  };
  const saved = await form(record === null ? "New customer" : `Change ${record.name}`, content, { action: record === null ? "Create" : "Save", save });
  if (saved === null) return;
  announce("Saved.");
  view.go(`/customers?name=${encodeURIComponent(saved.name)}`, { replace: record !== null });
}

async function remove(view, record, path) {
  if (!(await confirm(`Delete ${record.name}?`, "Its overrides go with it. A customer with active API keys is refused.", "Delete"))) return;
  try {
    await send("DELETE", path, { revision: record.revision });
  } catch (error) {
    announce(error.message);
    return;
  }
  view.go("/customers");
}

/** What the ledger has of this month. */
async function month(name, signal) {
  const lines = (await get("/usage/export", { customer: name, format: "jsonl" }, { signal })).split("\n").filter(Boolean).map((line) => JSON.parse(line));
  const days = new Map();
  const rules = new Map();
  for (const line of lines) {
    for (const [sums, key] of [[days, line.day], [rules, line.rule]]) {
      const sum = sums.get(key) ?? { admitted: 0, blocked: 0, over: 0 };
      for (const field of ["admitted", "blocked", "over"]) sum[field] += line[field];
      sums.set(key, sum);
    }
  }
  const title = h("h2", {}, "This month (UTC)");
  if (days.size === 0) return [title, empty("No units were recorded this month.")];
  const dates = [...days.keys()].sort();
  const total = (field) => [...days.values()].reduce((sum, day) => sum + day[field], 0);
  const line = (field) => dates.map((day) => days.get(day)[field]);
  const lines_ = { allowed: line("admitted"), blocked: line("blocked"), ...(total("over") ? { over: line("over") } : {}) };
  const summary = `${number(total("admitted"))} allowed, ${number(total("over"))} of them over, ${number(total("blocked"))} blocked`;
  const rows = [...rules].sort(([, one], [, other]) => other.admitted - one.admitted).map(([rule, sum]) => [rule || "(no rule)", number(sum.admitted), number(sum.over), number(sum.blocked)]);
  return [
    title,
    h("p", {}, summary, "."),
    dates.length > 1 ? chart("Units per day", summary, dates.map((day) => Date.parse(day) / 1000), lines_) : null,
    table("Units by rule", ["rule", "#allowed", "#over", "#blocked"], rows),
  ];
}
