// Settings of the form as fields of a request. The server checks their values.

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

// Number fields: the setting, its hint, and attributes of its input.
const NUMBERS = [
  ["max_tokens", "limit of new tokens", { min: 0 }],
  ["temperature", "0: most probable token", { min: 0, step: 0.1, defaultValue: 1 }],
  ["top_p", "1: all tokens", { min: 0, max: 1, step: 0.05, defaultValue: 1 }],
  ["top_k", "0: all tokens", { min: 0, defaultValue: 0 }],
  ["min_p", "0: all tokens", { min: 0, max: 1, step: 0.01, defaultValue: 0 }],
  ["repetition_penalty", "1: none", { min: 0.01, max: 100, step: 0.05, defaultValue: 1 }],
  ["presence_penalty", "0: none", { min: -2, max: 2, step: 0.1, defaultValue: 0 }],
  ["frequency_penalty", "0: none", { min: -2, max: 2, step: 0.1, defaultValue: 0 }],
  ["seed", "empty: random", { min: 0 }],
];

document.querySelector("#sampling .settings").prepend(...NUMBERS.map(numberField));

/** Return the fields. Throws Error for a setting that is not a number. */
export function settings() {
  const body = {};
  for (const input of NUMBERS.map(([name]) => document.getElementById(name))) {
    if (input.validity.badInput) throw new Error(`${labelOf(input)} must be a number.`);
    if (input.value !== "") body[input.id] = Number(input.value);
  }
  const stops = stopStrings(document.getElementById("stop_strings").value);
  if (stops.length) body.stop = stops;
  if (!document.getElementById("stop_at_eos").checked) body.stop_at_eos = false;
  return body;
}

function numberField([name, hint, attributes]) {
  const field = document.createElement("div");
  const text = name[0].toUpperCase() + name.slice(1).replace("_", " ");
  field.append(
    make("label", { htmlFor: name, textContent: text }),
    make("input", { id: name, type: "number", ...attributes }),
    make("p", { className: "hint", textContent: hint }),
  );
  return field;
}

function make(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function labelOf(input) {
  return input.labels[0].textContent.trim();
}

function stopStrings(text) {
  const lines = text.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\[nt\\]/g, (written) => ESCAPES[written]));
}
