// Find a caller, see what is left to it in all its rules now, and help it: override, reset, revoke, rotate.

import { all, get, send } from "../api.js";
import { block, blocks } from "../blocks.js";
import { byTime, chart } from "../charts.js";
import { confirm, form, secret } from "../dialogs.js";
import { announce, empty, field, fill, h, link, refill, select, table } from "../dom.js";
import { callerOf, counters, explainer } from "../explain.js";
import { number, span, time } from "../format.js";
import { override, overrides } from "../overrides.js";
import { traffic } from "../traffic.js";

export default async function callers(root, view) {
  const { q = "", key, subject, ip } = view.parameters;
  const search = h("input", { type: "search", id: "search", value: key ?? subject ?? ip ?? q, placeholder: "name, key id, address or user=42", spellcheck: "false" });
  function submit(event) {
    event.preventDefault();
    const text = search.value.trim();
    const found = callerOf(text);
    const query = { q: null, key: null, ip: null, subject: null, path: null };
    if (found.attributes) query.subject = text;
    else if (found.ip) query.ip = text;
    else query.q = text;
    view.set(query, { replace: false });
  }
  const bar = h(
    "form.toolbar",
    { onsubmit: submit, role: "search" },
    h("label", { for: "search" }, "Find a caller"),
    search,
    h("button", { type: "submit" }, "Find"),
    view.operator ? h("button.primary", { type: "button", onclick: () => createKey(view) }, "New key") : null,
  );
  const content = h("div", {});
  fill(root, bar, content);
  if (key) await showKey(content, view, key);
  else if (subject || ip) await showSubject(content, view, subject ? { subject } : { ip });
  else await showList(content, view, q);
}

async function showList(root, view, q) {
  const { tier, status, after } = view.parameters;
  const filter = /^[0-9a-f]{6,24}$/.test(q) ? { id_prefix: q } : { name: q };
  const choose = (label, name, chosen) => {
    const control = h("select", { onchange: () => view.set({ [name]: control.value, after: null }) });
    const options = (values) => fill(control, [["", "any"], ...values.map((value) => [value, value])].map(([value, text]) => h("option", { value, selected: value === (chosen ?? "") }, text)));
    return [field(label, control), options];
  };
  const [tierField, setTiers] = choose("Tier", "tier", tier);
  const [statusField, setStatuses] = choose("Status", "status", status);
  setTiers(tier ? [tier] : []);
  setStatuses(["active", "expired", "revoked"]);
  const list = h("div", {});
  const stopped = h("div", {});
  fill(root, h("div.inline", {}, tierField, statusField), list, stopped);
  await view.live(5000, async (options) => {
    const page = await get("/api-keys", { limit: 50, after, tier, status, ...filter }, options);
    refill(list, keyTable(view, page.items, q || tier || status), pages(view, after, page.next));
  });
  await view.live(10_000, async (options) => setTiers((await get("/tiers", { limit: 500 }, options)).items.map((each) => each.name)));
  await blocks(view, stopped);
}

/** API keys, or what to do where there are none. */
export function keyTable(view, items, isFiltered) {
  if (items.length === 0) {
    return isFiltered
      ? empty("No key matches.", "Search by a part of its name, the beginning of its id, an address, or an attribute such as user=42.")
      : empty("There are no API keys yet.", view.operator ? "Make one with New key." : "An operator makes one with New key.", " Callers without a key are found by their address.");
  }
  const rows = items.map((each) => [
    link("/callers", { key: each.id }, each.name || "(no name)"),
    h("code", {}, each.id),
    each.tier,
    each.customer ? link("/customers", { name: each.customer }, each.customer) : "",
    h(`span.badge.${each.status}`, {}, each.status),
    each.limits !== null || each.overrides.length ? "yes" : "",
    time(each.created_at),
  ]);
  return table("API keys", ["name", "id", "tier", "customer", "status", "overrides", "created"], rows);
}

/** Buttons to the other pages of a list. */
export function pages(view, after, next) {
  return h(
    "div.buttons",
    {},
    after ? h("button", { type: "button", onclick: () => view.set({ after: null }) }, "First page") : null,
    next ? h("button", { type: "button", onclick: () => view.set({ after: next }, { replace: false }) }, "Next page") : null,
  );
}

