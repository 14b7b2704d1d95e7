// The console's only way to the server: /admin/v1. The session is in a cookie that scripts cannot read; changes carry its
// CSRF token, which is kept in memory alone.

const PREFIX = "/admin/v1";
const TIMEOUT_MS = 20_000;

let csrfToken = null;
let onSignedOut = () => {};

export class ApiError extends Error {
  constructor(status, code, message, details) {
    super(message);
    this.status = status;
    this.code = code;
    this.details = details;
  }
}

/** Set what happens when the session is over. */
export function whenSignedOut(action) {
  onSignedOut = action;
}

/**
 * Send a request.
 * @param {string} method
 * @param {string} path below /admin/v1
 * @param {object} options query, body (JSON), text (with its type), revision (If-Match), poll: no person caused it, signal
 * @returns {Promise<{data: any, revision: string|null}>}
 */
export async function send(method, path, { query, body, text, revision, poll, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (csrfToken !== null) headers["X-CSRF-Token"] = csrfToken;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (text !== undefined) headers["Content-Type"] = text.type;
  if (revision !== undefined) headers["If-Match"] = revision === "*" ? "*" : `"${revision}"`;
  if (poll) headers["X-Tidegate-Poll"] = "1";
  const deadline = AbortSignal.timeout(TIMEOUT_MS);
  let answer;
  try {
    answer = await fetch(PREFIX + path + encoded(query), {
      method,
      headers,
      body: body !== undefined ? JSON.stringify(body) : text?.content,
      credentials: "same-origin",
      cache: "no-store",
      signal: signal ? AbortSignal.any([signal, deadline]) : deadline,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "NO_ANSWER", "The server does not answer: check that it runs, and try again.", {});
  }
  // Exactly: exports are application/jsonl.
  const type = (answer.headers.get("Content-Type") ?? "").split(";")[0].trim();
  const data = answer.status === 204 ? null : type === "application/json" ? await answer.json() : await answer.text();
  if (!answer.ok) {
    const error = data?.error ?? { code: "UNKNOWN", message: `The server answered ${answer.status}.`, details: {} };
    if (answer.status === 401 && path !== "/session") onSignedOut();
    throw new ApiError(answer.status, error.code, error.message, error.details);
  }
  return { data, revision: answer.headers.get("ETag")?.replaceAll('"', "") ?? null };
}

export async function get(path, query = {}, { read, ...options } = {}) {
  const load = async () => (await send("GET", path, { ...options, query })).data;
  return read === undefined ? load() : read(path + encoded(query), load);
}

/** The address of a path below /admin/v1. */
export function addressOf(path, parameters) {
  return `${PREFIX}${path}?${new URLSearchParams(parameters)}`;
}

/** Report that the session is over. */
export function sessionIsOver() {
  onSignedOut();
}

/** All items of a list that has pages, up to a bound; of `query.after` those that follow it. */
export async function all(path, query = {}, options = {}, most = 2000) {
  const items = [];
  let after = query.after ?? null;
  do {
    const page = await get(path, { limit: 500, ...query, after }, options);
    items.push(...page.items);
    after = page.next;
  } while (after !== null && items.length < most);
  return { items, more: after !== null };
}

/** Who is signed in; its name is null if nobody is. `demo`: this server signs in browsers on its own machine. */
export async function session() {
  return remember(await get("/session"));
}

export async function signIn(credentials) {
  csrfToken = null;
  return remember((await send("POST", "/session", { body: credentials })).data);
}

export async function signOut() {
  await send("DELETE", "/session");
  csrfToken = null;
}

function remember(found) {
  csrfToken = found.csrf_token;
  return found;
}

function encoded(query = {}) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") parameters.set(name, value);
  }
  const text = parameters.toString();
  return text ? `?${text}` : "";
}
