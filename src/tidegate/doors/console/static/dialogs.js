// Forms and questions in native dialogs: the keyboard stays inside, Escape cancels.

import { ApiError, send } from "./api.js";
import { h, problem, table, fill, nextId } from "./dom.js";
import { difference } from "./diff.js";

/**
 * Show a form until it is saved or cancelled.
 * @param {string} title
 * @param content elements
 * @param {object} options action (text of the button), danger, save: async () => value; an error that it throws is shown
 * @returns {Promise<any>} what `save` returned; null if cancelled
 */
export function form(title, content, { action = "Save", danger = false, save }) {
  return new Promise((resolve) => {
    const errors = h("div", {});
    const id = `dialog-${nextId()}`;
    const submit = h(danger ? "button.danger" : "button.primary", { type: "submit" }, action);
    const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
    let result = null;
    const body = h(
      "form",
      {
        method: "dialog",
        novalidate: true,
        onsubmit: async (event) => {
          event.preventDefault();
          submit.disabled = true;
          try {
            result = await save();
            dialog.close();
          } catch (error) {
            fill(errors, problem(error));
          } finally {
            submit.disabled = false;
          }
        },
      },
      h("h2", { id }, title),
      content,
      errors,
      h("div.buttons", {}, submit, cancel),
    );
    const dialog = h("dialog", { "aria-labelledby": id, onclose: () => { dialog.remove(); resolve(result); } }, body);
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Ask before what cannot be undone; returns whether it was confirmed. */
export async function confirm(title, text, action) {
  return (await form(title, h("p", {}, text), { action, danger: true, save: async () => true })) === true;
}

/** Show a secret once, to be copied. */
export function secret(title, text, hint) {
  const output = h("input.secret", { readonly: true, value: text, "aria-label": title, spellcheck: "false" });
  const copy = h("button", { type: "button", onclick: async () => { output.select(); await navigator.clipboard?.writeText(text); copy.textContent = "Copied"; } }, "Copy");
  return form(title, [h("p", {}, hint), h("div.row", {}, output, copy)], { action: "Done", save: async () => true });
}

/**
 * Save a change of a resource that was read before. If another operator changed it meanwhile, show what changed, and ask whether
 * to save over it.
 * @param {object} options method, path, body, read: path of the resource, before: it as it was read
 */
export async function saveChange({ method, path, body, read, before }) {
  try {
    return (await send(method, path, { body, revision: before.revision })).data;
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 412) throw error;
  }
  const now = (await send("GET", read)).data;
  const changes = difference(withoutRevision(before), withoutRevision(now));
  const content = [
    h("p", {}, "Another operator changed it after you opened it:"),
    table("Changes by the other operator", ["field", "when you opened it", "now"], changes),
    h("p", {}, "Saving now replaces these values where yours differ."),
  ];
  const again = () => saveChange({ method, path, body, read, before: now });
  const saved = await form("Changed meanwhile", content, { action: "Save mine over it", danger: true, save: again });
  if (saved === null) throw new Error("Nothing was saved: the newer version was kept. Close this form and open it again.");
  return saved;
}

function withoutRevision({ revision, warnings, ...rest }) {
  return rest;
}
