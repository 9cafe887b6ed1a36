// Shows a run: its pictures in a grid, the selected one large with its words, tools and recipe; and earlier runs.

import { byId, element, hide, moveWithArrows, singleTabStop } from "./dom.js";
import { release } from "./drawing.js";
import { WordLine } from "./word_line.js";

const MAX_RUNS = 60;  // what the history keeps: pictures stay in memory

export class Gallery {
  /** broughtBack(run): an earlier run was chosen. */
  constructor({ broughtBack }) {
    this.run = null;
    this.runs = [];
    this.entries = new Map();  // element of the history -> its run
    this.selected = null;
    this.broughtBack = broughtBack;
    this.words = new WordLine(byId("stage-picture"));
    moveWithArrows(byId("grid"), { columns: () => gridColumns() });
  }

  /** Show a run in place of the one before. */
  show(run) {
    if (this.run !== null && this.run !== run && !this.#keeps(this.run)) this.run.pictures.forEach(release);
    this.run = run;
    this.selected = null;
    byId("empty").hidden = true;
    byId("grid").hidden = false;
    byId("grid").dataset.count = run.pictures.length;
    byId("grid").replaceChildren(...run.pictures.map((picture) => this.#tile(picture)));
    singleTabStop(byId("grid"));
    run.pictures.forEach((picture) => this.update(picture));
    this.select(run.selected ?? run.pictures[0]);
  }

  /** Show a picture's present state, if it is of the run that is shown. */
  update(picture) {
    const at = this.run.pictures.indexOf(picture);
    if (at < 0) return;
    const tile = byId("grid").children[at].firstChild;
    showState(tile, picture);
    tile.setAttribute("aria-label", labelOf(picture));
    if (picture === this.selected) this.#showStage();
  }

  select(picture) {
    this.selected = picture;
    this.run.selected = picture;
    [...byId("grid").children].forEach((item, index) => {
      item.firstChild.setAttribute("aria-pressed", String(this.run.pictures[index] === picture));
    });
    this.#showStage();
  }

  /** Add the run that is shown to the history, or redraw its entry. */
  remember(run) {
    if (!hasFinished(run)) return;
    this.runs = [run, ...this.runs.filter((other) => other !== run)];
    for (const forgotten of this.runs.splice(MAX_RUNS)) forgotten.pictures.forEach(release);
    this.#showHistory();
  }

  /** Make the history anew; a focus on a run stays on it. */
  #showHistory() {
    const focused = document.activeElement.closest("#history li");
    const run = this.entries.get(focused);
    this.entries = new Map(this.runs.map((entry) => [this.#entry(entry), entry]));
    byId("history-section").hidden = false;
    byId("history").replaceChildren(...this.entries.keys());
    if (!run) return;
    // the last one in place of one that is forgotten
    const next = [...this.entries.keys()].at(this.runs.indexOf(run));
    next.firstChild.focus({ preventScroll: true });
  }

  /** Whether a run is in the history, or will be when its drawing ends. */
  #keeps(run) {
    return this.runs.includes(run) || hasFinished(run);
  }

  /** Return the remembered run with an address, or null. Some of its pictures may not be drawn yet. */
  find(address) {
    return this.runs.find((run) => run.address === address) ?? null;
  }

  #tile(picture) {
    const button = element("button", { type: "button", className: "tile" },
      element("span", { className: "frame" }), element("span", { className: "caption" }));
    button.addEventListener("click", () => this.select(picture));
    return element("li", {}, button);
  }

  #entry(run) {
    const shown = run.pictures.filter((picture) => picture.state === "done").slice(0, 4);
    const button = element("button", { type: "button", title: run.settings.prompt },
      element("span", { className: "thumbs", data: { count: shown.length } },
        ...shown.map((picture) => element("img", { src: picture.url, alt: "" }))),
      element("span", { className: "caption", textContent: run.settings.prompt }));
    button.setAttribute("aria-label", `Bring back: ${run.settings.prompt}, seed ${run.settings.seed}`
      + (run.settings.vary ? ", variations" : ""));
    button.addEventListener("click", () => this.broughtBack(run));
    return element("li", {}, button);
  }

  #showStage() {
    const picture = this.selected;
    const done = picture.state === "done";
    byId("stage").hidden = false;
    showState(byId("stage"), picture);
    if (done) byId("tools").hidden = false;
    else hide(byId("tools"), byId("grid").children[this.run.pictures.indexOf(picture)].firstChild);
    if (done) {
      byId("download").href = picture.url;
      byId("download").download = fileName(picture);
    }
    byId("note").hidden = !(picture.note || picture.revisedPrompt);
    byId("note").textContent = noteOf(picture);
    byId("facts").replaceChildren(...factsOf(picture));
    this.words.show(picture);
  }
}

function hasFinished(run) {
  return run.pictures.some((picture) => picture.state === "done");
}

function showState(holder, picture) {
  const frame = holder.querySelector(".frame");
  frame.dataset.state = picture.state;
  let image = frame.querySelector("img");
  if (picture.url && !image) {
    image = element("img");
    image.addEventListener("load", () => {
      // small pictures are shown with their pixels, larger ones smoothly
      image.classList.toggle("pixels", image.naturalWidth <= 128);
    });
    frame.prepend(image);
  }
  if (!picture.url && image) image.remove();
  if (picture.url) {
    image.src = picture.url;
    image.alt = labelOf(picture);
  }
  const caption = holder.querySelector(".caption");
  if (caption) caption.textContent = captionOf(picture);
}

function captionOf(picture) {
  const states = { waiting: "waiting", cancelled: "cancelled", failed: "not drawn" };
  if (picture.state in states) return states[picture.state];
  if (!picture.vary) return `seed ${picture.seed}`;
  return `guidance ${picture.guidance}, temperature ${picture.temperature}`;
}

function labelOf(picture) {
  const states = { waiting: "waiting", drawing: "being drawn", cancelled: "cancelled", failed: "not drawn", done: "" };
  const state = states[picture.state];
  const changes = picture.vary ? `, guidance ${picture.guidance}, temperature ${picture.temperature}` : "";
  return `${picture.prompt}, seed ${picture.seed}${changes}${state ? `: ${state}` : ""}`;
}

function noteOf(picture) {
  const drawn = picture.revisedPrompt && picture.revisedPrompt !== picture.prompt
    ? `Drawn as “${picture.revisedPrompt}”.` : "";
  return [picture.note, drawn].filter(Boolean).join(" ");
}

function factsOf(picture) {
  const facts = {
    Seed: picture.seed, Guidance: picture.guidance, Temperature: picture.temperature, "Top-k": picture.top_k,
    "Top-p": picture.top_p,
  };
  if (picture.negative) facts.Not = picture.negative;
  if (picture.layout) facts.Layout = "painted";
  if (picture.model) facts.Model = picture.model;
  return Object.entries(facts).map(([name, value]) => element("div", {},
    element("dt", { textContent: name }), element("dd", { textContent: value })));
}

function fileName(picture) {
  const words = picture.prompt.toLowerCase().match(/[\p{Letter}\p{Number}]+/gu) ?? ["picture"];
  return `${words.join("-").slice(0, 60)}-seed${picture.seed}.png`;
}

function gridColumns() {
  return getComputedStyle(byId("grid")).gridTemplateColumns.split(" ").length;
}
