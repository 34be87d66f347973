// The completion, and its buttons.

import { copyText } from "./copy.js";
import { Inspector } from "./inspector.js";
import { TokenText } from "./tokens.js";

/** The completion. onContinue(text) is called with a prompt to continue it. */
export class CompletionBox {
  #prompt = "";
  #hasLogprobs = false;
  #text = null;

  constructor(onContinue) {
    this.box = document.getElementById("completion");
    this.button = document.getElementById("continue");
    this.inspector = new Inspector(this.box, () => this.#nameButton());
    this.button.addEventListener("click", () => onContinue(this.#prompt + this.#upToChosen()));
    const copy = document.getElementById("copy");
    copy.addEventListener("click", () => copyText(this.box.textContent, copy));
  }

  /** Wait for the completion of `prompt`, with or without log probabilities. The last completion
   * stays until it comes. */
  begin(prompt, hasLogprobs) {
    this.next = { prompt, hasLogprobs };
    this.#text = null;
    this.box.setAttribute("aria-busy", "true");
    // Show heading, text and buttons, as far as there is room.
    this.box.closest("section").scrollIntoView({ block: "nearest" });
  }

  /** Add an event of the stream. */
  add({ choices }) {
    this.#text ??= this.#emptied();
    const isAtEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 4;
    for (const choice of choices) this.#text.add(choice);
    // Do not disturb a reader who has scrolled back.
    if (isAtEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  /** Note the end of the stream. */
  end() {
    this.box.setAttribute("aria-busy", "false");
  }

  #emptied() {
    this.#prompt = this.next.prompt;
    this.#hasLogprobs = this.next.hasLogprobs;
    this.box.replaceChildren();
    const text = this.#hasLogprobs ? new TokenText(this.box) : new PlainText(this.box);
    this.inspector.open(this.#hasLogprobs ? text : null);
    this.shown = text;
    return text;
  }

  #upToChosen() {
    const at = this.inspector.chosen;
    return at < 0 ? this.box.textContent : this.shown.textUpTo(at);
  }

  #nameButton() {
    const isChosen = this.inspector.chosen >= 0;
    this.button.textContent = isChosen ? "Continue after this token" : "Continue from the end";
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
