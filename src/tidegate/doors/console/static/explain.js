// Which rule answers a request, and why: a form whose fields are in the address, and the answer.

import { get } from "./api.js";
import { field, fill, h, problem, refill, select, table } from "./dom.js";
import { countdown, duration, number } from "./format.js";

const METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];
const RESULTS = { answers: "answers", watches: "watches (shadow)", outranked: "outranked", not_matched: "does not match" };

/**
 * The form and its answer.
 * @param view of the page
 * @param {object} fixed parameters that the page gives: api_key_id, ip, attributes, tier
 */
export function explainer(view, fixed = {}) {
  const answer = h("div", { "aria-live": "polite" });
  const { method = "GET", path = "", with: by = "", cost = "1" } = view.parameters;
  const inputs = {
    method: select(METHODS.includes(method) ? METHODS : [method, ...METHODS], method, {}),
    path: h("input", { value: path, placeholder: "/api/v1/items", required: true, spellcheck: "false" }),
    by: h("input", { value: by, placeholder: "key id, address or user=42", spellcheck: "false" }),
    cost: h("input", { type: "number", min: "0", value: cost }),
  };
  const isFixed = Object.keys(fixed).length > 0;
  const fields = [
    field("Method", inputs.method),
    field("Path", inputs.path),
    isFixed ? null : field("Caller", inputs.by, "Empty for a caller without a key"),
    field("Cost", inputs.cost),
  ];
  function submit(event) {
    event.preventDefault();
    view.set({ method: inputs.method.value, path: inputs.path.value, with: isFixed ? null : inputs.by.value.trim(), cost: inputs.cost.value });
  }
  const form = h("form.inline", { onsubmit: submit }, fields, h("button.primary", { type: "submit" }, "Explain"));
  if (path) {
    const caller = isFixed ? fixed : callerOf(by);
    view.live(2000, async (options) => {
      try {
        refill(answer, explanation(await get("/explain", { method, path, cost, ...caller }, options)));
      } catch (error) {
        if (view.signal.aborted) throw error;
        fill(answer, problem(error));
      }
    });
  }
  return h("section", {}, h("h2", {}, "Which rule answers a request, and why"), form, answer);
}

/** What a search text says of a caller. */
export function callerOf(text) {
  if (text.includes("=")) return { attributes: text };
  if (/^[0-9a-f]{24}$/.test(text)) return { api_key_id: text };
  if (/^[0-9a-fA-F.:/]+$/.test(text) && /[.:]/.test(text)) return { ip: text };
  return text ? { api_key_id: text } : {};
}

function explanation(found) {
  const verdict = found.allowed === null ? "unknown" : found.allowed ? "good" : "bad";
  const rules = found.rules.map((each) => [
    each.rule,
    h(`span.badge.${each.result}`, {}, RESULTS[each.result] ?? each.result),
    each.reason,
  ]);
  return [
    h(`p.verdict.${verdict}`, {}, found.answer),
    h("p", {}, found.caller.why),
    rules.length ? table("Rules of the tier, in order of preference", ["rule", "result", "reason"], rules) : h("p", {}, "The tier has no rules."),
    found.left_out ? h("p.muted", {}, `${number(found.left_out)} more rules do not match.`) : null,
    counters(found.counters),
  ];
}

/** Counters with how full each window is. */
export function counters(items) {
  if (items.length === 0) return null;
  const rows = items.flatMap((each) => {
    const holds = each.holds > 0 ? ` (${number(each.holds)} open ${each.holds === 1 ? "hold" : "holds"})` : "";
    const name = (each.rule ?? "(tier)") + (each.mode === "shadow" ? " (shadow)" : "") + holds;
    if (each.windows.length === 0) {
      const state = each.problem ?? (each.remaining === null ? "not known" : `${number(each.remaining)} of ${number(each.limit)} left`);
      return [[name, state, "", "", ""]];
    }
    return each.windows.map((window) => [
      name,
      window.window === 0 ? `${number(window.limit)} in progress` : `${number(window.limit)} / ${window.period ? `${window.period} (quota)` : duration(window.window)}`,
      meter(window.used, window.limit),
      number(window.remaining),
      window.window === 0 && window.used > 0 ? "when requests end" : window.resets_at === null ? "full" : countdown(window.resets_at),
    ]);
  });
  const degraded = items.some((each) => each.degraded)
    ? h("p.note", { role: "status" }, "The counter store does not answer: these are the counts of this instance alone.")
    : null;
  return [degraded, table("Counters now", ["rule", "limit", "used", "#left", "#full again in"], rows)];
}

function meter(used, limit) {
  const over = used > limit ? ` (${number(used - limit)} over)` : "";
  const bar = h("meter", { min: 0, max: Math.max(limit, 1), low: limit * 0.8, high: limit * 0.95, optimum: 0, value: Math.min(used, limit), "aria-label": `${used} of ${limit} used` });
  return h("span.meter", {}, bar, ` ${number(used)}${over}`);
}
