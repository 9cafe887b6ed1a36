// A run: the pictures of one press of Draw, each a request of its own, so that each grows by itself.

import { ApiError, streamPicture } from "./api.js";

const AT_ONCE = 4;  // browsers hold six connections to a server; the rest is for words and models
const PARTIAL_IMAGES = 3;
const MAX_TRIES = 40;
const MAX_SAMPLING = 100;  // the server's bound of guidance and of temperature
export const MAX_SEED = (1n << 63n) - 10n;  // the server counts on for n of up to 10

/** The pictures of settings, not yet drawn. Picture i has seed + i; a variation keeps the seed. */
export function newRun(settings) {
  const pictures = [];
  const variations = settings.vary ? variationsOf(settings) : [];
  for (let index = 0; index < Number(settings.count); index++) {
    const seed = settings.vary ? settings.seed : String(BigInt(settings.seed) + BigInt(index));
    pictures.push({
      ...settings, ...variations[index], seed, index, state: "waiting", url: null, id: null,
      revisedPrompt: null, note: null, words: null, forgotten: false, error: null,
    });
  }
  return { settings, pictures };
}

/** Whether a picture is still to be drawn, or again, as the server has forgotten what its words painted. */
export function isOpen(picture) {
  return picture.state !== "done" || picture.forgotten;
}

export function newSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

/** Whether a seed is one, also for the last of `count` pictures; a typed count may be a fraction. */
export function isSeed(text, count) {
  return /^\d{1,19}$/.test(text) && BigInt(text) + BigInt(Math.max(Math.ceil(count), 1)) - 1n <= MAX_SEED;
}

/** Return guidance or temperature of each variation: nearest first, none equal to the settings. */
export function variationsOf(settings) {
  const guidance = Number(settings.guidance);
  const temperature = Number(settings.temperature);
  const variations = [];
  const add = (name, value) => {
    // guidance 1 would switch the negative prompt off, which the server refuses
    const refused = value < 0 || value > MAX_SAMPLING || (name === "guidance" && value === 1 && settings.negative);
    const text = String(value);  // as typed values are
    // "1.0" and 1 are the same guidance
    const known = value === Number(settings[name]) || variations.some((other) => other[name] === text);
    if (!refused && !known) variations.push({ [name]: text });
  };

  for (let step = 1; step <= 2 || variations.length < Number(settings.count); step++) {
    add("guidance", rounded(Math.max(guidance, 0.5) * (1 + 0.25 * step)));
    add("temperature", rounded(temperature + 0.1 * step));
    add("guidance", rounded(guidance / (1 + 0.25 * step)));
    add("temperature", rounded(temperature - 0.1 * step));
  }
  return variations;
}

/**
 * Draw the pictures of a run that are not finished, AT_ONCE at a time.
 * changed(picture) after each change; waiting(seconds, error) each second while the server is busy, 0 as it goes on.
 * A picture that fails keeps its error; the others go on.
 */
export async function drawRun(run, { signal, changed, waiting }) {
  const open = run.pictures.filter(isOpen);
  for (const picture of open) {
    Object.assign(picture, { state: "waiting", error: null, forgotten: false, words: null });
    changed(picture);
  }
  const waits = new Map();  // picture -> seconds: the longest is told
  const wait = (picture, seconds, error) => {
    if (seconds > 0) waits.set(picture, seconds);
    else waits.delete(picture);
    waiting(Math.max(0, ...waits.values()), error);
  };
  const worker = async () => {
    while (open.length > 0) {
      const picture = open.shift();
      await drawPicture(picture, { signal, changed, waiting: (...told) => wait(picture, ...told) });
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
}

async function drawPicture(picture, { signal, changed, waiting }) {
  const onPartial = (bytes) => {
    picture.state = "drawing";
    showBytes(picture, bytes);
    changed(picture);
  };
  try {
    const { bytes, ...drawn } = await untilFree(
      () => streamPicture(bodyOf(picture), { signal, onPartial }), signal, waiting);
    Object.assign(picture, { ...drawn, state: "done" });
    showBytes(picture, bytes);  // the URL holds them
  } catch (error) {
    Object.assign(picture, { state: error.name === "AbortError" ? "cancelled" : "failed", error });
  }
  changed(picture);
}

async function untilFree(request, signal, waiting) {
  for (let tries = 1; ; tries++) {
    signal.throwIfAborted();
    try {
      return await request();
    } catch (error) {
      const again = error instanceof ApiError && error.retryAfter !== null && tries < MAX_TRIES;
      if (!again) throw error;
      await countDown(error, signal, waiting);
    }
  }
}

async function countDown(error, signal, waiting) {
  for (let left = error.retryAfter; left > 0; left--) {
    waiting(left, error);
    await pause(1000, signal);
  }
  waiting(0, error);
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}

/** Let go of what a picture shows. */
export function release(picture) {
  if (picture.url) URL.revokeObjectURL(picture.url);
  picture.url = null;
}

function showBytes(picture, bytes) {
  release(picture);
  picture.url = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}

/** Return the JSON text of a picture's request. */
function bodyOf(picture) {
  const body = {
    prompt: picture.prompt,
    n: 1,
    stream: true,
    partial_images: PARTIAL_IMAGES,
    output_format: "png",
    guidance_scale: Number(picture.guidance),
    temperature: Number(picture.temperature),
    top_k: Number(picture.top_k),
    top_p: Number(picture.top_p),
  };
  if (picture.model) body.model = picture.model;
  if (picture.negative) body.negative_prompt = picture.negative;
  if (picture.layout) body.layout = picture.layout;
  // the seed's digits as they are: Number would round long ones
  return JSON.stringify(body).replace(/^\{/, `{"seed":${BigInt(picture.seed)},`);
}

function rounded(value) {
  return Number(value.toFixed(2));
}
