// Files given to the page: chosen, or dropped anywhere.

import { byId } from "./dom.js";

/** Hand on a file that is chosen, or dropped anywhere on the page. */
export function listenForFiles(take) {
  byId("recipe-file").addEventListener("change", async ({ target }) => {
    await take(target.files[0]);
    target.value = "";  // the same file may be chosen again
  });
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    byId("drop-veil").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) byId("drop-veil").hidden = true;
  });
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    byId("drop-veil").hidden = true;
    take(event.dataTransfer.files[0]);
  });
}
