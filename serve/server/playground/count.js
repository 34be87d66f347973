// How many tokens a request would have, a moment after somebody has typed.

import { countTokens } from "./api.js";

const PAUSE_MS = 300;

/** Counts the tokens of `textOf()` when `field` changes. inWords(count) is what is shown. */
export class Count {
  #timer = 0;
  #controller = new AbortController();

  constructor(field, textOf, inWords) {
    Object.assign(this, { textOf, inWords });
    this.line = document.getElementById(`${field.id}-count`);
    field.addEventListener("input", () => this.update());
  }

  /** Count, unless it is asked again before long. */
  update() {
    clearTimeout(this.#timer);
    this.#controller.abort();
    this.#timer = setTimeout(() => this.#show(), PAUSE_MS);
  }

  async #show() {
    this.#controller = new AbortController();
    const { signal } = this.#controller;
    try {
      const count = await countTokens(this.textOf(), signal);
      if (!signal.aborted) this.line.textContent = this.inWords(count);
    } catch {
      // Whatever is wrong with the server, the request itself will tell.
      if (!signal.aborted) this.line.textContent = "";
    }
  }
}
