// Says in a toast, and on the charts, what went wrong in one of our nodes, with a link to the node's help page.
//
// The frontend's own message for an exception is the same for every node; the sentence is only in its details.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { isOurs, nodeOfExecution, root } from "./graph_nodes.js";
import { openHelp } from "./help_page.js";
import { isOpen, workflowOf } from "./queued_prompts.js";
import { register } from "./register.js";
import { say } from "./words.js";

const MILLISECONDS = { error: 20_000, info: 12_000 };
const POLL = 150; // ms between looks for a refusal
const PATIENCE = 15_000; // ms until a queued prompt is answered
const FAILURE = "blockskip:failure"; // event of the window for our charts

let looking = null; // the timer

/** Tell `listener` of every failure in one of the open workflow's nodes of ours, as {node, type, title, message}. */
export function onFailure(listener) {
  window.addEventListener(FAILURE, ({ detail }) => listener(detail));
}

/** Our sentence without what the host appends to it, and without a name of the exception in front. */
export function sentence(message) {
  return String(message ?? "").split("\n")[0].trim();
}

/** What a refused prompt says about our nodes: one entry for each sentence. */
export function refusals(nodeErrors) {
  const found = new Map();
  for (const [node, { class_type: type, errors }] of Object.entries(nodeErrors ?? {})) {
    if (!isOurs(type)) continue;
    for (const error of errors ?? []) {
      if (error.type !== "custom_validation_failed") continue; // the others have their own texts in the frontend
      const message = sentence(String(error.details ?? "").replace(/^\w+ - /, ""));
      found.set(`${node} ${message}`, { node, type, message });
    }
  }
  return [...found.values()];
}

/** Tell of a failure; on the charts only if it is the open workflow's, whose nodes may have the ids of another's. */
function fail({ node, type, message, workflow }) {
  const open = isOpen(workflow);
  const found = open === false ? null : nodeOfExecution(node);
  const same = found?.comfyClass === type;
  const title = same ? found.title : window.LiteGraph?.registered_node_types?.[type]?.title ?? type;
  if (open ?? same) window.dispatchEvent(new CustomEvent(FAILURE, { detail: { node: String(node), type, title, message } }));
  toast("error", say(open === false ? "error.elsewhere" : "error.title", { node: title }), message, () => openHelp(type, message));
}

/** Show a toast, and below its text a link if there is something to open. */
export function toast(severity, summary, detail, open = null) {
  app.extensionManager.toast.add({ severity, summary, detail, life: MILLISECONDS[severity] });
  if (open) setTimeout(() => addLink(detail, open), 100); // once the toast is on the page
}

function addLink(detail, open) {
  const texts = [...document.querySelectorAll(".p-toast-detail")].filter(({ textContent }) => textContent === detail);
  for (const text of texts) {
    if (text.parentElement.querySelector(".blockskip-help-link")) continue;
    const link = document.createElement("button");
    link.className = "blockskip-help-link";
    link.textContent = say("error.help");
    link.style.cssText = "all:unset;cursor:pointer;text-decoration:underline;margin-top:6px;align-self:flex-start";
    link.onclick = open;
    text.after(link);
  }
}

async function onError({ detail }) {
  if (!isOurs(detail?.node_type)) return;
  const workflow = await workflowOf(detail.prompt_id);
  fail({ node: detail.node_id, type: detail.node_type, message: sentence(detail.exception_message), workflow });
}

/** A prompt that the server refuses makes no event, but the page's list of errors changes. */
function onQueueing() {
  const before = app.extensionManager.lastNodeErrors;
  const workflow = root()?.id ?? null; // which is the one that is queued
  const end = Date.now() + PATIENCE;
  clearInterval(looking);
  looking = setInterval(() => {
    const now = app.extensionManager.lastNodeErrors;
    if (now && now !== before) refusals(now).forEach((refusal) => fail({ ...refusal, workflow }));
    if ((now && now !== before) || Date.now() > end) clearInterval(looking);
  }, POLL);
}

const extension = {
  name: "BlockSkip.Notices",
  setup() {
    api.addEventListener("execution_error", onError);
    api.addEventListener("promptQueueing", onQueueing);
  },
};

register(extension);
