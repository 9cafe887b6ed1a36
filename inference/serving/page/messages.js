// Errors in words.

import { ApiError, Unreachable } from "./api.js";

const KEPT = "What you typed is still here.";

/** Return what to say about a failed drawing, and whether trying again may help. */
export function explain(error) {
  if (error instanceof Unreachable) {
    return { text: `${sentence(error.message)} Is “tokenloom serve” still running? ${KEPT}`, again: true };
  }
  if (!(error instanceof ApiError)) {
    return { text: `The page failed: ${error.message}. ${KEPT}`, again: true };
  }
  const said = sentence(error.message);
  if (error.status === 401) return { text: `The server asks for a key. ${said}`, again: false };
  if (error.status === 504) {
    return { text: `Drawing took longer than the server allows. ${said} ${KEPT}`, again: true };
  }
  if (error.retryAfter !== null) return { text: `The server has been busy for long. ${said} ${KEPT}`, again: true };
  if (error.status >= 500) {
    // a mistake in the server says so itself; a server that stops or lacks a model says only that
    const failed = said.startsWith("The server failed") ? said : `The server failed. ${said}`;
    return { text: `${failed} ${KEPT}`, again: true };
  }
  return { text: `Not drawn. ${said}`, again: false };
}

function sentence(text) {
  const upper = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(upper) ? upper : `${upper}.`;
}
