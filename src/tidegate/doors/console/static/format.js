// Numbers, times and subjects as people read them.

import { h } from "./dom.js";

const count = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export function number(value) {
  return value === null || value === undefined ? "–" : count.format(value);
}

export function short(value) {
  return value === null || value === undefined ? "–" : compact.format(value);
}

export function share(part, whole) {
  return whole ? `${((part / whole) * 100).toFixed(part && part * 1000 < whole ? 2 : 1)} %` : "–";
}

/** A time of the server, in the reader's time zone. */
export function time(text) {
  if (!text) return "–";
  const at = new Date(text);
  return Number.isNaN(at.getTime()) ? text : at.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

/** How long it is until a time; kept up to date by `countDown`. */
export function countdown(until) {
  return h("span", { "data-until": until, title: time(until) }, remaining(until));
}

/** Show in each `countdown` what remains now. */
export function countDown() {
  for (const each of document.querySelectorAll("[data-until]")) each.textContent = remaining(each.dataset.until);
}

function remaining(until) {
  return duration(Math.max(0, (Date.parse(until) - Date.now()) / 1000));
}

/** A subject as the counters have it: what it is, and where the console shows it. */
export function subject(text) {
  const value = text.slice(2);
  if (text.startsWith("k:")) return { kind: "API key", text: value, path: "/callers", query: { key: value } };
  if (text.startsWith("i:")) return { kind: "address", text: value, path: "/callers", query: { ip: value.split("/")[0] } };
  if (text.startsWith("a:")) return { kind: "attributes", text: value, path: "/callers", query: { subject: value } };
  if (text.startsWith("t:")) return { kind: "tier", text: value, path: "/policy", query: { tier: value } };
  if (text.startsWith("c:")) return { kind: "customer", text: value, path: "/customers", query: { name: value } };
  return { kind: "", text, path: null, query: {} };
}

export const RANGES = {
  "15m": { text: "15 minutes", seconds: 900, step: 60 },
  "1h": { text: "1 hour", seconds: 3600, step: 60 },
  "24h": { text: "24 hours", seconds: 86400, step: 3600 },
  "7d": { text: "7 days", seconds: 604800, step: 3600 },
  "30d": { text: "30 days", seconds: 2592000, step: 86400 },
};

/** Start and end of a range that ends now, as the server reads times. */
export function span(range) {
  const now = Date.now();
  return { from: new Date(now - RANGES[range].seconds * 1000).toISOString(), to: new Date(now).toISOString() };
}
