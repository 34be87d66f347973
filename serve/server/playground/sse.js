// Server-sent events, read from a body by hand: EventSource can neither POST nor send a key.

// A carriage return at the very end may be the first half of a line's end.
const LINE_END = /\r\n|\n|\r(?=[^])/;

/** The data of each event, whatever chunks the bytes come in. */
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
    // What follows the last line's end is an event cut short.
    if (rest.endsWith("\r")) yield rest.slice(0, -1);
  } finally {
    reader.cancel().catch(() => {});
  }
}
