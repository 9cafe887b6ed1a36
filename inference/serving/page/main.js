// Ties the page together: form -> address -> run -> gallery.

import { fetchModels, isKey, setKey } from "./api.js";
import { fromAddress, toAddress } from "./address.js";
import { byId, element, hide } from "./dom.js";
import { drawRun, isOpen, newRun, newSeed } from "./drawing.js";
import { listenForFiles } from "./files.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { LayoutEditor } from "./layout.js";
import { explain } from "./messages.js";
import { readRecipe } from "./recipe.js";

const EXAMPLES = ["octopus", "red heart", "smiling cat face with heart eyes", "rocket", "four leaf clover", "pizza"];

let ready = null;  // resolves, once the models are asked for, to whether they are known
let current = null;  // {run, abort} while it is drawn

const layout = new LayoutEditor();
const form = new Form(layout);
const gallery = new Gallery({ broughtBack: (run) => bringBack(run) });

// ---- drawing

/** Draw what the form holds; `changes` override it ("vary", a new seed). sameEntry: as `putAddress` has it. */
async function draw(changes = {}, { sameEntry = false } = {}) {
  if (!await modelsKnown()) return;
  if (!form.check()) return;
  const settings = { ...form.read(), ...changes };
  if (!settings.seed) settings.seed = newSeed();
  byId("seed").value = settings.seed;

  const address = toAddress(settings);
  if (current?.run.address === address) return;  // pressed twice
  const known = gallery.find(address);
  if (known) {
    bringBack(known, { sameEntry });
    if (known.pictures.some(isOpen)) await finish(known);
    else say("The same words, seed and settings give the same pictures. Again draws with a new seed.");
    return;
  }
  stop();
  const run = { ...newRun(settings), address };
  putAddress(address, sameEntry);
  show(run);
  await finish(run);
}

/** Draw what is not yet drawn of a run, and say how it went. */
async function finish(run) {
  const abort = new AbortController();
  const mine = { run, abort };
  current = mine;
  clearMessage();
  showBusy(true);
  const changed = (picture) => {
    gallery.update(picture);
    if (current === mine) say(progress(run));
  };
  const waiting = (seconds, error) => {
    if (current === mine) showWait(seconds, error);
  };
  await drawRun(run, { signal: abort.signal, changed, waiting });
  gallery.remember(run);
  if (current !== mine) return;  // cancelled, or another one has begun
  current = null;
  showBusy(false);
  showWait(0);
  const failed = run.pictures.find((picture) => picture.state === "failed");
  if (failed) showError(failed.error, run);
}

function stop() {
  current?.abort.abort();
  current = null;
  showBusy(false);
  showWait(0);
}

function cancel() {
  if (!current) return;
  stop();
  say("Cancelled. What was finished stays.");
}

function progress(run) {
  const done = run.pictures.filter((picture) => picture.state === "done").length;
  const total = run.pictures.length;
  if (done === total) return total === 1 ? "The picture is finished." : `All ${total} pictures are finished.`;
  return total === 1 ? "Drawing the picture …" : `Drawing ${total} pictures, ${done} finished …`;
}

/** Show an earlier run without drawing it again. */
function bringBack(run, { sameEntry = false } = {}) {
  stop();
  clearMessage();
  form.fill(run.settings);
  putAddress(run.address, sameEntry);
  show(run);
  say("Brought back from this session.");
}

function show(run) {
  gallery.show(run);
  // on a phone the pictures are below the form
  if (matchMedia("(max-width: 899px)").matches) byId("output").scrollIntoView();
}

/** Put a run's address in place. sameEntry: no new entry for the Back button, when it was an address that led here. */
function putAddress(address, sameEntry) {
  document.title = `${byId("prompt").value.trim()} · Tokenloom`;
  if (location.hash === address) return;
  if (sameEntry) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
}

/** Draw what the address says. */
async function openAddress() {
  const settings = fromAddress(location.hash);
  if (!settings || !await modelsKnown()) return;
  const notes = form.fill(settings);
  await draw(settings.vary ? { vary: true } : {}, { sameEntry: true });
  if (notes.length > 0) say(notes.join(" "));
}

// ---- what is said

function say(text) {
  if (byId("status").textContent !== text) byId("status").textContent = text;
}

