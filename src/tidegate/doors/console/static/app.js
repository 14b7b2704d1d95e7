// The frame of the console: sign-in, navigation, and the view of the address.

import * as api from "./api.js";
import { announce, empty, field, fill, h, link, problem } from "./dom.js";
import { countDown } from "./format.js";
import { Live } from "./live.js";
import audit from "./pages/audit.js";
import callers from "./pages/callers.js";
import customers from "./pages/customers.js";
import overview from "./pages/overview.js";
import policy from "./pages/policy.js";
import system from "./pages/system.js";
import violations from "./pages/violations.js";

const VIEWS = {
  "/": ["Overview", overview],
  "/callers": ["Callers", callers],
  "/customers": ["Customers", customers],
  "/policy": ["Policy", policy],
  "/violations": ["Violations", violations],
  "/audit": ["Audit", audit],
  "/system": ["System", system],
};
const RETRY_MS = 3000;
const app = document.getElementById("app");

let session = null;
let leaving = new AbortController();
let main = null;
let navigation = null;

api.whenSignedOut(() => {
  if (session === null) return;
  session = null;
  showSignIn("The session is over. Sign in again.");
});

async function start() {
  try {
    let found = await api.session();
    if (found.name === null && found.demo) found = await api.signIn({ demo: true });
    if (found.name === null) {
      showSignIn(null);
      return;
    }
    session = found;
  } catch (error) {
    if (error.code === "BAD_REQUEST") showSignIn("From another machine, sign in with the token that the server printed.");
    else fill(app, h("main", {}, h("h1", {}, "Tidegate"), problem(error)));
    return;
  }
  showFrame();
}

function showSignIn(message) {
  leaving.abort();
  const token = h("input", { type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const errors = h("div", {}, message === null ? null : h("div.note", { role: "status" }, message));
  const button = h("button.primary", { type: "submit" }, "Sign in");
  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    try {
      session = await api.signIn({ token: token.value });
      token.value = "";
      showFrame();
    } catch (error) {
      fill(errors, problem(error));
      token.focus();
    } finally {
      button.disabled = false;
    }
  }
  document.title = "Sign in · Tidegate";
  fill(
    app,
    h(
      "main.sign-in",
      {},
      h("h1", {}, "Tidegate"),
      h(
        "form",
        { onsubmit: submit, novalidate: true },
        field(
          "Token of an operator or a viewer",
          token,
          "The first start of the server printed one; POST /admin/v1/tokens makes more. It is not kept in this browser.",
        ),
        errors,
        button,
      ),
    ),
  );
  token.focus();
}

function showFrame() {
  navigation = h("nav", { "aria-label": "Views" });
  main = h("main", { id: "main", tabindex: "-1" });
  const role = session.role === "operator" ? "" : " (viewer: reads only)";
  const leave = h(
    "button",
    {
      type: "button",
      onclick: async () => {
        try {
          await api.signOut();
        } catch (error) {
          announce(error.message);
          return;
        }
        session = null;
        showSignIn("Signed out.");
      },
    },
    "Sign out",
  );
  fill(
    app,
    h("a.skip", { href: "#main" }, "Skip to the content"),
    h("header", {}, h("strong.brand", {}, "Tidegate"), navigation, h("div.who", {}, h("span", {}, session.name + role), leave)),
    main,
  );
  show();
}

function go(path, { replace = false } = {}) {
  window.history[replace ? "replaceState" : "pushState"](null, "", path);
  show({ focus: !replace });
}

async function show({ focus = false } = {}) {
  leaving.abort();
  leaving = new AbortController();
  const signal = leaving.signal;
  const [title, view] = VIEWS[window.location.pathname] ?? VIEWS["/"];
  document.title = `${title} · Tidegate`;
  const links = Object.entries(VIEWS).map(([path, [name]]) => {
    const made = link(path, {}, name);
    if (name === title) made.setAttribute("aria-current", "page");
    return made;
  });
  fill(navigation, links);
  const content = h("div", {});
  const heading = h("h1", { tabindex: "-1" }, title);
  const note = h("div", {});
  let noted = "";
  const live = new Live(signal, (errors) => {
    const text = errors.map((error) => error.message).join();
    if (text !== noted) fill(note, outdated(errors));
    noted = text;
  });
  fill(main, heading, note, content);
  if (focus) heading.focus();
  const context = {
    session,
    signal,
    operator: session.role === "operator",
    parameters: Object.fromEntries(new URLSearchParams(window.location.search)),
    go,
    reload: () => show(),
    /** Change parameters of the address; the view is shown again. */
    set(changes, options = { replace: true }) {
      const query = new URLSearchParams(window.location.search);
      for (const [name, value] of Object.entries(changes)) {
        if (value === null || value === "") query.delete(name);
        else query.set(name, value);
      }
      const text = query.toString();
      go(window.location.pathname + (text ? `?${text}` : ""), options);
    },
    /** Run an action now and whenever what it reads changes, while the view is shown and visible; see Live.add. */
    live: (milliseconds, action) => live.add(milliseconds, action),
    /** As `live`, until the action returns true; see Live.until. */
    until: (milliseconds, action) => live.until(milliseconds, action),
  };
  fill(content, h("p.muted", {}, "Loading…"));
  main.setAttribute("aria-busy", "true");
  try {
    await view(content, context);
  } catch (error) {
    if (signal.aborted) return;
    fill(content, failure(error));
    if (error.status === 503 || error.status === 0) setTimeout(() => signal.aborted || show(), RETRY_MS);
  }
  if (!signal.aborted) main.removeAttribute("aria-busy");
}

/** What is not up to date, and why; nothing if everything is. */
function outdated(errors) {
  const messages = [...new Set(errors.map((error) => error.message))];
  if (messages.length === 0) return null;
  const hint = errors.some((error) => error.status === 503) ? ["Checks go on with what is cached. See ", link("/system", {}, "System"), "."] : null;
  return h("div.problem", { role: "alert" }, h("p", {}, "Not up to date: ", messages.join(" ")), hint ? h("p", {}, hint) : null);
}

function failure(error) {
  if (error.status === 503) {
    return [problem(error), empty("Nothing can be read from the database now.", "Checks go on with what is cached. See ", link("/system", {}, "System"), ".")];
  }
  return [problem(error)];
}

document.addEventListener("click", (event) => {
  const found = event.target instanceof Element ? event.target.closest("a[data-view]") : null;
  if (found === null || event.defaultPrevented || event.button !== 0 || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(found.getAttribute("href"));
});
window.addEventListener("popstate", () => {
  if (session !== null) show();
});
setInterval(countDown, 1000);
start();
