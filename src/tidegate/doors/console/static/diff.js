// What differs between two states of a resource.

import { h } from "./dom.js";

/** Rows of a table: field, before, after; of what was made or deleted all fields. */
export function difference(before, after) {
  const names = [...new Set([...Object.keys(before ?? {}), ...Object.keys(after ?? {})])];
  return names
    .filter((name) => before === null || after === null || text(before[name]) !== text(after[name]))
    .map((name) => [
      name,
      before === null || before[name] === undefined ? "" : h("del", {}, text(before[name])),
      after === null || after[name] === undefined ? "" : h("ins", {}, text(after[name])),
    ]);
}

function text(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}
