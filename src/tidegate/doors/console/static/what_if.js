// What a change would have done to recorded traffic, before it is published.

import { get, send } from "./api.js";
import { announce, empty, field, fill, h, problem, select, table } from "./dom.js";
import { number } from "./format.js";
import { listed } from "./overrides.js";

const MAX_LOG_BYTES = 16_000_000;

/**
 * The form, and the result below it.
 * @param {object[]} rules of the tier
 * @param {Promise<object[]>} rest further rules of the tier; the page reports if it fails
 */
export function whatIf(view, tiers, tier, rules, rest) {
  const result = h("div", { "aria-live": "polite" });
  if (!view.operator) return null;
  const what = select([["rule", "one rule"], ["policy", "the whole policy"]], rules.length ? "rule" : "policy", { onchange: showFields });
  const rule = select(rules.map((each) => [String(each.id), each.name]), String(rules[0]?.id), {});
  rest.then((items) => rule.append(...items.map((each) => h("option", { value: String(each.id) }, each.name))), () => {});
  const limits = h("input", { placeholder: "50/minute", spellcheck: "false" });
  const mode = select([["", "as it is"], ["enforce", "enforce"], ["shadow", "shadow"]], "", {});
  const policy = h("textarea", { rows: "12", spellcheck: "false", placeholder: "[[tiers]]" });
  const keyless = select([["", "as the policy says"], ...tiers], "", {});
  const file = h("input", { type: "file", onchange: async () => (policy.value = (await file.files[0]?.text()) ?? policy.value) });
  const current = h("button", { type: "button", onclick: takeCurrent }, "Begin with the policy as it is");
  const log = h("input", { type: "file" });
  const button = h("button.primary", { type: "submit" }, "Try");
  const ofRule = h("div.inline", {}, field("Rule", rule), field("New limits", limits, "Empty: as they are"), field("New mode", mode));
  const ofPolicy = h("div", {}, field("Policy file", policy, "As `tidegate policy` writes it; a log is needed"), h("div.inline", {}, field("From a file", file), field("Tier of requests without a key", keyless), current));
  showFields();

  function showFields() {
    ofRule.hidden = what.value !== "rule";
    ofPolicy.hidden = what.value !== "policy";
  }
  async function takeCurrent() {
    try {
      policy.value = await get("/policy", {}, { signal: view.signal });
    } catch (error) {
      if (!view.signal.aborted) fill(result, problem(error));
    }
  }
  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    try {
      await run();
    } catch (error) {
      if (!view.signal.aborted) fill(result, problem(error));
    } finally {
      button.disabled = false;
    }
  }
  async function run() {
    const recorded = log.files[0];
    if (recorded && recorded.size > MAX_LOG_BYTES) throw new Error(`The log has more than ${number(MAX_LOG_BYTES)} bytes: take a part of it, or use tidegate simulate.`);
    const body = { ...(what.value === "rule" ? changed() : { policy: policy.value, tier: keyless.value || null }), ...(recorded ? { log: await recorded.text() } : {}) };
    let { data: found } = await send("POST", "/what-if", { body, signal: view.signal });
    const shown = progress(found.id);
    fill(result, shown.element);
    let missing = null;
    await view.until(500, async (options) => {
      try {
        found = await get(`/what-if/${found.id}`, {}, options);
      } catch (error) {
        if (error.status !== 404) throw error;
        missing = error;
        return true;
      }
      shown.update(found.progress);
      return found.state !== "running";
    });
    fill(result, missing === null ? report(found) : problem(missing));
  }
  function changed() {
    const given = listed(limits.value);
    return { rule: { id: Number(rule.value), ...(given.length ? { limits: given } : {}), ...(mode.value ? { mode: mode.value } : {}) }, tier: tier.name };
  }
  return h(
    "section",
    {},
    h("h2", {}, "What would a change have done?"),
    h(
      "form",
      { onsubmit: submit },
      field("What changes", what),
      ofRule,
      ofPolicy,
      h("div.inline", {}, field("Access log", log, "Any format that tidegate simulate reads, up to 16 MB; for one rule without a log, the traffic history"), button),
    ),
    result,
  );
}

/** How far a run is, and a button that cancels it. */
function progress(id) {
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
  const state = h("span", {}, "0 %");
  const cancel = h("button", { type: "button", onclick: stop }, "Cancel");
  async function stop() {
    cancel.disabled = true;
    try {
      await send("DELETE", `/what-if/${id}`);
    } catch (error) {
      cancel.disabled = false;
      announce(error.message);
    }
  }
  function update(part) {
    bar.value = part;
    fill(state, `${Math.round(part * 100)} %`);
  }
  return { element: h("div.row", {}, bar, state, cancel), update };
}

function report(found) {
  if (found.state !== "done") return empty(found.state === "cancelled" ? "Cancelled." : "It failed.", found.message ?? "");
  const { before, after, note } = found.result;
  const old = new Map(before.rules.map((each) => [`${each.tier}\n${each.rule}`, each]));
  const blockedBefore = (each) => old.get(`${each.tier}\n${each.rule}`)?.blocked ?? 0;
  const rows = after.rules
    .filter((each) => each.requests > 0)
    .map((each) => [each.rule, each.tier, each.mode, number(each.requests), number(blockedBefore(each)), bounds(each)]);
  const top = after.top_blocked.map((each) => [each.subject, each.rule, number(each.blocked)]);
  return [
    h("p.verdict.unknown", {}, `${number(after.requests)} requests: ${number(before.blocked)} blocked as it is, ${bounds(after)} with the change.`),
    note ? h("p", {}, note) : null,
    rows.length ? table("By rule", ["rule", "tier", "mode", "#requests", "#blocked now", "#blocked with the change"], rows) : empty("No request reached a rule."),
    top.length ? [h("h3", {}, "Callers that would be hit first"), table("Callers that would be hit first", ["caller", "rule", "#blocked"], top)] : null,
  ];
}

/** What was blocked: a number, or two where only bounds are known. */
function bounds(each) {
  const most = each.blocked_at_most ?? each.blocked;
  return most === each.blocked ? number(each.blocked) : `${number(each.blocked)} to ${number(most)}`;
}
