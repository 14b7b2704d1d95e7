// Who changed what, as a diff.

import { get } from "../api.js";
import { difference } from "../diff.js";
import { empty, field, fill, h, link, table } from "../dom.js";
import { time } from "../format.js";

const FILTERS = [["kind", "Kind", "tier, rule, api_key, token …"], ["target", "Target", "id or name"], ["actor", "Actor", "name of the token"]];

export default async function audit(root, view) {
  const { kind, target, actor, after } = view.parameters;
  const page = await get("/audit-log", { limit: 50, kind, target, actor, after }, { signal: view.signal });
  const inputs = Object.fromEntries(FILTERS.map(([name, , hint]) => [name, h("input", { value: view.parameters[name] ?? "", placeholder: hint, spellcheck: "false" })]));
  function submit(event) {
    event.preventDefault();
    view.set({ ...Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, input.value.trim()])), after: null }, { replace: false });
  }
  const form = h("form.inline", { onsubmit: submit }, FILTERS.map(([name, label]) => field(label, inputs[name])), h("button", { type: "submit" }, "Filter"));
  const nothing = kind || target || actor
    ? empty("No change matches.", link("/audit", {}, "Show all"))
    : empty("Nothing was changed yet.", "Changes of tiers, rules, keys and tokens appear here; those by the policy file are in its own history.");
  fill(
    root,
    form,
    page.items.length ? h("ol.changes", {}, page.items.map(entry)) : nothing,
    h(
      "div.buttons",
      {},
      after ? h("button", { type: "button", onclick: () => view.set({ after: null }) }, "Newest") : null,
      page.next ? h("button", { type: "button", onclick: () => view.set({ after: page.next }, { replace: false }) }, "Older") : null,
    ),
  );
}

function entry(change) {
  const rows = difference(change.before, change.after);
  const title = [h("strong", {}, change.actor), ` ${change.action} ${change.kind} `, h("code", {}, change.target), h("span.muted", {}, ` ${time(change.at)}`)];
  return h("li", {}, h("details", {}, h("summary", {}, title), rows.length ? table(`Change ${change.id}`, ["field", "before", "after"], rows) : h("p.muted", {}, "No fields.")));
}
