// One request of a form at a time: its buttons, how far it is, and its errors in words.

import { Broken, ServerError, Unreachable } from "./api.js";

const REASONS = {
  stop: "the model ended the text, or a stop string came",
  length: "as many tokens as allowed",
};

/** The parts of a form. onTrouble(error) hears of an error that may be the connection's. */
export class Run {
  #controller = null;

  constructor({ field, go, stop, progress, error, onTrouble }) {
    Object.assign(this, { field, go, stop, progress, error, onTrouble });
    stop.addEventListener("click", () => this.abort());
  }

  get isRunning() {
    return this.#controller !== null;
  }

  /** End what is running, if anything is. */
  abort() {
    this.#controller?.abort();
  }

  /** Follow the events of `ask(signal)`, each of which goes to `onEvent`. */
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

  /** Show an error at the field; "": none. */
  showError(message) {
    this.error.textContent = message;
    this.field.toggleAttribute("aria-invalid", message !== "");
  }

  // How it ended; an error that is no wish of the user's is shown at the field too.
  #explain(error) {
    if (error.name === "AbortError") return "Stopped";
    this.onTrouble(error);
    if (error instanceof Broken) {
      this.showError("The connection broke.");
      return "Broken off; the text so far is kept";
    }
    if (error instanceof Unreachable) {
      this.showError("The server cannot be reached.");
      return "Not begun";
    }
    if (!(error instanceof ServerError)) throw error;
    this.showError(error.message);
    return "Ended by an error";
  }

  // Buttons that nothing can be done with keep the focus, which `disabled` would take away.
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
  const reason = REASONS[finishReason] ?? "ended";
  return `Done: ${tokens} in ${(milliseconds / 1000).toFixed(1)} s (${reason})`;
}
