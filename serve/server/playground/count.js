// Number of tokens of a request, counted shortly after the user has typed.

import { countTokens } from "./api.js";

const PAUSE_MS = 300;

/** Counts the tokens of `bodyOf().prompt` when `field` changes, and shows inWords(count). */
export class Count {
  #timer = 0;
  #controller = new AbortController();

  constructor(field, bodyOf, inWords) {
    Object.assign(this, { bodyOf, inWords });
    this.line = document.getElementById(`${field.id}-count`);
    field.addEventListener("input", () => this.update());
  }

  /** Count after a pause without another call. */
  update() {
    clearTimeout(this.#timer);
    this.#controller.abort();
    this.#timer = setTimeout(() => this.#show(), PAUSE_MS);
  }

  async #show() {
    this.#controller = new AbortController();
    const { signal } = this.#controller;
    try {
      const count = await countTokens(this.bodyOf(), signal);
      if (!signal.aborted) this.line.textContent = this.inWords(count);
    } catch {
      // The request itself will show the error.
      if (!signal.aborted) this.line.textContent = "";
    }
  }
}
