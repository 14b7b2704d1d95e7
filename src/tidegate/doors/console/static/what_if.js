// What a change would have done to recorded traffic, before it is published.

import { ApiError, get, send } from "./api.js";
import { empty, field, fill, h, problem, select, table } from "./dom.js";
import { number } from "./format.js";

const MAX_LOG_BYTES = 16_000_000;

/** The form, and the result below it. */
export function whatIf(view, tier, rules) {
  const result = h("div", { "aria-live": "polite" });
  if (!view.operator || rules.length === 0) return null;
  const rule = select(rules.map((each) => [String(each.id), each.name]), String(rules[0].id), {});
  const limits = h("input", { placeholder: "50/minute", spellcheck: "false" });
  const mode = select([["", "as it is"], ["enforce", "enforce"], ["shadow", "shadow"]], "", {});
  const log = h("input", { type: "file" });
  const button = h("button.primary", { type: "submit" }, "Try");
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
    const file = log.files[0];
    if (file && file.size > MAX_LOG_BYTES) throw new Error(`The log has more than ${number(MAX_LOG_BYTES)} bytes: take a part of it, or use tidegate simulate.`);
    const given = limits.value.split(",").map((part) => part.trim()).filter(Boolean);
    const change = { id: Number(rule.value), ...(given.length ? { limits: given } : {}), ...(mode.value ? { mode: mode.value } : {}) };
    const body = { rule: change, tier: tier.name, ...(file ? { log: await file.text() } : {}) };
    let { data: found } = await send("POST", "/what-if", { body, signal: view.signal });
    while (found.state === "running") {
      fill(result, progress(found));
      await new Promise((resolve) => setTimeout(resolve, 500));
      found = await get(`/what-if/${found.id}`, {}, { signal: view.signal });
    }
    fill(result, report(found));
  }
  return h(
    "section",
    {},
    h("h2", {}, "What would a change have done?"),
    h(
      "form.inline",
      { onsubmit: submit },
      field("Rule", rule),
      field("New limits", limits, "Empty: as they are"),
      field("New mode", mode),
      field("Access log", log, "Any format that tidegate simulate reads, up to 16 MB; without one, the traffic history"),
      button,
    ),
    result,
  );
}

function progress(found) {
  const cancel = async () => {
    try {
      await send("DELETE", `/what-if/${found.id}`);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
    }
  };
  return h("div.row", {}, h("progress", { max: 1, value: found.progress, "aria-label": "Progress" }), h("button", { type: "button", onclick: cancel }, "Cancel"));
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
