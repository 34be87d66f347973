// Details of a token that is chosen by pointer or keyboard, with the alternatives.

import { percent, quoted } from "./tokens.js";

const MOVES = {
  ArrowLeft: (at) => at - 1,
  ArrowRight: (at) => at + 1,
  Home: () => 0,
  End: (_, length) => length - 1,
};

/** Shows tokens of a TokenText. onChoose() is called when another token, or none, is chosen. */
export class Inspector {
  #text = null;
  #chosen = -1;

  constructor(box, onChoose) {
    this.onChoose = onChoose;
    this.panel = document.getElementById("inspector");
    this.line = document.getElementById("token-line");
    this.table = document.getElementById("alternatives");
    document.getElementById("previous-token").addEventListener("click", () => this.#move(-1));
    document.getElementById("next-token").addEventListener("click", () => this.#move(1));
    box.addEventListener("click", (event) => {
      const at = this.#text?.indexOf(event.target) ?? -1;
      if (at >= 0) this.#choose(at);
    });
    box.addEventListener("keydown", (event) => {
      const move = MOVES[event.key];
      if (!move || !this.#text?.length || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      this.#choose(move(this.#chosen, this.#text.length));
    });
  }

  /** Number of the chosen token, or -1. */
  get chosen() {
    return this.#chosen;
  }

  /** Show a TokenText, or null for a completion without probabilities. */
  open(text) {
    this.#text = text;
    this.#chosen = -1;
    this.panel.hidden = text === null;
    this.table.hidden = true;
    this.line.textContent = "Choose a token, or use the arrow keys in the text, for details";
    this.onChoose();
  }

  #move(by) {
    if (this.#text?.length) this.#choose(this.#chosen + by);
  }

  #choose(wanted) {
    const at = Math.min(Math.max(wanted, 0), this.#text.length - 1);
    this.#text.token(this.#chosen)?.span.removeAttribute("data-chosen");
    this.#chosen = at;
    const { name, probability, alternatives, span } = this.#text.token(at);
    span.setAttribute("data-chosen", "");
    span.scrollIntoView({ block: "nearest" });
    this.onChoose();
    const place = `Token ${at + 1} of ${this.#text.length}`;
    this.line.textContent = `${place}: ${quoted(name)}, ${percent(probability)}`;
    this.table.hidden = false;
    this.table.tBodies[0].replaceChildren(
      ...alternatives.map((other) =>
        row(quoted(other.name), percent(other.probability), other.name === name ? "chosen" : ""),
      ),
    );
  }
}

function row(...texts) {
  const line = document.createElement("tr");
  for (const text of texts) line.insertCell().textContent = text;
  return line;
}
