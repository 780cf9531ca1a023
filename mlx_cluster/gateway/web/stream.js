// One streamed chat completion: the request, and the server's events as JavaScript objects.
// Owns: reading server-sent events. Does not own: what is shown. Invariant: every failure is an Error with the
// server's own message, and an aborted signal ends the generator without one.

/** The objects of a stream, in order. Throws an Error for a refusal, an error event or a stream that is cut. */
export async function* chat(body, { key, signal }) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", headers, signal, body: JSON.stringify({ ...body, stream: true }),
  });
  if (!answer.ok) throw new Error(await messageOf(answer));
  let ended = false;
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") { ended = true; break; }
    const value = JSON.parse(data);
    if (value.error) throw new Error(value.error.message ?? "the server reports an error");
    yield value;
  }
  if (!ended) throw new Error("the connection ended before the answer did");
}

/** What the server says in a refusal, or its status where that is not JSON. */
export async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

// Events end with an empty line; a line that begins with a colon keeps the connection alive and says nothing.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
