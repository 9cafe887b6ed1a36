// The server's HTTP API: models, drawing as server-sent events, words. Knows nothing of the document's elements.

const KEY = "tokenloom-key";
const BUSY = new Set([429, 503]);
/** Code of an error within a stream -> its status as a reply (inference/serving/errors.py); others are 500. */
const STATUS_OF_CODE = {
  moderation_blocked: 400, invalid_value: 400, bad_request: 400,
  unavailable: 503, shutting_down: 503, deadline_exceeded: 504,
};

/** An answer of the server other than success, with what OpenAI's error bodies say. */
export class ApiError extends Error {
  constructor(status, body, retryAfter = null) {
    super(body?.message || `the server answered ${status}`);
    this.status = status;
    this.code = body?.code ?? null;
    this.param = body?.param ?? null;
    this.retryAfter = retryAfter;
  }
}

/** No answer at all, or one that broke off. */
export class Unreachable extends Error {}

/** Whether a text can be a key: the server takes no others, and fetch() sends none above U+00FF. */
export function isKey(text) {
  return /^[\x21-\x7e]+$/.test(text);
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Return the server's models as /v1/models lists them. */
export async function fetchModels() {
  const response = await call("v1/models");
  return (await readJson(response)).data;
}

/** Return the words of a picture's prompt, each with start, end and weights [rows][columns]. */
export async function fetchWords(id) {
  const response = await call(`v1/images/${encodeURIComponent(id)}/words`);
  return (await readJson(response)).words;
}

/**
 * Draw one picture; call onPartial(bytes) as it grows.
 * Return {bytes, id, revisedPrompt, note}. ApiError, Unreachable, or AbortError when the signal is given.
 * body: JSON text, because a seed may be larger than JavaScript's numbers hold.
 */
export async function streamPicture(body, { signal, onPartial }) {
  const response = await call("v1/images/generations", {
    method: "POST", body, signal, headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
  });

  let finished = null;
  for await (const event of serverEvents(response)) {
    if (event.error) throw new ApiError(STATUS_OF_CODE[event.error.code] ?? 500, event.error);
    if (event.type === "image_generation.partial_image") {
      onPartial(decodeBase64(event.b64_json));
    } else if (event.type === "image_generation.completed") {
      finished = event;
    }
  }
  if (finished === null) throw new Unreachable("the connection broke off before the picture was finished");
  return {
    bytes: decodeBase64(finished.b64_json),
    id: finished.id ?? null,
    revisedPrompt: finished.revised_prompt ?? null,
    note: finished.note ?? null,
  };
}

async function call(path, { headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
  const sent = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let response;
  try {
    // against the page's own address, so that it also works below a path of a reverse proxy
    response = await fetch(new URL(path, document.baseURI), { ...options, headers: sent });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("the server does not answer");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let body = null;
  try {
    body = (await response.json()).error;
  } catch {
    // a proxy's own page, for example: the status alone is known
  }
  let retryAfter = null;
  if (BUSY.has(response.status)) {
    const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
    retryAfter = Number.isFinite(seconds) ? Math.min(Math.max(seconds, 1), 600) : 3;
  }
  return new ApiError(response.status, body, retryAfter);
}

async function readJson(response) {
  try {
    return await response.json();
  } catch {
    throw new Unreachable("the server's answer broke off, or is not JSON");
  }
}

/** Yield the data of server-sent events, parsed. */
async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await read(reader);
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = eventData(block);
        if (data !== "" && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    // stops the request if the caller leaves the loop early
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("the connection broke off before the picture was finished");
  }
}

function eventData(block) {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}

function decodeBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
