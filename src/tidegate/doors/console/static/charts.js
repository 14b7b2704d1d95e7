// Lines over time, drawn by uPlot (vendor/), with their sum as text for those who do not see them.

import { h } from "./dom.js";

const SERIES = {
  allowed: { label: "allowed", color: "--allowed" },
  blocked: { label: "blocked", color: "--blocked" },
  over: { label: "over", color: "--over" },
  p50: { label: "p50 ms", color: "--allowed" },
  p90: { label: "p90 ms", color: "--over" },
  p99: { label: "p99 ms", color: "--blocked" },
};

/**
 * A chart.
 * @param {string} title
 * @param {string} summary the same in words
 * @param {number[]} times unix seconds, ascending
 * @param {Record<string, Array<number|null>>} lines values by name of SERIES
 */
export function chart(title, summary, times, lines) {
  const box = h("div.chart", { role: "img", "aria-label": `${title}: ${summary}` });
  const legend = h("p.legend", { "aria-hidden": "true" }, Object.keys(lines).map((name) => h(`span.mark.${name}`, {}, SERIES[name].label)));
  const figure = h("figure", {}, h("figcaption", {}, title), legend, box);
  const observer = new ResizeObserver(() => {
    if (!box.isConnected) return observer.disconnect();
    if (box.clientWidth > 0) draw(box, times, lines);
    return undefined;
  });
  observer.observe(box);
  return figure;
}

function draw(box, times, lines) {
  const width = box.clientWidth;
  if (box.dataset.width === String(width)) return;
  box.dataset.width = String(width);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 } };
  const names = Object.keys(lines);
  const options = {
    width,
    height: 180,
    legend: { show: false },
    cursor: { y: false },
    scales: { y: { range: (_, low, high) => [0, Math.max(high || 0, 1) * 1.05] } },
    axes: [axis, { ...axis, size: 56 }],
    series: [{}, ...names.map((name) => ({ label: SERIES[name].label, stroke: color(SERIES[name].color), width: 2, points: { show: times.length < 3 } }))],
  };
  box.replaceChildren();
  new window.uPlot(options, [times, ...names.map((name) => lines[name])], box);
}

/** The items whose step is over: the current one would look like a drop. All, if there is no other. */
export function finished(items, seconds) {
  const over = items.filter((item) => Date.parse(item.at) + seconds * 1000 <= Date.now());
  return over.length ? over : items;
}

/** Sum items of the traffic history by time. */
export function byTime(items) {
  const sums = new Map();
  for (const item of items) {
    const at = Date.parse(item.at) / 1000;
    const sum = sums.get(at) ?? { allowed: 0, blocked: 0, over: 0 };
    for (const name of ["allowed", "blocked", "over"]) sum[name] += item[name] ?? 0;
    sums.set(at, sum);
  }
  const times = [...sums.keys()].sort((one, other) => one - other);
  const line = (name) => times.map((at) => sums.get(at)[name]);
  return { times, allowed: line("allowed"), blocked: line("blocked"), over: line("over") };
}
