// The text that comes, in its box, and in words how far it is.

import { Inspector } from "./inspector.js";
import { TokenText } from "./tokens.js";

const REASONS = {
  stop: "the model ended the text, or a stop string came",
  length: "as many tokens as allowed",
};

/** The box of the completion. */
export class CompletionBox {
  #hasLogprobs = false;
  #text = null;
  #finishReason = null;
  #usage = null;
  #started = 0;

  constructor() {
    this.box = document.getElementById("completion");
    this.progress = document.getElementById("progress");
    this.inspector = new Inspector(this.box);
  }

  /** Wait for a completion with log probabilities, or without. The last one stays till it comes. */
  begin(hasLogprobs) {
    this.#hasLogprobs = hasLogprobs;
    this.#text = this.#finishReason = this.#usage = null;
    this.#started = performance.now();
    this.box.setAttribute("aria-busy", "true");
    this.progress.textContent = "Generating …";
  }

  /** An event of the stream. */
  add({ choices, usage }) {
    this.#text ??= this.#emptied();
    const isAtEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 4;
    for (const choice of choices) {
      this.#text.add(choice);
      this.#finishReason = choice.finish_reason ?? this.#finishReason;
    }
    this.#usage = usage ?? this.#usage;
    // Whoever has scrolled back reads on undisturbed.
    if (isAtEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  /** problem: why it ended early, in words. */
  end(problem = null) {
    this.box.setAttribute("aria-busy", "false");
    this.progress.textContent = problem ?? this.#inWords();
  }

  #emptied() {
    this.box.replaceChildren();
    const text = this.#hasLogprobs ? new TokenText(this.box) : new PlainText(this.box);
    this.inspector.open(this.#hasLogprobs ? text : null);
    return text;
  }

  #inWords() {
    const seconds = ((performance.now() - this.#started) / 1000).toFixed(1);
    const count = this.#usage?.completion_tokens ?? 0;
    const tokens = `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;
    return `Done: ${tokens} in ${seconds} s (${REASONS[this.#finishReason] ?? "ended"})`;
  }
}

class PlainText {
  constructor(box) {
    this.node = document.createTextNode("");
    box.append(this.node);
  }

  add({ text }) {
    this.node.appendData(text);
  }
}
