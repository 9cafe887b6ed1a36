// The prompt under the selected picture: a word that is hovered, focused or tapped shows what it painted.

import { byId, element, moveWithArrows, singleTabStop } from "./dom.js";
import { paintHeat, placeOf, promptParts, wordsOf } from "./words.js";

const HINT = "Point at a word to see which part it painted; with the keyboard, arrow keys go from word to word";

export class WordLine {
  /** frame: holds the picture. */
  constructor(frame) {
    this.frame = frame;
    this.picture = null;
    this.pinned = null;
    moveWithArrows(byId("words"));
  }

  /** Show the words of a picture as far as it is drawn. */
  show(picture) {
    const same = this.picture === picture && this.shownState === picture.state;
    if (same) return;
    this.picture = picture;
    this.shownState = picture.state;
    this.pinned = null;
    this.#activate(null);
    const prompt = picture.revisedPrompt ?? picture.prompt;
    byId("words").replaceChildren(prompt);
    byId("words-hint").textContent = "";
    if (picture.state === "done" && picture.id) this.#load(picture, prompt);
  }

  async #load(picture, prompt) {
    try {
      const words = await wordsOf(picture);
      if (this.picture !== picture) return;
      byId("words").replaceChildren(...this.#buttons(prompt, words));
      singleTabStop(byId("words"));
      byId("words-hint").textContent = words.length > 0 ? HINT : "";
    } catch (error) {
      picture.forgotten = error.status === 404;
      if (this.picture !== picture) return;
      byId("words-hint").textContent = picture.forgotten
        ? "The server no longer keeps what the words painted; draw the picture again to see it."
        : `What the words painted cannot be shown: ${error.message}.`;
    }
  }

  #buttons(prompt, words) {
    return promptParts(prompt, words).map(({ text, word }) => (word ? this.#button(text, word) : text));
  }

  #button(text, word) {
    const button = element("button", { type: "button", textContent: text, aria: { pressed: "false" } });
    button.addEventListener("pointerenter", (event) => {
      if (event.pointerType !== "touch") this.#activate(word);  // a tap is a click: it would undo itself
    });
    button.addEventListener("pointerleave", () => this.#activate(this.pinned));
    button.addEventListener("focus", () => {
      if (button.matches(":focus-visible")) this.#activate(word);
    });
    button.addEventListener("blur", () => this.#activate(this.pinned));
    button.addEventListener("click", () => {
      this.pinned = this.pinned === word ? null : word;
      for (const other of byId("words").querySelectorAll("button")) {
        other.setAttribute("aria-pressed", String(other === button && this.pinned !== null));
      }
      this.#activate(this.pinned);
    });
    return button;
  }

  /** Lay the heat of a word over the picture, or take it away. */
  #activate(word) {
    this.frame.querySelector("canvas")?.remove();
    byId("word-place").textContent = "";
    if (word === null) return;
    const canvas = element("canvas", { className: "heat", data: { word: word.word }, aria: { hidden: "true" } });
    paintHeat(canvas, word.weights);
    this.frame.append(canvas);
    byId("word-place").textContent = `“${word.word}” painted ${placeOf(word.weights)}`;
  }
}
