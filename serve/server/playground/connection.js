// Whether the server is there. Asked every second; when it goes away, until it is back.

import { getModel, getText, ServerError, Unreachable } from "./api.js";

const INTERVAL_MS = 1000;
const WORDS = {
  connected: "Connected",
  gone: "Server gone, trying again",
  starting: "Server is there, but no engine is ready: trying again",
  "key-needed": "The server asks for an API key",
};

/** Follows the server. onChange(state), onModel(model) and onMetrics(text) say what it learns. */
export class Connection {
  #state = "asking";
  #wake = () => {};

  constructor({ onChange, onModel, onMetrics }) {
    Object.assign(this, { onChange, onModel, onMetrics });
  }

  /** Never ends. */
  async follow() {
    for (;;) {
      this.#enter(await this.#look());
      await new Promise((resolve) => {
        this.#wake = resolve;
        setTimeout(resolve, INTERVAL_MS);
      });
    }
  }

  /** Look now, not only when the second is over. */
  lookNow() {
    this.#wake();
  }

  async #look() {
    try {
      if (this.#state !== "connected") {
        await getText("health");
        this.onModel(await getModel());
      }
      this.onMetrics(await getText("metrics"));
      return "connected";
    } catch (error) {
      if (error.status === 401) return "key-needed";
      if (error.status === 503) return "starting";
      const isUsual = error instanceof ServerError || error instanceof Unreachable;
      // Something that is no stu-serve answers in its place, perhaps.
      if (!isUsual) console.error(error);
      return "gone";
    }
  }

  #enter(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.onChange(state, WORDS[state]);
  }
}
