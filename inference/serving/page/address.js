// The settings of a drawing, as the page's address keeps them: #/?prompt=octopus&seed=7...

// Numbers stay the text that was typed: a seed of 19 digits is larger than JavaScript's numbers hold.
const NAMES = ["prompt", "negative", "seed", "count", "guidance", "temperature", "top_k", "top_p", "model", "layout",
  "vary"];

/** Return the address (from # on) of settings; what is empty is left out. */
export function toAddress(settings) {
  const query = new URLSearchParams();
  for (const name of NAMES) {
    const value = settings[name];
    if (value === null || value === undefined || value === "" || value === false) continue;
    query.set(name, encodeValue(name, value));
  }
  return `#/?${query}`;
}

/** Return the settings in an address, only those that it names; null for an address without a prompt. */
export function fromAddress(hash) {
  const start = hash.indexOf("?");
  if (start < 0) return null;
  const query = new URLSearchParams(hash.slice(start + 1));
  if (!query.get("prompt")) return null;
  const settings = {};
  for (const name of NAMES) {
    if (query.has(name)) settings[name] = decodeValue(name, query.get(name));
  }
  return settings;
}

function encodeValue(name, value) {
  if (name === "layout") return value.map((row) => row.join(".")).join("-");
  if (name === "vary") return "1";
  return value;
}

function decodeValue(name, text) {
  if (name === "layout") return text.split("-").map((row) => row.split(".").map(Number));
  if (name === "vary") return text === "1";
  return text;
}
