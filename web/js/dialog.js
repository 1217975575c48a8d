// A window over the workflow, closed by its button, by Escape, or by a click beside it. Independent of ComfyUI.

import { say } from "./words.js";

/** Open a window with an element in it; `onKey(event)` is told of keys, which ComfyUI's shortcuts then do not get. */
export function openDialog(className, content, { style = "", onKey = () => {} } = {}) {
  const dialog = document.createElement("dialog");
  dialog.className = className;
  dialog.style.cssText =
    "margin:auto;padding:12px;border-radius:8px;border:1px solid var(--border-color,#4e4e4e);" +
    `background:var(--comfy-menu-bg,#222);color:var(--input-text,#ddd);font:14px/1.5 system-ui,sans-serif;${style}`;
  const close = document.createElement("button");
  close.className = "blockskip-close";
  close.textContent = say("help.close");
  close.style.cssText = "position:sticky;top:0;float:right;padding:4px 12px;cursor:pointer;z-index:1";
  close.onclick = () => dialog.close();
  dialog.append(close, content);
  dialog.onclick = ({ target }) => target === dialog && dialog.close();
  dialog.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Escape") dialog.close(); // the frontend prevents the browser's own reaction
    else onKey(event);
  };
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
  close.focus();
  return dialog;
}
