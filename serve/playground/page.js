// Puts the page together: the form, the completion it asks for, and the server's figures.

import { apiKey, Broken, complete, ServerError, Unreachable } from "./api.js";
import { CompletionBox } from "./completion.js";
import { Connection } from "./connection.js";
import { Live } from "./live.js";
import { requestBody } from "./settings.js";

const USUAL_TOKENS = 128;

const form = document.getElementById("request");
const keyPanel = document.getElementById("key-panel");
const completion = new CompletionBox();
const live = new Live();
let running = null;

const connection = new Connection({
  onChange(state, words) {
    const status = document.getElementById("connection");
    status.dataset.state = state;
    status.textContent = words;
    if (state !== "connected") live.blank();
    if (state === "key-needed") keyPanel.open = true;
  },
  onModel({ id, max_model_len: most }) {
    const words = `${id}: context of ${most.toLocaleString("en")} tokens`;
    document.getElementById("model").textContent = words;
    form.max_tokens.value ||= Math.min(USUAL_TOKENS, Math.floor(most / 2));
  },
  onMetrics: (text) => live.show(text),
});

async function generate() {
  if (running) return;
  let body;
  try {
    body = requestBody(form);
  } catch (error) {
    showError(error.message);
    return;
  }
  showError("");
  setRunning(new AbortController());
  completion.begin("logprobs" in body);
  let ending = "Ended by an error";
  try {
    for await (const event of complete(body, running.signal)) completion.add(event);
    ending = null;
  } catch (error) {
    ending = explain(error);
  } finally {
    completion.end(ending);
    setRunning(null);
  }
}

/** How it ended, in words; an error that is no wish of the user's is shown at the prompt too. */
function explain(error) {
  if (error.name === "AbortError") return "Stopped";
  if (error instanceof Broken || error instanceof Unreachable) connection.lookNow();
  if (error instanceof Broken) {
    showError("The connection broke.");
    return "Broken off; the text so far is kept";
  }
  if (error instanceof Unreachable) {
    showError("The server cannot be reached.");
    return "Not begun";
  }
  if (!(error instanceof ServerError)) throw error;
  showError(error.message);
  if (error.status === 401) keyPanel.open = true;
  return "Ended by an error";
}

function showError(message) {
  document.getElementById("error").textContent = message;
  form.prompt.toggleAttribute("aria-invalid", message !== "");
}

// Buttons that nothing can be done with keep the focus, which `disabled` would take away.
function setRunning(controller) {
  running = controller;
  form.generate.setAttribute("aria-disabled", String(controller !== null));
  form.stop.setAttribute("aria-disabled", String(controller === null));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
form.stop.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
form.key.value = apiKey.value;
form.key.addEventListener("input", () => {
  apiKey.value = form.key.value.trim();
});
form.key.addEventListener("change", () => connection.lookNow());
connection.follow();
