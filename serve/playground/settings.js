// From the form to the body of a request. What values are allowed, the server says.

const TOP_LOGPROBS = 5;
const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

/** The body. Throws Error in words for what is no number. */
export function requestBody(form) {
  const body = { prompt: form.prompt.value };
  for (const input of form.querySelectorAll("[data-setting]")) {
    if (input.validity.badInput) throw new Error(`${labelOf(input)} must be a number.`);
    if (input.value !== "") body[input.id] = Number(input.value);
  }
  const stops = stopStrings(form.stop_strings.value);
  if (stops.length) body.stop = stops;
  if (!form.stop_at_eos.checked) body.stop_at_eos = false;
  if (form.logprobs.checked) body.logprobs = TOP_LOGPROBS;
  return body;
}

function labelOf(input) {
  return input.labels[0].textContent.trim();
}

function stopStrings(text) {
  const lines = text.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\[nt\\]/g, (written) => ESCAPES[written]));
}
