// Which part of a picture a word of its prompt painted: heat over the picture, after inference/attention_maps.py.

import { fetchWords } from "./api.js";

/** Return the words of a finished picture; the server is asked once per picture. */
export function wordsOf(picture) {
  picture.words ??= fetchWords(picture.id).catch((error) => {
    picture.words = null;  // may be asked again
    throw error;
  });
  return picture.words;
}

/** Split a prompt into parts {text, word}: word is one of `words`, null between words. */
export function promptParts(prompt, words) {
  // offsets count characters as Python does; a JavaScript string counts an emoji twice
  const characters = Array.from(prompt);
  const parts = [];
  let at = 0;
  for (const word of words) {
    if (word.start < at || word.end > characters.length) continue;
    if (word.start > at) parts.push({ text: characters.slice(at, word.start).join(""), word: null });
    parts.push({ text: characters.slice(word.start, word.end).join(""), word });
    at = word.end;
  }
  if (at < characters.length) parts.push({ text: characters.slice(at).join(""), word: null });
  return parts;
}

/** Paint weights [rows][columns] on a canvas that lies over the picture: reddish where high, dark where low. */
export function paintHeat(canvas, weights) {
  const rows = weights.length;
  const columns = weights[0].length;
  const cells = new OffscreenCanvas(columns, rows);
  const pixels = new ImageData(columns, rows);
  const shares = sharesOf(weights);
  shares.flat().forEach((share, cell) => {
    const dark = 0.6 * (1 - share);
    const red = 0.4 * share;
    const alpha = dark + red;
    pixels.data.set([255 * red / alpha, 60 * red / alpha, 30 * red / alpha, 255 * alpha], 4 * cell);
  });
  cells.getContext("2d").putImageData(pixels, 0, 0);

  canvas.width = 256;
  canvas.height = Math.round(256 * rows / columns);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(cells, 0, 0, canvas.width, canvas.height);
}

/** Say in words where the weights are high: "mostly at the top left". */
export function placeOf(weights) {
  const shares = sharesOf(weights);
  const rows = shares.length;
  const columns = shares[0].length;
  let total = 0;
  let down = 0;
  let right = 0;
  let high = 0;
  shares.forEach((row, y) => row.forEach((share, x) => {
    const weight = share ** 2;  // the clear parts decide, not the faint rest
    total += weight;
    down += weight * (y + 0.5) / rows;
    right += weight * (x + 0.5) / columns;
    high += share > 0.5 ? 1 : 0;
  }));
  if (total === 0 || high > 0.5 * rows * columns) return "nearly everywhere";
  const vertical = ["top", "", "bottom"][third(down / total)];
  const horizontal = ["left", "", "right"][third(right / total)];
  const place = [vertical, horizontal].filter(Boolean).join(" ");
  return place ? `mostly at the ${place}` : "mostly in the middle";
}

function third(share) {
  if (share < 0.42) return 0;
  return share > 0.58 ? 2 : 1;
}

/** Return weights as shares of the way from the lowest to the highest. */
function sharesOf(weights) {
  const all = weights.flat();
  const lowest = Math.min(...all);
  const spread = Math.max(...all) - lowest;
  return weights.map((row) => row.map((weight) => (spread > 0 ? (weight - lowest) / spread : 0)));
}
