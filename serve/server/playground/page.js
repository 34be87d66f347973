// The whole page: both forms, their requests, and the live figures.

import { apiKey, Broken, stream, Unreachable } from "./api.js";
import { Transcript } from "./chat.js";
import { asCurl, asPython } from "./code.js";
import { CompletionBox } from "./completion.js";
import { Connection } from "./connection.js";
import { copyText } from "./copy.js";
import { Count } from "./count.js";
import { Live } from "./live.js";
import { Run } from "./run.js";
import { settings } from "./settings.js";
import { shownTab, startTabs } from "./tabs.js";

const USUAL_TOKENS = 128;
const TOP_LOGPROBS = 5;
const PATHS = { text: "v1/completions", chat: "v1/chat/completions" };

const [prompt, message, system, maxTokens, keyField, keyPanel, codePanel, logprobs] = byId(
  ...["prompt", "message", "system", "max_tokens", "key", "key-panel", "code-panel", "logprobs"],
);
const [choice, modelNames] = byId("model-choice", "models");
let models = [];
let model = null;

const live = new Live();
const connection = new Connection({
  onChange(state, words) {
    const [status] = byId("connection");
    status.dataset.state = state;
    status.textContent = words;
    if (state !== "connected") live.blank();
    if (state === "key-needed") keyPanel.open = true;
  },
  onModels(served) {
    models = served;
    modelNames.replaceChildren(...models.map(({ id }) => new Option(id, id)));
    choice.hidden = models.length === 1;
    choose(model?.id);
  },
  onMetrics: (text) => live.show(text),
});

const counts = {
  text: new Count(prompt, () => ({ prompt: prompt.value, ...named() }), ofContext),
  // Without the text that the chat template adds.
  chat: new Count(
    message,
    () => {
      const contents = chatMessages().map(({ content }) => content);
      return { prompt: [...contents, message.value].join("\n"), ...named() };
    },
    (count) => `the chat has about ${ofContext(count)}`,
  ),
};
const completion = new CompletionBox((text) => {
  prompt.value = text;
  prompt.focus();
  prompt.setSelectionRange(text.length, text.length);
  prompt.scrollTop = prompt.scrollHeight;
  prompt.dispatchEvent(new Event("input", { bubbles: true }));
});
const transcript = new Transcript(byId("transcript")[0], {
  onEdit(text) {
    message.value = text;
    message.focus();
    transcript.setBusy(false);
    message.dispatchEvent(new Event("input", { bubbles: true }));
  },
  onAgain: () => answer(),
});
const runs = {
  text: makeRun(prompt, "generate", "stop", "progress", "error"),
  chat: makeRun(message, "send", "chat-stop", "chat-progress", "chat-error"),
};

async function generate() {
  const body = bodyOrError(runs.text, textBody);
  if (!body) return;
  completion.begin(body.prompt, "logprobs" in body);
  await runs.text.follow(
    (signal) => stream(PATHS.text, body, signal),
    (event) => completion.add(event),
  );
  completion.end();
}

/** Send the message, if there is one. */
async function send() {
  if (runs.chat.isRunning) return;
  if (message.value === "" && transcript.messages.at(-1)?.role !== "user") {
    runs.chat.showError("Write a message first.");
    return;
  }
  if (!bodyOrError(runs.chat, chatBody)) return;
  if (message.value !== "") transcript.add("user", message.value);
  message.value = "";
  await answer();
}

/** Ask for a new answer to the last message. */
async function answer() {
  if (!bodyOrError(runs.chat, chatBody)) return;
  transcript.dropAnswer();
  const body = chatBody();
  const written = transcript.add("assistant");
  transcript.setBusy(true);
  message.focus();
  await runs.chat.follow(
    (signal) => stream(PATHS.chat, body, signal),
    ({ choices }) => transcript.append(written, choices[0]?.delta.content ?? ""),
  );
  transcript.dropAnswer({ isEmpty: true });
  transcript.setBusy(false);
  counts.chat.update();
  showCode();
}

