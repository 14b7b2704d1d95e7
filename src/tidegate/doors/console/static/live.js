// What a view shows, kept up to date: by a stream of the server; by polling while there is none.

import { ApiError, addressOf, sessionIsOver } from "./api.js";

const MAX_PATHS = 8;
const SILENCE_MS = 40_000; // the server sends something every 15 s
const RETRY_MS = 30_000;
const STREAMED = /^\/(system|usage|explain|tiers|rate-limit-rules|blocks|audit-log|violations|traffic|violations\/top|traffic\/callers|(api-keys|customers|what-if)(\/[\w.-]{1,64})?)(\?|$)/;
const TIMED = /[?&](from|since|to|until)=/;

export class Live {
  /**
   * @param {AbortSignal} signal ends it
   * @param {(errors: Error[]) => void} report called after each run with the errors of the last run of each action
   */
  constructor(signal, report) {
    this.signal = signal;
    this.report = report;
    this.watchers = [];
    this.answers = new Map(); // what the stream sent, by path
    this.loaded = new Map(); // what was read without it
    this.source = null;
    this.isOpen = false;
    this.paths = "";
    this.opening = null;
    this.retryAt = 0;
    const visibility = () => this.#visibilityChanged();
    document.addEventListener("visibilitychange", visibility);
    const silence = setInterval(() => this.#checkSilence(), 5000);
    signal.addEventListener("abort", () => {
      document.removeEventListener("visibilitychange", visibility);
      clearInterval(silence);
      clearTimeout(this.opening);
      this.#close();
      for (const watcher of this.watchers) clearTimeout(watcher.timer);
    });
  }

  /**
   * Run an action now, and whenever what it reads has changed.
   * @param {number} milliseconds between two runs where the server cannot stream what it reads
   * @param {(options: object) => Promise<void>} action reads with `get(path, query, options)`
   */
  async add(milliseconds, action) {
    await this.#run(this.#watch(milliseconds, action), true);
  }

  /**
   * As `add`, until the action returns true; fails when the view is left before.
   * @param {number} milliseconds see `add`
   * @param {(options: object) => Promise<boolean>} action see `add`
   */
  async until(milliseconds, action) {
    await new Promise((resolve, reject) => {
      this.signal.addEventListener("abort", () => reject(this.signal.reason));
      const watcher = this.#watch(milliseconds, async (options) => {
        if (!(await action(options))) return;
        this.watchers = this.watchers.filter((each) => each !== watcher);
        watcher.done = true;
        resolve();
      });
      this.#run(watcher, true);
    });
  }

  #watch(milliseconds, action) {
    const watcher = { milliseconds, action, paths: new Set(), running: false, again: false, done: false, timer: null, error: null };
    this.watchers.push(watcher);
    return watcher;
  }

  async #run(watcher, isFirst = false) {
    clearTimeout(watcher.timer);
    if (this.signal.aborted || watcher.done) return;
    if (watcher.running) {
      watcher.again = true;
      return;
    }
    watcher.running = true;
    const read = new Set();
    try {
      await watcher.action({ signal: this.signal, poll: !isFirst, read: (path, load) => this.#read(path, load, read) });
      watcher.error = null;
    } catch (error) {
      if (this.signal.aborted) return;
      watcher.error = error;
    } finally {
      watcher.running = false;
      if (read.size) watcher.paths = read;
      if (!this.signal.aborted) {
        this.report(this.watchers.map((each) => each.error).filter((error) => error !== null));
        this.#openSoon();
        if (watcher.again) {
          watcher.again = false;
          this.#run(watcher);
        } else if (!watcher.done) {
          watcher.timer = setTimeout(() => this.#poll(watcher), watcher.milliseconds);
        }
      }
    }
  }

  #poll(watcher) {
    if (document.hidden || (this.isOpen && [...watcher.paths].every((path) => this.answers.has(path)))) {
      watcher.timer = setTimeout(() => this.#poll(watcher), watcher.milliseconds);
    } else {
      this.#run(watcher);
    }
  }

  async #read(path, load, read) {
    read.add(path);
    const answer = this.isOpen ? this.answers.get(path) : undefined;
    if (answer === undefined || (answer.body === null && answer.status === 200)) {
      const loaded = await load();
      this.loaded.set(path, JSON.stringify(loaded));
      return loaded;
    }
    if (answer.status === 200) return answer.body;
    const error = answer.body?.error ?? { code: "UNKNOWN", message: `The server answered ${answer.status}.`, details: {} };
    throw new ApiError(answer.status, error.code, error.message, error.details);
  }

  #openSoon() {
    clearTimeout(this.opening);
    this.opening = setTimeout(() => this.#open(), 100);
  }

  #open() {
    if (this.signal.aborted || document.hidden) return;
    const wanted = new Set(this.watchers.flatMap((watcher) => [...watcher.paths]));
    const paths = [...wanted].filter((path) => STREAMED.test(path) && !TIMED.test(path)).slice(0, MAX_PATHS).sort();
    const key = paths.join("\n");
    if (paths.length === 0 || (key === this.paths && this.source !== null) || Date.now() < this.retryAt) return;
    this.#close();
    this.paths = key;
    const source = new EventSource(addressOf("/live", paths.map((path) => ["path", path])));
    this.source = source;
    this.heardAt = Date.now();
    source.addEventListener("open", () => {
      this.isOpen = true;
      this.heardAt = Date.now();
    });
    source.addEventListener("message", (event) => this.#received(JSON.parse(event.data)));
    source.addEventListener("heartbeat", () => {
      this.heardAt = Date.now();
    });
    source.addEventListener("end", () => {
      this.#close();
      sessionIsOver();
    });
    source.addEventListener("error", () => {
      this.isOpen = false;
      this.answers.clear();
      // Refused, not interrupted: the browser does not try again.
      if (source.readyState === EventSource.CLOSED) this.#retryLater();
      for (const watcher of this.watchers) this.#run(watcher);
    });
  }

  #received({ path, status, body }) {
    this.heardAt = Date.now();
    const isFirst = !this.answers.has(path);
    this.answers.set(path, { status, body });
    // The first report follows what was just read. Of a large answer the server only reports that it changed.
    if (isFirst && status === 200 && (body === null || JSON.stringify(body) === this.loaded.get(path))) return;
    for (const watcher of this.watchers) if (watcher.paths.has(path)) this.#run(watcher);
  }

  #checkSilence() {
    if (this.source === null) {
      if (!document.hidden) this.#open();
    } else if (this.isOpen && Date.now() - this.heardAt > SILENCE_MS) {
      this.#retryLater();
    }
  }

  #retryLater() {
    this.#close();
    this.retryAt = Date.now() + RETRY_MS;
  }

  #visibilityChanged() {
    if (document.hidden) {
      this.#close();
      return;
    }
    for (const watcher of this.watchers) this.#run(watcher);
  }

  #close() {
    this.source?.close();
    this.source = null;
    this.isOpen = false;
    this.answers.clear();
  }
}
