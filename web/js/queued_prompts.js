// Remembers from which workflow each prompt was queued: what the server says about an error has only the prompt's id.

import { api } from "../../../scripts/api.js";
import { root } from "./graph_nodes.js";
import { register } from "./register.js";

const KEPT = "blockskip.queued"; // in the tab's own storage, as the id by which the server knows this page after a reload
const MOST = 200; // prompts

// Shared by two copies of the pack in one page, of which one may write and the other read: `queued` has the id of each
// prompt's workflow, `latest` that of the workflow queued last, `answered` is a promise that its prompt's id is in `queued`.
const known = (window.blockskipPrompts ??= { queued: new Map(), latest: null, answered: null });
const { queued } = known;

/** The id of the workflow that a prompt was queued from, or null if that is not known. */
export async function workflowOf(prompt) {
  if (!queued.has(prompt)) await known.answered; // a prompt can fail before the page is told its id
  return queued.get(prompt) ?? null;
}

/** The id of the workflow that was queued last, or null. */
export const latestWorkflow = () => known.latest;

/** Whether a workflow is the open one; null if either of them has no id. */
export function isOpen(workflow) {
  return workflow && root()?.id ? workflow === root().id : null;
}

function keep(prompt, workflow) {
  if (!prompt || !workflow) return;
  queued.set(prompt, workflow);
  if (queued.size > MOST) queued.delete(queued.keys().next().value);
  try {
    sessionStorage.setItem(KEPT, JSON.stringify([...queued]));
  } catch {
    // full or forbidden: known until the page is reloaded
  }
}

function recall() {
  try {
    for (const [prompt, workflow] of JSON.parse(sessionStorage.getItem(KEPT)) ?? []) queued.set(prompt, workflow);
  } catch {
    // forbidden, or not ours
  }
}

const extension = {
  name: "BlockSkip.QueuedPrompts",
  setup() {
    recall();
    const { queuePrompt } = api;
    api.queuePrompt = function (number, data) {
      const workflow = (known.latest = data?.workflow?.id ?? null);
      const answer = queuePrompt.apply(this, arguments);
      known.answered = Promise.resolve(answer).then((reply) => keep(reply?.prompt_id, workflow), () => {});
      return answer;
    };
  },
};

register(extension);