function clearMessage() {
  hide(byId("message"), byId("draw"));
  byId("message-text").textContent = "";
  byId("message-again").hidden = true;
}

function showError(error, run) {
  const { text, again } = explain(error);
  form.markError(error);
  byId("message").hidden = false;
  byId("message-text").textContent = text;
  byId("message-again").hidden = !again;
  byId("message-again").onclick = () => goOn(run);
  say("");
  if (error.status === 401) askForKey(run);
}

/** Finish a run after an error. Without one, draw what was typed meanwhile, or else what the address says. */
async function goOn(run) {
  clearMessage();
  if (!await modelsKnown()) return;
  if (run) await finish(run);
  else if (byId("prompt").value.trim()) await draw();
  else await openAddress();
}

function showWait(seconds, error = null) {
  const waits = seconds > 0;
  if (waits) {
    byId("message").hidden = false;
    const reason = error.status === 429 ? "The server is busy." : "The server is starting or being stopped.";
    const text = `${reason} Trying again by itself.`;
    if (byId("message-text").textContent !== text) byId("message-text").textContent = text;
  } else if (byId("message-wait").textContent) {
    clearMessage();
  }
  // beside the alert, not in it: a countdown would be read aloud each second
  byId("message-wait").textContent = waits ? `Trying again in ${seconds} s.` : "";
}

function showBusy(busy) {
  if (busy) byId("cancel").hidden = false;
  else hide(byId("cancel"), byId("draw"));
  byId("results").setAttribute("aria-busy", String(busy));
}

function askForKey(run) {
  byId("key-section").hidden = false;
  byId("key").focus();
  byId("use-key").onclick = () => {
    const key = byId("key").value.trim();
    const sendable = isKey(key);
    byId("key-error").textContent = sendable ? "" : "A key is letters, digits and signs of ASCII, without spaces.";
    byId("key").setAttribute("aria-invalid", String(!sendable));
    if (!sendable) {
      byId("key").focus();
      return;
    }
    setKey(key);
    hide(byId("key-section"), byId("prompt"));
    goOn(run);
  };
}

// ---- recipes from files

async function fillFromFile(file) {
  if (!file || !await modelsKnown()) return;
  try {
    const recipe = await readRecipe(file);
    const notes = form.fill(recipe);
    clearMessage();
    say([`The recipe of ${file.name} is filled in; Draw makes it again.`, ...notes].join(" "));
    byId("prompt").focus();
  } catch (error) {
    clearMessage();  // an earlier error's Try again is not this one's
    byId("message").hidden = false;
    byId("message-text").textContent = error.message;
  }
}

// ---- start

/** Return whether the models are known; asks the server again if it did not say. */
function modelsKnown() {
  ready ??= askForModels();
  return ready;
}

async function askForModels() {
  try {
    form.useModels(await fetchModels());
    return true;
  } catch (error) {
    ready = null;
    showError(error, null);
    return false;
  }
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  byId("again").addEventListener("click", () => draw({ seed: newSeed() }));
  byId("like").addEventListener("click", () => {
    form.fill({ ...gallery.selected, count: gallery.run.settings.count });
    draw({ vary: true });
  });
  byId("cancel").addEventListener("click", cancel);
  byId("prompt").addEventListener("keydown", (event) => {
    const composing = event.isComposing;  // Enter then only ends the input of a character
    if (event.key === "Enter" && !event.shiftKey && !composing) {
      event.preventDefault();
      draw();
    }
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;  // as with Enter
    document.body.classList.add("no-tips");  // until the focus or the mouse moves on
    cancel();
  });
  for (const kind of ["focusin", "pointerover"]) {
    addEventListener(kind, () => document.body.classList.remove("no-tips"));
  }
  addEventListener("popstate", openAddress);
  byId("key").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();  // it would press Draw
    byId("use-key").click();
  });
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();  // the address after # holds the settings
    byId("results").focus();
  });
}

for (const text of EXAMPLES) {
  const chip = element("button", { type: "button", textContent: text });
  chip.addEventListener("click", () => {
    byId("prompt").value = text;
    byId("prompt").dispatchEvent(new Event("input"));
    draw();
  });
  byId("examples").append(chip);
}
byId("settings").open = matchMedia("(min-width: 900px)").matches;
listen();
listenForFiles(fillFromFile);
await modelsKnown();
await openAddress();
