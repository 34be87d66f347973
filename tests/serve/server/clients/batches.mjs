// Files and batches for OpenAI's Node SDK against the server at argv[2]: a line of JSON for each
// answer.
import OpenAI, { toFile } from "openai";

const openai = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const report = (name, value) => console.log(JSON.stringify([name, value]));

const row = (custom_id, prompt) =>
  JSON.stringify({
    custom_id,
    method: "POST",
    url: "/v1/completions",
    body: { prompt, max_tokens: 3 },
  });
const content = [row("good", "x = é"), row("bad", 5)].join("\n");
const file = await openai.files.create({
  file: await toFile(Buffer.from(content), "zeilen é.jsonl"),
  purpose: "batch",
  expires_after: { anchor: "created_at", seconds: 3600 },
});
report("file", [file.filename, file.expires_at - file.created_at]);
const same = (await (await openai.files.content(file.id)).text()) === content;
report("content", same);

let batch = await openai.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/completions",
  completion_window: "24h",
  metadata: { name: "é" },
});
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  batch = await openai.batches.retrieve(batch.id);
}
report("batch", [batch.status, batch.request_counts, batch.metadata]);
for (const name of ["output_file_id", "error_file_id"]) {
  const line = JSON.parse(await (await openai.files.content(batch[name])).text());
  report(name, [line.custom_id, line.response.status_code]);
}
const files = [];
for await (const found of openai.files.list({ limit: 2 })) files.push(found.purpose);
report("files", files.sort());
const batches = [];
for await (const found of openai.batches.list({ limit: 1 })) batches.push(found.id);
report("batches", batches.length === 1 && batches[0] === batch.id);
report("cancel", await openai.batches.cancel(batch.id).catch((error) => error.status));
report("delete", (await openai.files.delete(file.id)).deleted);
report("deleted", await openai.files.retrieve(file.id).catch((error) => error.status));
