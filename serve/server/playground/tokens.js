// Tokens as spans that tell how probable they were.

// A token's rank: 0 if it was more probable than the first of these, 4 if less than all.
const RANKS = [0.9, 0.5, 0.1, 0.01];

/** A completion with log probabilities, in `box`. */
export class TokenText {
  #chars = [];
  #tokens = [];
  #numSettled = 0;

  constructor(box) {
    this.box = box;
  }

  get length() {
    return this.#tokens.length;
  }

  /** Token `at`: its name, probability, alternatives and span. */
  token(at) {
    return this.#tokens[at];
  }

  /** Which token a span shows; -1: none. */
  indexOf(span) {
    return this.#tokens.findIndex((token) => token.span === span);
  }

  /** The text up to the end of token `at`. */
  textUpTo(at) {
    return this.#chars.slice(0, this.#tokens[at + 1]?.offset).join("");
  }

  /** The next piece of the completion. */
  add({ text, logprobs }) {
    // Offsets count characters, not the halves of them that strings have.
    this.#chars.push(...text);
    logprobs.tokens.forEach((name, at) => {
      const token = makeToken(
        name,
        logprobs.token_logprobs[at],
        logprobs.top_logprobs[at],
        logprobs.text_offset[at],
      );
      this.#tokens.push(token);
      this.box.append(token.span);
    });
    this.#write();
  }

  // Text may come later than its token: a character that is not whole yet, or what may become a
  // stop string, is held back.
  #write() {
    for (let at = this.#numSettled; at < this.#tokens.length; at++) {
      const { span, offset, name } = this.#tokens[at];
      const end = this.#tokens[at + 1]?.offset;
      const text = this.#chars.slice(offset, end).join("");
      span.textContent = text;
      // Shown by the style sheet, so that it is not part of the text.
      if (text === "") span.dataset.sign = name.replaceAll("\n", "↵");
      else if (text.startsWith("\n")) span.dataset.sign = "↵";
      else delete span.dataset.sign;
      const isSettled = end !== undefined && end <= this.#chars.length;
      if (isSettled && at === this.#numSettled) this.#numSettled += 1;
    }
  }
}

/** How probable, in per cent. */
export function percent(probability) {
  const value = 100 * probability;
  if (value < 0.01) return "under 0.01%";
  return `${value >= 1 ? value.toFixed(1) : value.toPrecision(1)}%`;
}

/** A token's text, with what cannot be seen written out. */
export function quoted(name) {
  return JSON.stringify(name);
}

function makeToken(name, logprob, top, offset) {
  const probability = Math.exp(logprob);
  const alternatives = Object.entries(top)
    .map(([other, its]) => ({ name: other, probability: Math.exp(its) }))
    .sort((one, other) => other.probability - one.probability);
  const span = document.createElement("span");
  span.className = "token";
  const rank = RANKS.findIndex((least) => probability >= least);
  span.dataset.rank = rank < 0 ? RANKS.length : rank;
  const lines = alternatives.map((its) => `${quoted(its.name)} ${percent(its.probability)}`);
  span.title = [`${quoted(name)}: ${percent(probability)}`, "", ...lines].join("\n");
  return { name, probability, alternatives, offset, span };
}
