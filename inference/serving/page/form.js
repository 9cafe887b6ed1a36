// The form: reads and fills its fields, checks them before anything is sent.

import { byId } from "./dom.js";
import { isSeed } from "./drawing.js";

const FIELDS = ["prompt", "negative", "seed", "count", "guidance", "temperature", "top_k", "top_p"];
const SAMPLING = {
  guidance: "guidance_scale", temperature: "temperature", top_k: "top_k", top_p: "top_p",
};
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
    if (settings.model && this.models.has(settings.model)) {
      byId("model").value = settings.model;
      this.#useModel();
    } else if (settings.model && this.models.size > 0) {
      notes.push(`It was drawn by the model “${settings.model}”, which this server does not have; `
        + `“${byId("model").value}” will draw something else.`);
    }
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

  /** Mark what cannot be drawn, and focus the first such field. Return whether all is well. */
  check() {
    const settings = this.read();
    const errors = { prompt: settings.prompt ? "" : "Say what should be in the picture." };
    for (const name of ["count", "guidance", "temperature", "top_k", "top_p"]) errors[name] = numberError(byId(name));
    if (settings.seed && !isSeed(settings.seed, Number(settings.count))) {
      errors.seed = "A seed is a whole number from 0 to 9223372036854775807, for the last picture too.";
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
  const above = `at least ${input.min}`;
  const bounds = input.max ? `${input.min} to ${input.max}` : above;
  if (rangeUnderflow || rangeOverflow || stepMismatch) {
    return input.step === "any" ? `A number, ${bounds}.` : `A whole number, ${bounds}.`;
  }
  return "";
}

function growWithText(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
}
