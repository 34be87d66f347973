// Tools and responses for OpenAI's and Vercel's Node SDKs against the server at argv[2]: a line of
// JSON for each answer.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, stepCountIs, tool } from "ai";
import OpenAI from "openai";
import { zodFunction, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = process.argv[2];
const report = (name, value) => console.log(JSON.stringify([name, value]));

const Add = z.object({ first: z.number().int().min(0).max(99), kind: z.enum(["}", "plain"]) });
const Answer = z.object({ title: z.string().max(8), good: z.boolean() });

const openai = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const asked = {
  model: "model",
  messages: [{ role: "user", content: "Answer." }],
  temperature: 0,
  max_tokens: 200,
  tools: [zodFunction({ name: "add", parameters: Add })],
  tool_choice: "required",
  parallel_tool_calls: false,
};
const completion = await openai.chat.completions.parse(asked);
report("openai parse", completion.choices[0].message.tool_calls[0].function.parsed_arguments);
const stream = openai.chat.completions.stream(asked);
const final = await stream.finalChatCompletion();
report("openai stream", JSON.parse(final.choices[0].message.tool_calls[0].function.arguments));
let added;
const runner = openai.chat.completions.runTools(
  {
    ...asked,
    tools: [
      {
        type: "function",
        function: {
          name: "add",
          strict: true,
          parameters: z.toJSONSchema(Add),
          parse: (text) => Add.parse(JSON.parse(text)),
          function: (values) => {
            added = values;
            return "5";
          },
        },
      },
    ],
  },
  { maxChatCompletions: 1 },
);
await runner.done().catch(() => {});
report("openai runTools", added);

const responded = await openai.responses.parse({
  model: "model",
  input: "Answer.",
  temperature: 0,
  max_output_tokens: 200,
  tools: [zodResponsesFunction({ name: "add", parameters: Add })],
  tool_choice: "required",
  parallel_tool_calls: false,
});
report("openai responses tools", responded.output[0].parsed_arguments);
const formatted = {
  model: "model",
  input: "Answer.",
  temperature: 0,
  max_output_tokens: 200,
  text: { format: zodTextFormat(Answer, "answer") },
};
report("openai responses parse", (await openai.responses.parse(formatted)).output_parsed);
const events = openai.responses.stream(formatted);
report("openai responses stream", (await events.finalResponse()).output_parsed);
const first = await openai.responses.create({ model: "model", input: "x", max_output_tokens: 3 });
const later = await openai.responses.create({
  model: "model",
  input: "y",
  max_output_tokens: 3,
  previous_response_id: first.id,
});
report("openai previous_response_id", [first.usage.input_tokens, later.usage.input_tokens]);

const tools = {
  add: tool({ description: "Add.", inputSchema: Add, execute: async (values) => JSON.stringify(values) }),
};
const wanted = {
  prompt: "Answer.",
  tools,
  toolChoice: { type: "tool", toolName: "add" },
  temperature: 0,
  maxOutputTokens: 200,
  maxRetries: 0,
  stopWhen: stepCountIs(1),
};
const providers = {
  compatible: createOpenAICompatible({ name: "stu", baseURL, apiKey: "none" })("model"),
  chat: createOpenAI({ baseURL, apiKey: "none" }).chat("model"),
  responses: createOpenAI({ baseURL, apiKey: "none" }).responses("model"),
};
for (const [name, model] of Object.entries(providers)) {
  const whole = await generateText({ ...wanted, model });
  report(`vercel ${name} generateText`, whole.toolResults[0].input);
  const streamed = streamText({ ...wanted, model });
  let found;
  for await (const part of streamed.fullStream) if (part.type === "tool-result") found = part.input;
  report(`vercel ${name} streamText`, found);
}
