// Blocks: callers that are stopped before any rule is read.

import { get, send } from "./api.js";
import { confirm, form } from "./dialogs.js";
import { announce, empty, field, h, refill, table } from "./dom.js";
import { time } from "./format.js";

/**
 * Show the active blocks, and keep them up to date.
 * @param view of the page
 * @param root where
 * @param {object} query parameters of GET /blocks that select some
 */
export function blocks(view, root, query = {}) {
  return view.live(10_000, async (options) => {
    const page = await get("/blocks", { limit: 100, ...query }, options);
    const rows = page.items.map((each) => [
      target(each),
      each.reason,
      each.until === null ? "until it is lifted" : time(each.until),
      each.created_by,
      ...(view.operator ? [h("button", { type: "button", "aria-label": `Lift the block of ${target(each)}`, onclick: () => lift(view, each) }, "Lift")] : []),
    ]);
    const list = rows.length
      ? table("Active blocks", ["who", "reason", "ends", "by", ...(view.operator ? ["change"] : [])], rows)
      : empty("No caller is blocked.", "A block stops a caller at once, whatever its limits: find the caller and choose Block.");
    refill(root, h("h2", {}, "Active blocks"), list, page.next === null ? null : h("p.muted", {}, "There are more."));
  });
}

function target(block) {
  return block.cidr ?? block.api_key_id ?? block.customer ?? Object.entries(block.attribute ?? {}).map((entry) => entry.join("=")).join(" and ");
}

/** Ask for the reason and the end of a block, and make it. */
export async function block(view, whom, name) {
  const reason = h("input", { maxlength: "1000" });
  const until = h("input", { type: "datetime-local" });
  const message = h("input", { maxlength: "200" });
  const content = [
    h("p", {}, `Every request of ${name} is refused at once, whatever its limits.`),
    field("Reason", reason, "For operators; the client does not see it"),
    field("Ends", until, "Empty: when it is lifted"),
    field("Message to the client", message, "May be empty"),
  ];
  const save = async () => {
    const end = until.value ? { until: new Date(until.value).toISOString() } : {};
    return (await send("POST", "/blocks", { body: { ...whom, ...end, reason: reason.value, message: message.value } })).data;
  };
  if ((await form(`Block ${name}?`, content, { action: "Block", danger: true, save })) !== null) {
    announce("Blocked.");
    view.reload();
  }
}

async function lift(view, each) {
  if (!(await confirm("Lift the block?", `Requests of ${target(each)} are counted by its rules again.`, "Lift"))) return;
  await send("DELETE", `/blocks/${each.id}`);
  announce("The block was lifted.");
  view.reload();
}
