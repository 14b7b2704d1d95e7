// Tiers and rules: read, try and change them.

import { all, get, send } from "../api.js";
import { confirm, form, saveChange } from "../dialogs.js";
import { announce, empty, field, fill, h, link, problem, refill, select, table, tableRows } from "../dom.js";
import { explainer } from "../explain.js";
import { whatIf } from "../what_if.js";
import { listed } from "../overrides.js";

const ROWS_AT_ONCE = 50;
const REST_AFTER_MS = 200;
const MAX_RULES = 10_000;

export default async function policy(root, view) {
  const options = { signal: view.signal };
  const firstRules = (name) => get("/rate-limit-rules", { tier: name, limit: ROWS_AT_ONCE }, options);
  const named = view.parameters.tier;
  let refresh = view.reload;
  onNewVersion(view, () => refresh());
  const [{ items: tiers }, ofNamed] = await Promise.all([all("/tiers", {}, options), named ? firstRules(named) : null]);
  if (tiers.length === 0) {
    const make = view.operator ? h("button.primary", { type: "button", onclick: () => createTier(view) }, "New tier") : null;
    fill(root, empty("There is no tier yet.", "A tier is a class of callers with its rules. Make one here, or import a policy file: tidegate policy."), make, explainer(view));
    return;
  }
  const names = tiers.map((each) => each.name);
  const tier = tiers.find((each) => each.name === named) ?? tiers[0];
  const { items: first, next } = tier.name === named ? ofNamed : await firstRules(tier.name);
  let rules = first;
  // A long list is read in two parts: what is shown at once and, after that is painted, what is searched and shown later.
  const rest = next === null ? Promise.resolve([]) : readRest(view.parameters.rule ? 0 : REST_AFTER_MS);
  let isComplete = next === null;
  let rowsShown = ROWS_AT_ONCE;
  const choice = select(names, tier.name, { id: "tier", onchange: () => view.set({ tier: choice.value, rule: null }) });
  const search = h("input", { type: "search", id: "rule", value: view.parameters.rule ?? "", placeholder: "name or endpoint", spellcheck: "false" });
  const list = h("div", {});
  const more = h("div", {});
  const ofTier = h("div", {});
  async function readRest(delayMs) {
    await new Promise((resolve) => setTimeout(resolve, delayMs));
    const { items } = await all("/rate-limit-rules", { tier: tier.name, after: next }, options, MAX_RULES);
    // Not if all rules were read again in the meantime, since the catalog has a new version.
    if (!isComplete) rules = [...first, ...items];
    isComplete = true;
    return items;
  }
  function found() {
    const text = search.value.trim().toLowerCase();
    return rules.filter((each) => `${each.name}\n${each.endpoint}`.toLowerCase().includes(text));
  }
  function showRules() {
    refill(list, isComplete || found().length ? ruleTable(view, tier, found().slice(0, rowsShown), rules.length) : null);
    showMore();
  }
  function showMore() {
    const hidden = found().length - rowsShown;
    const button = h("button", { type: "button", onclick: addRows }, `Show ${Math.min(ROWS_AT_ONCE, isComplete ? hidden : ROWS_AT_ONCE)} more`);
    refill(
      more,
      isComplete ? null : h("p.muted", {}, "Reading the other rules…"),
      hidden > 0 || !isComplete ? h("div.buttons", {}, button, isComplete ? h("span.muted", {}, `${hidden} more rules; or search by a part of the name or the endpoint.`) : null) : null,
    );
  }
  async function addRows() {
    await rest;
    const added = found().slice(rowsShown, rowsShown + ROWS_AT_ONCE);
    rowsShown += ROWS_AT_ONCE;
    list.querySelector("tbody")?.append(...tableRows(columns(view), added.map((each) => ruleRow(view, tier, each))));
    showMore();
  }
  search.addEventListener("input", () => {
    rowsShown = ROWS_AT_ONCE;
    showRules();
  });
  search.addEventListener("change", () => {
    const query = new URLSearchParams(window.location.search);
    query.set("rule", search.value);
    window.history.replaceState(null, "", `${window.location.pathname}?${query}`);
  });
  if (search.value) await rest;
  showRules();
  fill(
    root,
    h(
      "div.toolbar",
      {},
      h("label", { for: "tier" }, "Tier"),
      choice,
      h("label", { for: "rule" }, "Rules with"),
      search,
      view.operator ? [h("button.primary", { type: "button", onclick: () => editRule(view, tier, null) }, "New rule"), h("button", { type: "button", onclick: () => createTier(view) }, "New tier")] : null,
    ),
    ofTier,
    list,
    more,
    explainer(view),
    whatIf(view, names, tier, first, rest),
  );
  fill(ofTier, tierFacts(view, tier, () => rules.length));
  rest.then(
    () => (search.value ? showRules() : showMore()),
    (error) => view.signal.aborted || fill(more, problem(error)),
  );
  refresh = async () => {
    const [{ items: newTiers }, { items: newRules }] = await Promise.all([
      all("/tiers", {}, { signal: view.signal }),
      all("/rate-limit-rules", { tier: tier.name }, { signal: view.signal }, MAX_RULES),
    ]);
    const newTier = newTiers.find((each) => each.name === tier.name);
    if (newTier === undefined || newTiers.length !== tiers.length) {
      view.reload();
      return;
    }
    rules = newRules;
    isComplete = true;
    refill(ofTier, tierFacts(view, newTier, () => rules.length));
    showRules();
  };
}

