// Limits and quotas of a key's or a customer's own: which it has, and the form that changes them.

import { all } from "./api.js";
import { confirm, form, saveChange } from "./dialogs.js";
import { announce, field, h, table } from "./dom.js";
import { time } from "./format.js";

export function listed(text) {
  return text.split(",").map((part) => part.trim()).filter(Boolean);
}

/**
 * The overrides of a key or a customer, with buttons that remove them.
 * @param view of the page
 * @param {object} record as the server has it
 * @param {string} path of the record
 * @param {boolean} canChange whether the buttons are shown
 */
export function overrides(view, record, path, canChange) {
  const own = record.overrides.map((each) => ({ ...each, remove: () => ({ overrides: record.overrides.filter((other) => other !== each) }) }));
  if (record.limits !== null) own.unshift({ rule: null, limits: record.limits, remove: () => ({ limits: null }) });
  if (own.length === 0) return null;
  const rows = own.map((each) => {
    const texts = [...(each.limits ?? []), ...(each.quotas ?? []).map((text) => `quota ${text}`)];
    const what = `${each.rule ?? "all endpoints together"}: ${texts.join(", ") || "no limits"}`;
    const button = h("button", { type: "button", "aria-label": `Remove the override ${what}`, onclick: () => remove(view, record, path, what, each.remove()) }, "Remove");
    return [each.rule ?? "all endpoints together", texts.join(", ") || "no limits", each.until ? time(each.until) : "never", ...(canChange ? [button] : [])];
  });
  return h("section", {}, h("h2", {}, "Limits of its own"), table("Limits of its own", ["rule", "limits", "ends", ...(canChange ? ["change"] : [])], rows));
}

async function remove(view, record, path, what, body) {
  if (!(await confirm("Remove the override?", `${what}: what the tier says applies instead. What was consumed still counts.`, "Remove"))) return;
  try {
    await saveChange({ method: "PATCH", path, read: path, before: record, body });
    announce("The override was removed.");
  } catch (error) {
    announce(error.message);
  }
  view.reload();
}

/**
 * Ask for limits of a key's or customer's own, permanent or until a time, and save them.
 * @param {object} options path of the record, name, kind: "key" or "customer", quotas: whether it may have quotas of its own
 */
export async function override(view, record, { path, name, kind, quotas }) {
  const { items } = record.tier === null ? { items: [] } : await all("/rate-limit-rules", { tier: record.tier }, { signal: view.signal });
  const subjects = kind === "key" ? ["api_key"] : ["api_key", "customer"];
  const counted = items.filter((each) => !each.action && !Array.isArray(each.subject) && subjects.includes(each.subject));
  const permanent = record.overrides.filter((each) => !each.until);
  const limitsOf = (rule) => permanent.find((each) => (each.rule ?? null) === rule && each.limits?.length)?.limits ?? [];
  const quotasOf = (rule) => permanent.find((each) => (each.rule ?? null) === rule && each.quotas?.length)?.quotas ?? [];
  const input = (value, placeholder) => h("input", { value: value.join(", "), placeholder, spellcheck: "false" });
  const places = counted.map((each) => ({ rule: each.name, kind: "limits", before: limitsOf(each.name), input: input(limitsOf(each.name), each.limits.join(", ")), hint: `The rule: ${each.limits.join(", ") || "no limits"}` }));
  places.push({ rule: null, kind: "limits", before: record.limits ?? [], input: input(record.limits ?? [], "as the tier"), label: "All endpoints together" });
  if (quotas) places.push({ rule: null, kind: "quotas", before: quotasOf(null), input: input(quotasOf(null), "as the tier"), label: "Quotas", hint: "Fixed periods, such as 150000/month" });
  const until = h("input", { type: "datetime-local" });
  const content = [
    h("p.hint", {}, "Limits such as 500/minute, several separated by commas. Empty: as the tier says. What was consumed still counts."),
    ...places.map((each) => field(each.label ?? each.rule, each.input, each.hint ?? null)),
    field("Ends", until, "Empty: never. With a time, what you change here applies until then; after that what was permanent before"),
  ];
  const save = () => {
    const changed = places.filter((each) => listed(each.input.value).join() !== each.before.join());
    const end = until.value ? new Date(until.value).toISOString() : null;
    return saveChange({ method: "PATCH", path, read: path, before: record, body: bodyOf(record, changed, end) });
  };
  const saved = await form(`Limits of ${name}`, content, { save });
  if (saved !== null) {
    announce(saved.warnings?.length ? saved.warnings.join(" ") : "The limits were saved.");
    view.reload();
  }
}

/** The request that applies the changed fields; what the form does not show stays as it is. */
function bodyOf(record, changed, until) {
  const overridden = record.overrides.map((each) => ({ ...each }));
  const body = {};
  for (const { rule, kind, input } of changed) {
    const texts = listed(input.value);
    if (rule === null && kind === "limits" && until === null) {
      body.limits = texts.length ? texts : null;
      continue;
    }
    // An override may have limits and quotas: only the changed kind is replaced.
    for (const each of overridden) {
      if ((each.rule ?? null) === rule && Boolean(each.until) === (until !== null)) each[kind] = [];
    }
    if (texts.length) overridden.push({ ...(rule === null ? {} : { rule }), [kind]: texts, ...(until === null ? {} : { until }) });
  }
  body.overrides = overridden.filter((each) => each.limits?.length || each.quotas?.length);
  return body;
}
