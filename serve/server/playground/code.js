// A request as a curl command and as a Python program.

const KEY = "STU_API_KEY";
// Arguments of OpenAI's client; other fields go into extra_body.
const NAMED = new Set(
  "model messages prompt max_tokens temperature top_p n stop seed logprobs".split(" "),
).add("presence_penalty").add("frequency_penalty");

/** Return a command for a POSIX shell. */
export function asCurl(url, body) {
  const lines = [
    `curl ${shellQuoted(url)}`,
    `-H "Authorization: Bearer $${KEY}"`,
    "-H 'Content-Type: application/json'",
    `-d ${shellQuoted(JSON.stringify(body, null, 2))}`,
  ];
  return lines.join(" \\\n  ");
}

/** Return a program with OpenAI's client. baseUrl ends with /v1. */
export function asPython(baseUrl, body) {
  const isChat = "messages" in body;
  const entries = Object.entries(body);
  const named = entries.filter(([name]) => NAMED.has(name));
  const others = Object.fromEntries(entries.filter(([name]) => !NAMED.has(name)));
  if (Object.keys(others).length) named.push(["extra_body", others]);
  const lines = named.map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
  const create = isChat ? "chat.completions" : "completions";
  const text = isChat ? "message.content" : "text";
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${python(baseUrl)}, api_key=os.environ.get("${KEY}", "none"))
answer = client.${create}.create(
${lines})
print(answer.choices[0].${text})`;
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

// Strings and numbers are the same in JSON and Python.
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const pairs = Object.entries(value).map(([name, field]) => `${python(name)}: ${python(field)}`);
  return `{${pairs.join(", ")}}`;
}