/** Run an action when the catalog has another version than what is shown: an operator or the policy file changed it. */
function onNewVersion(view, action) {
  let shown = null;
  view.live(5000, async (options) => {
    const found = (await get("/system", {}, options)).catalog?.version;
    const isNew = shown !== null && found !== shown;
    shown = found;
    if (isNew) await action();
  });
}

function tierFacts(view, tier, countRules) {
  const canDelete = view.operator && !tier.managed_by_file;
  return h(
    "div.toolbar",
    {},
    h("p", {}, "Limits over all endpoints of the tier: ", h("strong", {}, [...tier.limits, ...quotaTexts(tier), ...(tier.overage ? [`overage ${overageText(tier.overage)}`] : [])].join(", ") || "none")),
    canDelete ? h("button", { type: "button", onclick: () => editTier(view, tier) }, "Change") : null,
    canDelete ? h("button.danger", { type: "button", onclick: () => deleteTier(view, tier, countRules()) }, "Delete tier") : null,
    tier.managed_by_file ? h("p.muted", {}, "The policy file owns this tier: change it there.") : null,
  );
}

function quotaTexts(each) {
  return (each.quotas ?? []).map((text) => `quota ${text}`);
}

/** Overage as the form has it: empty, a share such as 20%, or unlimited. */
function overageText(overage) {
  return overage === true ? "unlimited" : overage ? overage.up_to : "";
}

function ruleTable(view, tier, rules, total) {
  if (rules.length === 0) {
    return total === 0
      ? empty(`The tier ${tier.name} has no rules.`, view.operator ? "Add one with New rule; in mode shadow it counts and never blocks." : "An operator adds them.")
      : empty("No rule matches.", "Search by a part of the name or the endpoint.");
  }
  return table(`Rules of ${tier.name}`, columns(view), rules.map((each) => ruleRow(view, tier, each)));
}

function columns(view) {
  return ["name", "endpoint", "methods", "limits", "algorithm", "counts", "mode", view.operator ? "change" : "owner"];
}

function ruleRow(view, tier, each) {
  return [
    each.name,
    h("code", {}, each.endpoint),
    each.methods.join(", ") || "all",
    each.action ? `${each.action}, without counting` : [...each.limits, ...quotaTexts(each)].join(", ") + (each.count === "failures" ? " failures" : ""),
    each.action ? "" : each.algorithm.replaceAll("_", " "),
    Array.isArray(each.subject) ? each.subject.join(" + ") : each.subject,
    [h(`span.badge.${each.mode}`, {}, each.mode), each.mode === "shadow" ? [" ", link("/violations", { mode: "shadow", tier: tier.name, rule: each.name }, "what it would block")] : null],
    view.operator ? ruleActions(view, tier, each) : each.managed_by_file ? "in the policy file" : "",
  ];
}

