// Requests to the server, and its errors.

import { eventData } from "./sse.js";

const KEY_NAME = "stu-api-key";
const PATIENCE_MS = 5000;

/** An error answer, with the message of the server. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The server does not answer. */
export class Unreachable extends Error {}

/** The stream ended before the completion did. */
export class Broken extends Error {}

/** The API key, kept while the tab is open. Browsers may forbid storage. */
export const apiKey = {
  get value() {
    try {
      return sessionStorage.getItem(KEY_NAME) ?? "";
    } catch {
      return this.kept ?? "";
    }
  },
  set value(key) {
    this.kept = key;
    try {
      sessionStorage.setItem(KEY_NAME, key);
    } catch {
      // It is kept above.
    }
  },
};

/** Return the text of a path. Throws ServerError or Unreachable. */
export async function getText(path) {
  const answer = await ask(path, { signal: AbortSignal.timeout(PATIENCE_MS) });
  return answer.text().catch(throwUnreachable);
}

/** Return the served models, each with id and max_model_len. */
export async function getModels() {
  return JSON.parse(await getText("v1/models")).data;
}

/** Return the number of tokens of body.prompt, with BOS. Throws ServerError or Unreachable. */
export async function countTokens(body, signal) {
  const answer = await post("tokenize", body, signal);
  return (await answer.json().catch(throwUnreachable)).count;
}

/** Yield the events of an answer. Throws ServerError, Unreachable or Broken. */
export async function* stream(path, body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const answer = await post(path, { ...body, ...options }, signal);
  try {
    for await (const data of eventData(answer.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, answer.status);
      yield event;
    }
  } catch (error) {
    throw error instanceof TypeError ? new Broken(error.message) : error;
  }
  throw new Broken("the stream ended early");
}

function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function ask(path, options) {
  const key = apiKey.value;
  // A header cannot hold other characters: fetch would fail as if the server did not answer.
  if (!/^[\x21-\x7e]*$/.test(key)) {
    throw new ServerError("the API key has a space, or a character beyond ASCII", 401);
  }
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const asked = fetch(path, { cache: "no-store", ...options, headers });
  const answer = await asked.catch(throwUnreachable);
  if (!answer.ok) throw new ServerError(await errorMessage(answer), answer.status);
  return answer;
}

// fetch throws TypeError for errors below HTTP.
function throwUnreachable(error) {
  const isSilence = error instanceof TypeError || error.name === "TimeoutError";
  throw isSilence ? new Unreachable(error.message) : error;
}

async function errorMessage(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    // Perhaps the answer of a proxy.
    return `the server answered ${answer.status} ${answer.statusText}`;
  }
}
