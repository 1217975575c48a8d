// Finds from which workflow a prompt was queued: what the server says about an error has only the prompt's id.

import { api } from "../../../scripts/api.js";
import { root } from "./graph_nodes.js";

/** The id of the workflow that a prompt was queued from, or null if that is not known. */
export async function workflowOf(prompt) {
  // In this order, because a prompt that has ended moves from the queue to the history.
  const entry = (await inQueue(prompt)) ?? (await inHistory(prompt));
  return entry?.[3]?.extra_pnginfo?.workflow?.id ?? null; // [number, id, nodes, what the page sent with them, ...]
}

/** Whether a workflow is the open one; null if either of them has no id. */
export function isOpen(workflow) {
  return workflow && root()?.id ? workflow === root().id : null;
}

async function inQueue(prompt) {
  const { queue_running: running = [], queue_pending: pending = [] } = (await fetched("/queue")) ?? {};
  return [...running, ...pending].find(([, id]) => id === prompt);
}

async function inHistory(prompt) {
  return (await fetched(`/history/${encodeURIComponent(prompt)}`))?.[prompt]?.prompt;
}

async function fetched(path) {
  try {
    const reply = await api.fetchApi(path);
    return reply.ok ? await reply.json() : null;
  } catch (error) {
    console.warn("BlockSkip: the server could not be asked for a prompt's workflow.", error);
    return null;
  }
}