function ruleActions(view, tier, rule) {
  if (rule.managed_by_file) return "in the policy file";
  const button = (text, action, label) => h("button", { type: "button", onclick: action, "aria-label": `${label} ${rule.name}` }, text);
  return h(
    "span.buttons",
    {},
    button("Edit", () => editRule(view, tier, rule), "Edit the rule"),
    rule.mode !== "enforce" ? button("Enforce", () => setMode(view, rule, "enforce"), "Enforce the rule") : button("Shadow", () => setMode(view, rule, "shadow"), "Only watch with the rule"),
    button("Delete", () => deleteRule(view, rule), "Delete the rule"),
  );
}

async function setMode(view, rule, mode) {
  const text = mode === "enforce"
    ? "It blocks requests from now on. What it counted before counts."
    : "It blocks nothing from now on, and goes on counting.";
  const save = () => saveChange({ method: "PATCH", path: `/rate-limit-rules/${rule.id}`, read: `/rate-limit-rules/${rule.id}`, before: rule, body: { mode } });
  const changed = await form(`${mode === "enforce" ? "Enforce" : "Only watch with"} ${rule.name}?`, h("p", {}, text), { action: mode === "enforce" ? "Enforce" : "Shadow", danger: mode === "enforce", save });
  if (changed !== null) done(view, changed);
}

async function deleteRule(view, rule) {
  if (!(await confirm(`Delete ${rule.name}?`, "Its requests are answered by the next rule that matches, or by none. The audit log keeps its fields.", "Delete"))) return;
  await send("DELETE", `/rate-limit-rules/${rule.id}`, { revision: rule.revision });
  announce("The rule was deleted.");
  view.reload();
}

async function deleteTier(view, tier, count) {
  if (!(await confirm(`Delete the tier ${tier.name}?`, `Its ${count} rules are deleted with it. A tier with API keys is refused.`, "Delete"))) return;
  try {
    await send("DELETE", `/tiers/${encodeURIComponent(tier.name)}`, { revision: tier.revision });
  } catch (error) {
    announce(error.message);
    return;
  }
  view.set({ tier: null });
}

async function editTier(view, tier) {
  const limits = h("input", { value: tier.limits.join(", "), spellcheck: "false" });
  const quotas = h("input", { value: (tier.quotas ?? []).join(", "), spellcheck: "false" });
  const overage = h("input", { value: overageText(tier.overage), spellcheck: "false" });
  const content = [
    field("Limits over all endpoints", limits, "Such as 20000/day; several separated by commas; empty for none"),
    field("Quotas", quotas, "What the plan sells in fixed periods, such as 100000/month"),
    field("Overage", overage, "Empty: requests above the quotas are denied; 20%: they pass and are reported up to there; unlimited: all pass"),
  ];
  const path = `/tiers/${encodeURIComponent(tier.name)}`;
  const body = () => ({ limits: listed(limits.value), quotas: listed(quotas.value), overage: sentOverage(overage.value.trim()) });
  const save = () => saveChange({ method: "PATCH", path, read: path, before: tier, body: body() });
  const saved = await form(`Limits of ${tier.name}`, content, { save });
  if (saved !== null) done(view, saved);
}

function sentOverage(text) {
  return text === "" ? false : text === "unlimited" ? true : { up_to: text };
}

async function createTier(view) {
  const name = h("input", { required: true, maxlength: "64", spellcheck: "false" });
  const limits = h("input", { placeholder: "20000/day", spellcheck: "false" });
  const content = [field("Name", name, "Letters, digits, '_', '.' and '-'"), field("Limits over all endpoints", limits, "May be empty")];
  const save = async () => (await send("POST", "/tiers", { body: { name: name.value.trim(), limits: listed(limits.value) } })).data;
  const made = await form("New tier", content, { action: "Create", save });
  if (made !== null) view.go(`/policy?tier=${encodeURIComponent(made.name)}`);
}

function done(view, saved) {
  const warnings = saved.warnings ?? [];
  announce(warnings.length ? warnings.join(" ") : "Saved.");
  view.reload();
}