/** Use the model with a name, or the first if there is none. */
function choose(name) {
  model = models.find(({ id }) => id === name) ?? models[0];
  modelNames.value = model.id;
  const most = model.max_model_len;
  byId("model")[0].textContent = `${model.id}: context of ${most.toLocaleString("en")} tokens`;
  maxTokens.value ||= Math.min(USUAL_TOKENS, Math.floor(most / 2));
  for (const count of Object.values(counts)) count.update();
  showCode();
}

/** Return the field that names the model, where there is a choice. */
function named() {
  return models.length > 1 ? { model: model.id } : {};
}

function textBody() {
  const body = { prompt: prompt.value, ...named(), ...settings() };
  if (logprobs.checked) body.logprobs = TOP_LOGPROBS;
  return body;
}

function chatBody() {
  return { messages: chatMessages(), ...named(), ...settings() };
}

function chatMessages() {
  const instructions = system.value ? [{ role: "system", content: system.value }] : [];
  return [...instructions, ...transcript.messages];
}

/** Return the body that `make` returns, or null if a request runs or `make` fails. */
function bodyOrError(run, make) {
  if (run.isRunning) return null;
  try {
    return make();
  } catch (error) {
    run.showError(error.message);
    return null;
  }
}

function showCode() {
  if (!codePanel.open) return;
  const kind = shownTab();
  const [curl, python] = byId("curl", "python");
  try {
    const made = kind === "chat" ? chatBody() : textBody();
    if (kind === "chat") {
      // The request of Send, or else the last one.
      if (message.value) made.messages.push({ role: "user", content: message.value });
      else if (made.messages.at(-1)?.role === "assistant") made.messages.pop();
    }
    const body = { model: model?.id ?? "model", ...made };
    curl.textContent = asCurl(new URL(PATHS[kind], document.baseURI).href, body);
    python.textContent = asPython(new URL("v1", document.baseURI).href, body);
  } catch (error) {
    curl.textContent = python.textContent = error.message;
  }
}

function makeRun(field, ...ids) {
  const [go, stop, progress, error] = byId(...ids);
  const onTrouble = (trouble) => {
    if (trouble instanceof Broken || trouble instanceof Unreachable) connection.lookNow();
    if (trouble.status === 401) keyPanel.open = true;
  };
  return new Run({ field, go, stop, progress, error, onTrouble });
}

function ofContext(count) {
  if (!model) return "";
  const numbers = [count, Number(maxTokens.value), model.max_model_len];
  const [has, more, most] = numbers.map((number) => number.toLocaleString("en"));
  const over = numbers[0] + numbers[1] > numbers[2] ? ": too many" : "";
  return `${has} ${count === 1 ? "token" : "tokens"} and ${more} new ones, of ${most}${over}`;
}

function byId(...ids) {
  return ids.map((id) => document.getElementById(id));
}

for (const [form, act] of [["request", generate], ["chat", send]]) {
  byId(form)[0].addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}
byId("new-chat")[0].addEventListener("click", () => {
  runs.chat.abort();
  transcript.clear();
  counts.chat.update();
  message.focus();
  showCode();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!event.ctrlKey && !event.metaKey) send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") Object.values(runs).forEach((run) => run.abort());
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (shownTab() === "chat") send();
    else generate();
  }
});
document.addEventListener("input", showCode);
codePanel.addEventListener("toggle", showCode);
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () =>
    copyText(byId(button.dataset.copy)[0].textContent, button),
  );
}
for (const field of [maxTokens, system]) {
  field.addEventListener("input", () => Object.values(counts).forEach((count) => count.update()));
}
modelNames.addEventListener("change", () => choose(modelNames.value));
keyField.value = apiKey.value;
keyField.addEventListener("input", () => {
  apiKey.value = keyField.value.trim();
});
keyField.addEventListener("change", () => connection.lookNow());
startTabs(showCode);
connection.follow();
