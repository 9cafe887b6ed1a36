// The form: reads and fills its fields, checks them before anything is sent.

import { byId } from "./dom.js";
import { isSeed, MAX_SEED } from "./drawing.js";

const FIELDS = ["prompt", "negative", "seed", "count", "guidance", "temperature", "top_k", "top_p"];
const SAMPLING = {
  guidance: "guidance_scale", temperature: "temperature", top_k: "top_k", top_p: "top_p",
};
/** What a recipe may hold beside these, and a request may not. */
const NOT_IN_FORM = ["guidance_schedule", "guidance_power", "guidance_end", "min_p", "weights"];
/** Fields of the API -> fields of the form, for errors that name one. */
const OF_PARAM = {
  prompt: "prompt", negative_prompt: "negative", seed: "seed", guidance_scale: "guidance", temperature: "temperature",
  top_k: "top_k", top_p: "top_p", layout: "layout",
};

export class Form {
  constructor(layout) {
    this.layout = layout;
    this.models = new Map();
    for (const name of FIELDS) byId(name).addEventListener("input", () => this.#mark(name, ""));
    byId("model").addEventListener("change", () => this.#useModel());
    growWithText(byId("prompt"));
  }

  /** Offer the server's models; the choice is shown where there are several. */
  useModels(models) {
    this.models = new Map(models.map((model) => [model.id, model.tokenloom ?? {}]));
    byId("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    byId("model-choice").hidden = models.length < 2;
    this.#useModel();
  }

  /** Return the settings as typed. */
  read() {
    const settings = { model: byId("model").value, layout: this.layout.get() };
    for (const name of FIELDS) settings[name] = byId(name).value.trim();
    return settings;
  }

  /** Fill in what `settings` names. Return notes about what could not be taken over. */
  fill(settings) {
    const notes = [];
    const named = this.#served(settings);
    if (named !== null) byId("model").value = named;
    this.#useModel();
    // where there is a fingerprint, it says more than the name does
    const missing = settings.model && named === null && !settings.drawnBy?.model_fingerprint;
    const chosen = byId("model").value;
    if (missing) notes.push(`There is no model “${settings.model}” here: “${chosen}” draws instead.`);
    if (settings.drawnBy) notes.push(...this.#differences(settings.drawnBy));
    for (const name of FIELDS) {
      if (settings[name] !== undefined && settings[name] !== "") byId(name).value = settings[name];
    }
    // what a recipe leaves out was not there; the other fields always hold something
    byId("negative").value = settings.negative ?? "";
    if (!this.layout.set(settings.layout ?? null)) notes.push("Its layout does not fit this model and is left out.");
    for (const name of FIELDS) this.#mark(name, "");
    byId("prompt").dispatchEvent(new Event("input"));
    return notes;
  }

  /** Return the served model that settings name, or null: by its fingerprint, or else by its name. */
  #served({ model, drawnBy }) {
    const fingerprint = drawnBy?.model_fingerprint;
    const ids = [...this.models.keys()];
    // a recipe of the shipped model names none, and a name may be a folder's elsewhere
    const same = ids.filter((id) => fingerprint && this.models.get(id).fingerprint === fingerprint);
    if (same.length > 0) return same.includes(model) ? model : same[0];
    return this.models.has(model) ? model : null;
  }

  /** Say why the chosen model will draw another picture than the recipe's. */
  #differences(recipe) {
    const chosen = byId("model").value;
    const model = this.models.get(chosen) ?? {};
    const other = recipe.model_fingerprint && model.fingerprint && recipe.model_fingerprint !== model.fingerprint;
    if (other) {
      const name = recipe.model ?? "the one that ships with Tokenloom";
      return [`It was drawn by another model (${name}): “${chosen}” will draw another picture.`];
    }
    const differing = NOT_IN_FORM.filter((name) => {
      const own = model.sampling?.[name] ?? (name === "weights" ? model.weights : undefined);
      return recipe[name] !== undefined && own !== undefined && recipe[name] !== own;
    });
    if (differing.length === 0) return [];
    return [`It was drawn with another ${differing.join(", ").replaceAll("_", " ")}, which this server does not take: `
      + "the picture will differ."];
  }

  /** Mark what cannot be drawn, and focus the first such field. Return whether all is well. */
  check() {
    const settings = this.read();
    const errors = { prompt: settings.prompt ? "" : "Say what should be in the picture." };
    for (const name of ["count", "guidance", "temperature", "top_k", "top_p"]) errors[name] = numberError(byId(name));
    if (settings.seed && !isSeed(settings.seed, Number(settings.count))) {
      errors.seed = `A seed is a whole number from 0 to ${MAX_SEED}, for the last picture too.`;
    }
    if (settings.negative && Number(settings.guidance) === 1) {
      errors.negative = "A negative prompt acts through guidance, and guidance is 1. Raise it, or empty this field.";
    }
    for (const name of FIELDS) this.#mark(name, errors[name] ?? "");
    const first = FIELDS.find((name) => errors[name]);
    if (first) this.#focus(first);
    return !first;
  }

  /** Mark the field that an error of the server names. Return whether there is one. */
  markError(error) {
    const name = OF_PARAM[error.param];
    if (!name) return false;
    this.#mark(name, error.message);
    return true;
  }

  #useModel() {
    const model = this.models.get(byId("model").value) ?? {};
    const sampling = model.sampling ?? {};
    for (const [field, name] of Object.entries(SAMPLING)) {
      const input = byId(field);
      // what was typed stays; what is empty or another model's default follows the model
      const untouched = input.value === "" || input.value === input.dataset.standard;
      const standard = sampling[name] === undefined ? "" : String(sampling[name]);
      if (untouched) input.value = standard;
      input.dataset.standard = standard;
    }
    byId("model-title").textContent = model.title ?? "";
    this.layout.useModel(model.layout ?? null);
  }

  #mark(name, message) {
    byId(`${name}-error`).textContent = message;
    const input = byId(name);
    if (input) input.setAttribute("aria-invalid", String(message !== ""));
  }

  #focus(name) {
    byId("settings").open ||= byId("settings").contains(byId(name));
    byId(name).focus();
  }
}

function numberError(input) {
  const { valueMissing, badInput, rangeUnderflow, rangeOverflow, stepMismatch } = input.validity;
  if (valueMissing || badInput) return "A number is needed here.";
  const { above } = input.dataset;  // a bound that is itself no value, which HTML cannot say
  const outside = rangeUnderflow || rangeOverflow || stepMismatch || Number(input.value) === Number(above ?? NaN);
  if (!outside) return "";
  const kind = input.step === "any" ? "A number" : "A whole number";
  if (above) return `${kind}, above ${above}, up to ${input.max}.`;
  return input.max ? `${kind}, ${input.min} to ${input.max}.` : `${kind} of at least ${input.min}.`;
}

function growWithText(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  addEventListener("resize", fit);  // also when a phone is turned, or the page zoomed
}
