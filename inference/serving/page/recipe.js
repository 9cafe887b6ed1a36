// Read the recipe that a PNG carries: the chunk `tokenloom`, JSON.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEYWORD = "tokenloom";
const MAX_BYTES = 64 * 1024 * 1024;

/** A file that holds no recipe, in words. */
export class RecipeError extends Error {}

/** Return a file's settings, as address.js names them. RecipeError naming the file. */
export async function readRecipe(file) {
  if (file.size > MAX_BYTES) throw new RecipeError(`${file.name} is larger than 64 MB; drop a picture drawn here`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((value, index) => bytes[index] === value)) {
    throw new RecipeError(`${file.name} is not a PNG; recipes are read from PNG files here`);
  }
  const text = findText(bytes);
  if (text === null) throw new RecipeError(`${file.name} carries no recipe: it was not drawn by Tokenloom, or a `
    + "program that saved it again has dropped it");
  let recipe;
  try {
    recipe = [JSON.parse(text)].flat()[0];  // a grid of pictures holds a list
  } catch {
    recipe = null;
  }
  if (typeof recipe?.prompt !== "string") throw new RecipeError(`${file.name}: its recipe cannot be read`);
  return settingsOf(recipe, text);
}

/** Return a recipe's settings; `drawnBy` holds what else the picture depends on. */
function settingsOf(recipe, text) {
  const given = (value) => (value === null || value === undefined ? "" : String(value));
  return {
    // what was drawn, not what was asked for: another server may rewrite it in another way, or not at all
    prompt: recipe.revised_prompt ?? recipe.prompt,
    negative: given(recipe.negative_prompt),
    seed: seedOf(recipe, text),
    guidance: given(recipe.guidance_scale),
    temperature: given(recipe.temperature),
    top_k: given(recipe.top_k),
    top_p: given(recipe.top_p),
    model: given(recipe.model),
    layout: Array.isArray(recipe.layout) ? recipe.layout : null,
    drawnBy: recipe,
  };
}

/** Return the seed's digits from the JSON text itself, where parsing would round them. */
function seedOf(recipe, text) {
  if (recipe.seed === undefined || Number.isSafeInteger(recipe.seed)) return String(recipe.seed ?? "");
  return text.match(/(?<!\\)"seed"\s*:\s*(\d+)/)?.[1] ?? "";
}

/** Return the text of the chunk `tokenloom` (tEXt, or iTXt that is not compressed), or null. */
function findText(bytes) {
  const view = new DataView(bytes.buffer);
  let at = SIGNATURE.length;
  while (at + 12 <= bytes.length) {
    const length = view.getUint32(at);
    const kind = latin1(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    at += 12 + length;
    const end = data.indexOf(0);
    if (end < 0 || latin1(data.subarray(0, end)) !== KEYWORD) continue;
    if (kind === "tEXt") return latin1(data.subarray(end + 1));
    if (kind === "iTXt" && data[end + 1] === 0) return internationalText(data.subarray(end + 3));
  }
  return null;
}

/** Skip language and translated keyword, each ended by 0; the rest is UTF-8. */
function internationalText(data) {
  const language = data.indexOf(0);
  const keyword = data.indexOf(0, language + 1);
  return new TextDecoder().decode(data.subarray(keyword + 1));
}

function latin1(bytes) {
  // TextDecoder("latin1") would read windows-1252
  return Array.from(bytes, (value) => String.fromCharCode(value)).join("");
}
