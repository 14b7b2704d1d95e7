// Elements from data. Every text becomes a text node: nothing that a client or an operator wrote is read as markup.

/**
 * Make an element.
 * @param {string} tag name, with classes after dots: "p.note"
 * @param {object} properties attributes; functions whose name begins with "on" are event listeners
 * @param children elements, texts, numbers, arrays of them; null and false are left out
 */
export function h(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on") && typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked" || key === "selected") element[key] = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(element, child);
    else element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Replace the content of an element. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/** As `fill`, for content that is shown again with newer data: the focus and the place of scrolled tables stay. */
export function refill(element, ...children) {
  const focused = element.contains(document.activeElement) ? nameOf(document.activeElement) : null;
  const places = [...element.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  fill(element, ...children);
  [...element.querySelectorAll(".scroll")].forEach((each, index) => {
    each.scrollLeft = places[index] ?? 0;
  });
  if (focused !== null) [...element.querySelectorAll("a, button, input, select, .scroll")].find((each) => nameOf(each) === focused)?.focus();
  return element;
}

function nameOf(element) {
  return [element.tagName, element.getAttribute("href"), element.getAttribute("aria-label") ?? element.textContent].join("\n");
}

/**
 * A table. On small screens it scrolls sideways inside its own box.
 * @param {string} label what it lists, for screen readers
 * @param {string[]} columns headings; "#name" aligns numbers to the right
 * @param {Array<Array>} rows cells: texts or elements
 */
export function table(label, columns, rows) {
  const heads = columns.map((column) => h(isNumber(column) ? "th.number" : "th", { scope: "col" }, column.replace(/^#/, "")));
  return h(
    "div.scroll",
    { role: "region", "aria-label": label, tabindex: "0" },
    h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, tableRows(columns, rows))),
  );
}

/** Rows for the body of a table with these columns. */
export function tableRows(columns, rows) {
  return rows.map((row) => h("tr", {}, row.map((cell, place) => h(isNumber(columns[place]) ? "td.number" : "td", {}, cell))));
}

function isNumber(column) {
  return column.startsWith("#");
}

/** A labelled field. */
export function field(label, control, hint = null) {
  const id = control.id || `field-${nextId()}`;
  control.id = id;
  const hintId = hint === null ? null : `${id}-hint`;
  if (hintId !== null) control.setAttribute("aria-describedby", hintId);
  return h("div.field", {}, h("label", { for: id }, label), control, hint === null ? null : h("p.hint", { id: hintId }, hint));
}

export function select(options, chosen, properties = {}) {
  const made = options.map((option) => {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    return h("option", { value, selected: value === chosen }, text);
  });
  return h("select", properties, made);
}

/** What a page shows where it has nothing to list, and what to do next. */
export function empty(title, ...next) {
  return h("div.empty", {}, h("p", {}, h("strong", {}, title)), next.length ? h("p", {}, next) : null);
}

/** An error as a box that screen readers announce. */
export function problem(error) {
  return h("div.problem", { role: "alert" }, error.message);
}

/** Say a short text to screen readers, and show it for some seconds. */
export function announce(text) {
  document.getElementById("status").textContent = text;
  const shown = h("div.toast", { "aria-hidden": "true" }, text);
  document.body.append(shown);
  setTimeout(() => shown.remove(), 4000);
}

/** A link inside the console. */
export function link(path, parameters, ...children) {
  return h("a", { href: href(path, parameters), "data-view": true }, children);
}

export function href(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

let ids = 0;

export function nextId() {
  ids += 1;
  return ids;
}
