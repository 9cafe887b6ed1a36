// The prompt under the selected picture: a word that is hovered, focused or tapped shows what it painted.

import { byId, element, moveWithArrows, singleTabStop } from "./dom.js";
import { paintHeat, placeOf, promptParts, wordsOf } from "./words.js";

const HINT = "Point at a word to see which part it painted; with the keyboard, arrow keys go from word to word";

export class WordLine {
  /** frames(): the pictures that are shown with their frames, the selected one first. */
  constructor(frames) {
    this.frames = frames;
    this.picture = null;
    this.pinned = null;
    this.active = null;
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
      byId("words-hint").textContent = HINT;
    } catch (error) {
      if (this.picture !== picture) return;
      byId("words-hint").textContent = error.status === 404
        ? "The server no longer keeps what the words painted; draw the picture again to see it."
        : `What the words painted cannot be shown: ${error.message}.`;
    }
  }

  #buttons(prompt, words) {
    return promptParts(prompt, words).map((part) => (part.word === null ? part.text : this.#button(part)));
  }

  #button({ text, word }) {
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

  /** Lay the heat of a word over every picture of the run, or take it away. */
  #activate(word) {
    this.active = word;
    if (word === null) {
      byId("word-place").textContent = "";
      for (const canvas of document.querySelectorAll(".frame canvas")) canvas.remove();
      return;
    }
    for (const { picture, frame } of this.frames()) {
      if (picture.state === "done" && picture.id) this.#paint(picture, frame, word);
    }
  }

  async #paint(picture, frame, word) {
    let words;
    try {
      words = await wordsOf(picture);
    } catch {
      return;  // the selected picture's failure is said by #load; the others only lack their heat
    }
    const gone = this.active !== word || !frame.isConnected || word >= words.length;
    if (gone) return;
    let canvas = frame.querySelector("canvas");
    if (!canvas) {
      canvas = element("canvas", { className: "heat", aria: { hidden: "true" } });
      frame.append(canvas);
    }
    paintHeat(canvas, words[word].weights);
    canvas.dataset.word = words[word].word;
    if (picture === this.picture) {
      byId("word-place").textContent = `“${words[word].word}” painted ${placeOf(words[word].weights)}`;
    }
  }
}
