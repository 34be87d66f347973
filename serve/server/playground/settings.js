// Settings of the form as fields of a request. The server checks their values.

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

/** Return the fields. Throws Error for a setting that is not a number. */
export function settings() {
  const body = {};
  for (const input of document.querySelectorAll("[data-setting]")) {
    if (input.validity.badInput) throw new Error(`${labelOf(input)} must be a number.`);
    if (input.value !== "") body[input.id] = Number(input.value);
  }
  const stops = stopStrings(document.getElementById("stop_strings").value);
  if (stops.length) body.stop = stops;
  if (!document.getElementById("stop_at_eos").checked) body.stop_at_eos = false;
  return body;
}

function labelOf(input) {
  return input.labels[0].textContent.trim();
}

function stopStrings(text) {
  const lines = text.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\[nt\\]/g, (written) => ESCAPES[written]));
}
