// The request of a form, one at a time: its buttons, progress and errors.

import { Broken, ServerError, Unreachable } from "./api.js";

const REASONS = {
  stop: "end of text or a stop string",
  length: "limit of tokens reached",
};

/** Elements of a form. onTrouble(error) is called with errors that may come from the connection. */
export class Run {
  #controller = null;

  constructor({ field, go, stop, progress, error, onTrouble }) {
    Object.assign(this, { field, go, stop, progress, error, onTrouble });
    stop.addEventListener("click", () => this.abort());
  }

  get isRunning() {
    return this.#controller !== null;
  }

  /** Stop the request, if there is one. */
  abort() {
    this.#controller?.abort();
  }

  /** Pass each event of `ask(signal)` to `onEvent`. */
  async follow(ask, onEvent) {
    this.showError("");
    this.#set(new AbortController());
    this.progress.textContent = "Generating …";
    const started = performance.now();
    let ending = "Ended by an error";
    let finishReason = null;
    let usage = null;
    try {
      for await (const event of ask(this.#controller.signal)) {
        onEvent(event);
        finishReason = event.choices[0]?.finish_reason ?? finishReason;
        usage = event.usage ?? usage;
      }
      ending = inWords(usage, performance.now() - started, finishReason);
    } catch (error) {
      ending = this.#explain(error);
    } finally {
      this.progress.textContent = ending;
      this.#set(null);
    }
  }

  /** Show an error at the field, or none if it is "". */
  showError(message) {
    this.error.textContent = message;
    this.field.toggleAttribute("aria-invalid", message !== "");
  }

  // Return how it ended. Errors, unlike a stop by the user, are shown at the field too.
  #explain(error) {
    if (error.name === "AbortError") return "Stopped";
    this.onTrouble(error);
    if (error instanceof Broken) {
      this.showError("The connection broke.");
      return "Interrupted; the text so far is kept";
    }
    if (error instanceof Unreachable) {
      this.showError("The server cannot be reached.");
      return "Not started";
    }
    if (!(error instanceof ServerError)) throw error;
    this.showError(error.message);
    return "Ended by an error";
  }

  // Not `disabled`, which would take the focus away.
  #set(controller) {
    this.#controller = controller;
    this.progress.toggleAttribute("data-busy", this.isRunning);
    this.go.setAttribute("aria-disabled", String(this.isRunning));
    this.stop.setAttribute("aria-disabled", String(!this.isRunning));
  }
}

function inWords(usage, milliseconds, finishReason) {
  const count = usage?.completion_tokens ?? 0;
  const tokens = `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
  const remembered = cached > 0 ? `, ${cached.toLocaleString("en")} of the prompt remembered` : "";
  const reason = REASONS[finishReason] ?? "ended";
  return `Done: ${tokens} in ${(milliseconds / 1000).toFixed(1)} s (${reason}${remembered})`;
}
