// A small grid that is painted with the classes of a model's layouts.

import { byId, element, moveWithArrows, singleTabStop } from "./dom.js";

const COLOR_NAMES = [
  "black", "navy", "blue", "dark green", "teal", "azure", "green", "spring green", "cyan",
  "maroon", "purple", "violet", "olive", "grey", "periwinkle", "lime", "light green", "light cyan",
  "red", "rose", "magenta", "orange", "salmon", "pink", "yellow", "light yellow", "white",
];

/** The layout of the chosen model: hidden for models without. */
export class LayoutEditor {
  constructor() {
    byId("layout-on").addEventListener("change", () => {
      byId("layout-editor").hidden = !byId("layout-on").checked;
    });
  }

  /** Show the editor of a model's layouts {kind, grid, classes}, or none. */
  useModel(layout) {
    const same = JSON.stringify(layout) === JSON.stringify(this.layout ?? null);
    byId("layout-section").hidden = layout === null;
    if (same) return;
    this.layout = layout;
    if (layout === null) {
      this.set(null);
      return;
    }
    const [rows, columns] = layout.grid;
    this.values = Array.from({ length: rows }, () => Array(columns).fill(layout.kind === "colors" ? 26 : 0));
    this.chosen = layout.kind === "colors" ? 18 : Math.min(1, layout.classes - 1);
    this.#build();
  }

  /** Return the painted classes [rows][columns], or null where nothing is painted. */
  get() {
    const painted = this.layout && byId("layout-on").checked;
    return painted ? this.values.map((row) => [...row]) : null;
  }

  /** Show classes, given as rows or as one list. Return false if they do not fit the model. */
  set(values) {
    byId("layout-on").checked = false;
    byId("layout-editor").hidden = true;
    if (values === null) return true;
    if (!this.layout) return false;
    const [rows, columns] = this.layout.grid;
    const flat = values.flat();
    const fits = flat.length === rows * columns
      && flat.every((value) => Number.isInteger(value) && value >= 0 && value < this.layout.classes);
    if (!fits) return false;
    this.values = Array.from({ length: rows }, (_, row) => flat.slice(row * columns, (row + 1) * columns));
    byId("layout-on").checked = true;
    byId("layout-editor").hidden = false;
    this.#showCells();
    return true;
  }

  #build() {
    const [, columns] = this.layout.grid;
    this.cells = element("div", { className: "layout-cells", role: "group", aria: { label: "Layout" } });
    this.cells.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    this.values.forEach((row, y) => row.forEach((_, x) => this.cells.append(this.#cell(y, x))));
    moveWithArrows(this.cells, { columns: () => columns });
    singleTabStop(this.cells);

    this.palette = element("div", { className: "palette", role: "group", aria: { label: "Classes to paint with" } });
    for (let value = 0; value < this.layout.classes; value++) this.palette.append(this.#swatch(value));
    moveWithArrows(this.palette, { columns: () => 9 });

    const fill = element("button", { type: "button", textContent: "Fill all" });
    fill.addEventListener("click", () => {
      this.values = this.values.map((row) => row.map(() => this.chosen));
      this.#showCells();
    });
    const hint = element("p", { className: "hint", textContent:
      "Choose a colour, then click or drag over the grid; with the keyboard, arrow keys move and Space paints" });
    byId("layout-editor").replaceChildren(this.palette, this.cells, fill, hint);
    this.#choose(this.chosen);
    this.#showCells();
  }

  #cell(y, x) {
    const cell = element("button", { type: "button", data: { y, x } });
    const paint = () => this.#paint(y, x);
    cell.addEventListener("click", paint);
    cell.addEventListener("pointerdown", (event) => {
      cell.releasePointerCapture(event.pointerId);  // touch would keep it: no other cell were entered
      paint();
    });
    cell.addEventListener("pointerenter", (event) => {
      if (event.buttons === 1) paint();
    });
    return cell;
  }

  #swatch(value) {
    const swatch = element("button", {
      type: "button", title: this.#name(value), aria: { label: this.#name(value), pressed: "false" } });
    swatch.style.background = this.#color(value);
    swatch.addEventListener("click", () => this.#choose(value));
    return swatch;
  }

  #choose(value) {
    this.chosen = value;
    [...this.palette.children].forEach((swatch, index) => {
      swatch.setAttribute("aria-pressed", String(index === value));
    });
    singleTabStop(this.palette, this.palette.children[value]);
  }

  #paint(y, x) {
    if (this.values[y][x] === this.chosen) return;
    this.values[y][x] = this.chosen;
    this.#showCells();
  }

  #showCells() {
    for (const cell of this.cells.children) {
      const { y, x } = cell.dataset;
      const value = this.values[y][x];
      cell.style.background = this.#color(value);
      cell.setAttribute("aria-label", `row ${Number(y) + 1}, column ${Number(x) + 1}: ${this.#name(value)}`);
    }
  }

  #name(value) {
    return this.layout.kind === "colors" ? COLOR_NAMES[value] : `class ${value}`;
  }

  #color(value) {
    if (this.layout.kind === "colors") {
      // red, green and blue are the digits in base 3, as in inference/layouts.py
      const [red, green, blue] = [Math.floor(value / 9), Math.floor(value / 3) % 3, value % 3]
        .map((level) => Math.round(level * 127.5));
      return `rgb(${red} ${green} ${blue})`;
    }
    // hues a golden angle apart stay distinct however many classes there are
    return `hsl(${(value * 137.5) % 360} 65% ${45 + 15 * (value % 3)}%)`;
  }
}
