// OpenAI's and Vercel's Node SDKs against the server at argv[2]: a line of JSON for each answer.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, streamObject } from "ai";

const baseURL = process.argv[2];
const report = (name, value) => console.log(JSON.stringify([name, value]));

const Step = z.object({ kind: z.enum(["add", "subtract"]), value: z.number().int() });
const Answer = z.object({
  title: z.string().max(8),
  steps: z.array(Step).min(1).max(3),
  note: z.string().max(4).nullable(),
  day: z.iso.date(),
});
const Shape = z.discriminatedUnion("type", [
  z.object({ type: z.literal("circle"), filled: z.boolean() }),
  z.object({ type: z.literal("none"), reason: z.null() }),
]);
const More = Answer.extend({ shape: Shape, marks: z.record(z.enum(["a", "b"]), z.boolean()) });

const openai = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const asked = {
  model: "model",
  messages: [{ role: "user", content: "Answer." }],
  temperature: 0,
  max_tokens: 600,
  response_format: zodResponseFormat(Answer, "answer"),
};
const completion = await openai.chat.completions.parse(asked);
report("openai parse", Answer.parse(completion.choices[0].message.parsed));
const stream = openai.chat.completions.stream(asked);
report("openai stream", Answer.parse((await stream.finalChatCompletion()).choices[0].message.parsed));

const provider = createOpenAICompatible({
  name: "stu",
  baseURL,
  apiKey: "none",
  supportsStructuredOutputs: true,
});
const wanted = {
  model: provider("model"),
  schema: More,
  prompt: "Answer.",
  temperature: 0,
  maxOutputTokens: 600,
  maxRetries: 0,
};
report("vercel generateObject", More.parse((await generateObject(wanted)).object));
const parts = streamObject(wanted);
let last;
for await (const part of parts.partialObjectStream) last = part;
report("vercel streamObject", More.parse(last));
