// Whether the server responds, checked every second.

import { getModels, getText, ServerError, Unreachable } from "./api.js";

const INTERVAL_MS = 1000;
const WORDS = {
  connected: "Connected",
  gone: "Server not reachable, trying again",
  starting: "Server is loading the model, trying again",
  "key-needed": "The server requires an API key",
};

/** Watches the server. Calls onChange(state), onModels(models) and onMetrics(text). */
export class Connection {
  #state = "asking";
  #wake = () => {};

  constructor({ onChange, onModels, onMetrics }) {
    Object.assign(this, { onChange, onModels, onMetrics });
  }

  /** Watch; this never returns. */
  async follow() {
    for (;;) {
      this.#enter(await this.#look());
      await new Promise((resolve) => {
        this.#wake = resolve;
        setTimeout(resolve, INTERVAL_MS);
      });
    }
  }

  /** Check at once, not only after the second. */
  lookNow() {
    this.#wake();
  }

  async #look() {
    try {
      if (this.#state !== "connected") {
        await getText("health");
        this.onModels(await getModels());
      }
      this.onMetrics(await getText("metrics"));
      return "connected";
    } catch (error) {
      if (error.status === 401) return "key-needed";
      if (error.status === 503) return "starting";
      const isUsual = error instanceof ServerError || error instanceof Unreachable;
      // Perhaps another program answers at this address.
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
