// Small helpers around the document.

export const byId = (id) => document.getElementById(id);

/** Make an element: properties are set as they are, `data` and `aria` as attributes of these kinds. */
export function element(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, value);
  made.append(...children);
  return made;
}

/** Hide an element; a focus inside it goes to another one instead of being lost. */
export function hide(hidden, next) {
  const focused = hidden.contains(document.activeElement);
  hidden.hidden = true;
  if (focused) next.focus();
}

/** Let arrow keys, Home and End move among the children of a container: it is one stop of the Tab key. */
export function moveWithArrows(container, { columns = () => 1 } = {}) {
  const items = () => [...container.querySelectorAll("button:not([disabled])")];

  container.addEventListener("keydown", (event) => {
    const all = items();
    const now = all.indexOf(document.activeElement);
    if (now < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const moves = {
      ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + columns(), ArrowUp: now - columns(),
      Home: 0, End: all.length - 1,
    };
    const next = all[moves[event.key]];
    if (event.key in moves) event.preventDefault();
    if (next) next.focus();
  });

  container.addEventListener("focusin", (event) => {
    for (const item of items()) item.tabIndex = item === event.target ? 0 : -1;
  });
}

/** Make `current` (or the first) the one child that the Tab key reaches. */
export function singleTabStop(container, current = null) {
  const all = [...container.querySelectorAll("button")];
  const chosen = all.includes(current) ? current : all[0];
  for (const item of all) item.tabIndex = item === chosen ? 0 : -1;
}