async function showKey(root, view, id) {
  const { data: record } = await send("GET", `/api-keys/${encodeURIComponent(id)}`, { signal: view.signal });
  const usage = h("div", {});
  const past = h("div", {});
  const facts = [
    ["id", h("code", {}, record.id)],
    ["tier", link("/policy", { tier: record.tier }, record.tier)],
    ["status", h("span", {}, h(`span.badge.${record.status}`, {}, record.status), record.revoked_reason ? ` ${record.revoked_reason}` : "")],
    ["created", time(record.created_at)],
    record.customer ? ["customer", link("/customers", { name: record.customer }, record.customer)] : null,
    ["expires", record.expires_at === null ? "never" : time(record.expires_at)],
  ];
  fill(
    root,
    h("h2", {}, record.name || "(no name)"),
    h("dl.facts", {}, facts.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    view.operator ? actions(view, record) : null,
    overrides(view, record, `/api-keys/${record.id}`, view.operator && record.status !== "revoked"),
    h("section", {}, h("h2", {}, "Counters now"), usage),
    explainer(view, { api_key_id: id }),
    past,
    h("p", {}, link("/audit", { kind: "api_key", target: id }, "Changes of this key")),
  );
  await view.live(2000, async (options) => refill(usage, usageTable(await get("/usage", { api_key_id: id }, options))));
  await showPast(past, view, { api_key_id: id });
}

export function usageTable(usage) {
  const shown = counters(usage.rules.map((each) => ({ problem: null, ...each })));
  return [
    shown ?? empty("No rule of the tier counts this caller.", "Add one in ", link("/policy", { tier: usage.tier }, "Policy"), "."),
    usage.not_counted.length ? h("p.muted", {}, `Not counted by what is known of this caller: ${usage.not_counted.map((name) => name ?? "(tier)").join(", ")}.`) : null,
    h("p", {}, `Blocked in the last 24 hours: ${number(usage.blocked_24h)}`),
  ];
}

function actions(view, record) {
  const button = (text, action, properties = {}) => h("button", { type: "button", onclick: action, ...properties }, text);
  if (record.status === "revoked") return null;
  return h(
    "div.buttons",
    {},
    button("Override limits", () => override(view, record, { path: `/api-keys/${record.id}`, name: record.name || record.id, kind: "key", quotas: !record.customer })),
    button("Reset counters", () => reset(view, { api_key_id: record.id }, `the key ${record.name || record.id}`)),
    button("Block", () => block(view, { api_key_id: record.id }, `the key ${record.name || record.id}`)),
    record.managed_by_file ? null : button("Rotate", () => rotate(view, record)),
    record.managed_by_file ? null : button("Revoke", () => revoke(view, record), { class: "danger" }),
    record.managed_by_file ? h("p.muted", {}, "The policy file owns this key: change it there.") : null,
  );
}

export async function reset(view, target, name) {
  if (!(await confirm("Reset counters?", `Everything that ${name} has consumed is forgotten. This cannot be undone.`, "Reset"))) return;
  const { data } = await send("POST", "/counters/reset", { body: target });
  announce(`${number(data.reset)} counters were reset.`);
  view.reload();
}

async function revoke(view, record) {
  const reason = h("input", { required: true, maxlength: "1000" });
  const content = [
    h("p", {}, "Every request with this key gets 403 at once. This cannot be undone; a new key can be made."),
    field("Reason, for the audit log", reason),
  ];
  const save = async () => (await send("POST", `/api-keys/${record.id}/revoke`, { body: { reason: reason.value } })).data;
  if ((await form(`Revoke ${record.name || record.id}?`, content, { action: "Revoke", danger: true, save })) !== null) {
    announce("The key was revoked.");
    view.reload();
  }
}

async function rotate(view, record) {
  const grace = h("input", { type: "number", min: "0", max: "31536000", value: "0" });
  const content = [
    h("p", {}, "A new key takes the place of this one, with its limits and counters."),
    field("Seconds for which the old key still works", grace, "0: it is refused at once"),
  ];
  const save = async () => (await send("POST", `/api-keys/${record.id}/rotate`, { body: { grace_s: Number(grace.value) } })).data;
  const made = await form(`Rotate ${record.name || record.id}?`, content, { action: "Rotate", danger: true, save });
  if (made === null) return;
  await secret("New API key", made.api_key, "Copy it now: it is not shown again.");
  view.go(`/callers?key=${made.id}`);
}

/** Ask for the fields of a new key, and show it once. */
export async function createKey(view, ofCustomer = "") {
  const { items: tiers } = await all("/tiers", {}, { signal: view.signal });
  if (tiers.length === 0) {
    announce("Make a tier first, in Policy.");
    return;
  }
  const names = tiers.map((each) => [each.name, each.name]);
  const tier = select(ofCustomer ? [["", "that of the customer"], ...names] : names, ofCustomer ? "" : names[0][0]);
  const customer = h("input", { value: ofCustomer, maxlength: "64", spellcheck: "false" });
  const name = h("input", { maxlength: "200" });
  const expires = h("input", { type: "datetime-local" });
  const content = [field("Tier", tier), field("Name", name, "Whose key it is"), field("Customer", customer, "Empty: none. Quotas count all keys of a customer together"), field("Expires", expires, "Empty: never")];
  const save = async () => {
    const owner = customer.value.trim() ? { customer: customer.value.trim() } : {};
    const body = { tier: tier.value || null, ...owner, name: name.value, expires_at: expires.value ? new Date(expires.value).toISOString() : null };
    return (await send("POST", "/api-keys", { body })).data;
  };
  const made = await form("New API key", content, { action: "Create", save });
  if (made === null) return;
  await secret("New API key", made.api_key, "Copy it now: it is not shown again.");
  view.go(`/callers?key=${made.id}`);
}

async function showSubject(root, view, target) {
  const name = target.subject ?? target.ip;
  const usage = h("div", {});
  const past = h("div", {});
  const tier = view.parameters.tier;
  const fixed = target.subject ? { attributes: target.subject, tier } : { ip: target.ip };
  fill(
    root,
    h("h2", {}, name),
    view.operator ? h("div.buttons", {}, h("button", { type: "button", onclick: () => reset(view, target, name) }, "Reset counters"), h("button", { type: "button", onclick: () => block(view, blocked(target), name) }, "Block")) : null,
    h("section", {}, h("h2", {}, "Counters now"), usage),
    explainer(view, fixed),
    past,
  );
  await view.live(2000, async (options) => {
    try {
      refill(usage, usageTable(await get("/usage", { ...target, tier: target.subject ? tier : null }, options)));
    } catch (error) {
      if (error.status !== 404) throw error;
      fill(usage, empty("The policy has no tier for this caller.", error.message));
    }
  });
  await showPast(past, view, target);
}

/** Whom a block of a subject names. */
function blocked(target) {
  if (target.ip) return { cidr: target.ip };
  const entries = target.subject.split("&").map((part) => part.split("="));
  return { attribute: Object.fromEntries(entries.map(([name, value]) => [name, decodeURIComponent(value ?? "")])) };
}

async function showPast(root, view, target) {
  const { from, to } = span("24h");
  const [history, blocked] = await Promise.all([
    traffic({ from, to, step: 3600, ...target }, { signal: view.signal }),
    get("/violations", { ...target, limit: 50 }, { signal: view.signal }),
  ]);
  const sums = history === null ? null : byTime(history.items);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  fill(
    root,
    h("h2", {}, "Last 24 hours"),
    sums === null || sums.times.length === 0
      ? null
      : chart("Requests per hour", `${number(sum(sums.allowed))} allowed, ${number(sum(sums.blocked))} blocked`, sums.times, { allowed: sums.allowed, blocked: sums.blocked }),
    blocked.items.length
      ? table("Minutes in which it was blocked", ["minute", "rule", "#blocked"], blocked.items.map((each) => [time(each.minute), each.rule || "(tier)", number(each.blocked)]))
      : empty("It was not blocked in the last 24 hours."),
  );
}
