// Tokens as spans that show their probability.

// Bounds of a token's rank: 0 above the first, 4 below the last.
const RANKS = [0.9, 0.5, 0.1, 0.01];

/** A completion with log probabilities in the element `box`. */
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

  /** Return token number `at`: name, probability, alternatives and span. */
  token(at) {
    return this.#tokens[at];
  }

  /** Return the number of the token that a span shows, or -1. */
  indexOf(span) {
    return this.#tokens.findIndex((token) => token.span === span);
  }

  /** Return the text up to the end of token number `at`. */
  textUpTo(at) {
    return this.#chars.slice(0, this.#tokens[at + 1]?.offset).join("");
  }

  /** Add the next piece of the completion. */
  add({ text, logprobs }) {
    // Offsets count characters, not UTF-16 units.
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

  // Text may come later than its token: the server holds back incomplete characters and what may
  // become a stop string.
  #write() {
    for (let at = this.#numSettled; at < this.#tokens.length; at++) {
      const { span, offset, name } = this.#tokens[at];
      const end = this.#tokens[at + 1]?.offset;
      const text = this.#chars.slice(offset, end).join("");
      span.textContent = text;
      // The style sheet shows it, so that it is not part of the text.
      if (text === "") span.dataset.sign = name.replaceAll("\n", "↵");
      else if (text.startsWith("\n")) span.dataset.sign = "↵";
      else delete span.dataset.sign;
      const isSettled = end !== undefined && end <= this.#chars.length;
      if (isSettled && at === this.#numSettled) this.#numSettled += 1;
    }
  }
}

/** Return a probability in per cent. */
export function percent(probability) {
  const value = 100 * probability;
  if (value < 0.01) return "under 0.01%";
  return `${value >= 1 ? value.toFixed(1) : value.toPrecision(1)}%`;
}

/** Return the text of a token with escapes for invisible characters. */
export function quoted(name) {
  return JSON.stringify(name);
}

function makeToken(name, logprob, top, offset) {
  const probability = Math.exp(logprob);
  const alternatives = Object.entries(top)
    .map(([other, value]) => ({ name: other, probability: Math.exp(value) }))
    .sort((one, other) => other.probability - one.probability);
  const span = document.createElement("span");
  span.className = "token";
  const rank = RANKS.findIndex((least) => probability >= least);
  span.dataset.rank = rank < 0 ? RANKS.length : rank;
  const lines = alternatives.map((other) => `${quoted(other.name)} ${percent(other.probability)}`);
  span.title = [`${quoted(name)}: ${percent(probability)}`, "", ...lines].join("\n");
  return { name, probability, alternatives, offset, span };
}
