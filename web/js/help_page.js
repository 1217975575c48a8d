// Shows a node's help page over the workflow, at the message that led there.

import { app } from "../../../scripts/app.js";
import { openDialog } from "./dialog.js";
import { languagesOf, say } from "./words.js";

const PAGES = new URL("../docs/", import.meta.url);

/** Open the help page of a node class, scrolled to the row about `message` if there is one. */
export async function openHelp(type, message = "") {
  const text = document.createElement("div");
  text.className = "blockskip-help-text comfy-markdown-content";
  text.style.cssText = "padding:0 12px 12px;overflow-wrap:anywhere";
  const dialog = openDialog("blockskip-help", text, { style: "width:min(860px,92vw);max-height:88vh;overflow:auto" });
  text.innerHTML = await page(type); // the frontend's own renderer removes scripts
  const row = rowAbout(text, message);
  row?.setAttribute("style", "outline:2px solid #e0674a;outline-offset:2px");
  row?.scrollIntoView({ block: "center" });
  return dialog;
}

async function page(type) {
  const languages = languagesOf(app.extensionManager?.setting?.get("Comfy.Locale"));
  for (const path of [...languages.map((language) => `${type}/${language}.md`), `${type}.md`]) {
    const reply = await fetch(new URL(path, PAGES));
    if (reply.ok) return rendered(await reply.text());
  }
  return rendered(say("help.missing"));
}

function rendered(markdown) {
  const render = app.extensionManager?.renderMarkdownToHtml;
  if (render) return render(markdown, PAGES.pathname.replace(/\/$/, ""));
  const plain = document.createElement("pre"); // an older frontend
  plain.textContent = markdown;
  plain.style.whiteSpace = "pre-wrap";
  return plain.outerHTML;
}

/** The row of the table whose quoted message fits; an ellipsis in it replaces a value. */
export function rowAbout(text, message) {
  const fits = (row) => {
    const quoted = (row.cells?.[0]?.textContent ?? "").match(/“(.+?)”/)?.[1];
    return quoted && quotes(quoted, message);
  };
  return [...text.querySelectorAll("tr")].find(fits) ?? null;
}

function quotes(quoted, message) {
  let place = 0;
  for (const part of quoted.split("…")) {
    const found = message.indexOf(part.trim(), place);
    if (found < 0) return false;
    place = found + part.trim().length;
  }
  return true;
}