async function editRule(view, tier, rule) {
  const algorithms = ["sliding_window", "fixed_window", "sliding_log", "token_bucket", "leaky_bucket"];
  const inputs = {
    endpoint: h("input", { value: rule?.endpoint ?? "", required: true, placeholder: "/api/v1/*", spellcheck: "false" }),
    methods: h("input", { value: (rule?.methods ?? []).join(", "), placeholder: "all", spellcheck: "false" }),
    limits: h("input", { value: (rule?.limits ?? []).join(", "), required: true, placeholder: "100/minute", spellcheck: "false" }),
    algorithm: select(algorithms.map((name) => [name, name.replaceAll("_", " ")]), rule?.algorithm ?? algorithms[0]),
    subject: h("input", { value: rule === null ? "api_key" : [rule.subject].flat().join(", "), spellcheck: "false" }),
    quotas: h("input", { value: (rule?.quotas ?? []).join(", "), spellcheck: "false" }),
    mode: select(["shadow", "enforce", "soft"], rule?.mode ?? "shadow"),
    priority: h("input", { type: "number", value: String(rule?.priority ?? 0) }),
    name: h("input", { value: rule?.name ?? "", maxlength: "256", placeholder: "made from methods and endpoint", spellcheck: "false" }),
  };
  function body() {
    const subject = listed(inputs.subject.value);
    const fields = {
      endpoint: inputs.endpoint.value.trim(),
      methods: listed(inputs.methods.value),
      limits: listed(inputs.limits.value),
      quotas: listed(inputs.quotas.value),
      algorithm: inputs.algorithm.value,
      subject: subject.length === 1 ? subject[0] : subject,
      mode: inputs.mode.value,
      priority: Number(inputs.priority.value),
    };
    const name = inputs.name.value.trim();
    return name && name !== rule?.name ? { ...fields, name } : fields;
  }
  const validity = h("p.hint", { role: "status" });
  let waiting = null;
  function validateSoon() {
    clearTimeout(waiting);
    waiting = setTimeout(async () => fill(validity, await fault(body())), 300);
  }
  const content = h(
    "div",
    { oninput: validateSoon },
    field("Endpoint", inputs.endpoint, "A path; * stands for any characters, {id} for one segment"),
    field("Limits", inputs.limits, "Such as 100/minute, 5000/day; all must pass"),
    h("div.inline", {}, field("Mode", inputs.mode, "shadow only counts; soft lets pass and reports what is over"), field("Algorithm", inputs.algorithm), field("Priority", inputs.priority)),
    h("div.inline", {}, field("Methods", inputs.methods), field("Counts by", inputs.subject, "api_key, ip, tier, or attributes")),
    h("div.inline", {}, field("Quotas", inputs.quotas, "Fixed periods, such as 100000/month"), field("Name", inputs.name)),
    validity,
  );
  const save = async () => {
    if (rule === null) return (await send("POST", "/rate-limit-rules", { body: { tier: tier.name, ...body() } })).data;
    const path = `/rate-limit-rules/${rule.id}`;
    return saveChange({ method: "PATCH", path, read: path, before: rule, body: body() });
  };
  const saved = await form(rule === null ? `New rule of ${tier.name}` : `Edit ${rule.name}`, content, { save });
  clearTimeout(waiting);
  if (saved !== null) done(view, saved);
}

/** What is wrong with the fields of a rule, as the server reads a policy; nothing is changed. */
async function fault(fields) {
  const value = (each) => (Array.isArray(each) ? `[${each.map(value).join(", ")}]` : typeof each === "number" ? String(each) : JSON.stringify(each));
  const given = Object.entries(fields).filter(([, each]) => !Array.isArray(each) || each.length > 0);
  const lines = given.map(([name, each]) => `${name} = ${value(each)}`);
  const text = `[[tiers]]\nname = "validated"\n[[tiers.rules]]\n${lines.join("\n")}\n`;
  try {
    await send("POST", "/policy", { query: { dry_run: true }, text: { type: "application/toml", content: text } });
    return "Valid.";
  } catch (error) {
    // The line is one of the text above, which nobody sees.
    return error.message.replace(/^\d+: /, "");
  }
}
