// A parser of server-sent events, as EventSource can neither POST nor send an API key.

// A carriage return at the very end may be the first half of a line end.
const LINE_END = /\r\n|\n|\r(?=[^])/;

/** Yield the data of each event of a body, however its bytes are divided. */
export async function* eventData(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line === "") {
      if (data.length) yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) {
      data.push(line.slice(5).replace(/^ /, ""));
    }
  }
}

async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const found = rest.split(LINE_END);
      rest = found.pop();
      yield* found;
      if (done) break;
    }
    // An event without a line end at the end of the body is incomplete.
    if (rest.endsWith("\r")) yield rest.slice(0, -1);
  } finally {
    reader.cancel().catch(() => {});
  }
}
