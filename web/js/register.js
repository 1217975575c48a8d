// Registers our extensions with the page.

import { app } from "../../../scripts/app.js";

/** Register one, unless the pack is installed twice and the other copy has: the frontend refuses duplicate names. */
export function register(extension) {
  if (!app.extensions?.some(({ name }) => name === extension.name)) app.registerExtension(extension);
}
