// Greys widgets whose values come from another of our nodes, and says from which.
//
// With Memory Plan's `settings` connected, Precompute Residuals and the trainer use its values for some of their widgets; and
// Memory Plan uses the two nodes' values for what it would otherwise ask a second time.

import { app } from "../../../scripts/app.js";
import { isOurs, root } from "./graph_nodes.js";
import { register } from "./register.js";
import { say } from "./words.js";

const PLAN = "BlockSkip_MemoryPlan";
const TRAINER = "BlockSkip_TrainLora";
const PRECOMPUTE = "BlockSkip_PrecomputeResiduals";
const PLANNED = "memory_settings"; // the input that Memory Plan is connected to
const SET_BY_PLAN = {
  [TRAINER]: ["batch_size", "checkpointing", "activation_budget", "quantize_kept"],
  [PRECOMPUTE]: ["patch_min", "storage"],
};
const READ_BY_PLAN = {
  [TRAINER]: ["rank", "targets", "quantize_frozen"],
  [PRECOMPUTE]: ["draws", "chunk_size", "back_residual", "residual_format", "frames", "reference_size", "reference_part"],
};

const SHORT = { [PLAN]: "Memory Plan", [TRAINER]: "Dynamic Patch Trainer", [PRECOMPUTE]: "Precompute Residuals" };

const names = new WeakMap(); // widget -> its label without our addition
let waiting = null;

/** The node at the other end of an input, through reroutes of the same graph; null if there is none. */
function behind(node, input) {
  let [from, link] = [node, node.inputs?.find(({ name }) => name === input)?.link];
  for (let hops = 0; hops < 64; hops += 1) {
    const wire = link === null || link === undefined ? null : from.graph?.getLink?.(link) ?? from.graph?.links?.[link];
    from = wire && from.graph.getNodeById(wire.origin_id);
    if (!from || from.type !== "Reroute") return from ?? null;
    link = from.inputs?.[0]?.link;
  }
  return null;
}

/** The nodes of a kind in the same graph that use a Memory Plan. */
function users(plan, kind) {
  return (plan.graph?.nodes ?? []).filter((node) => node.comfyClass === kind && behind(node, PLANNED) === plan);
}

function grey(widget, from) {
  if (!widget) return;
  if (!names.has(widget)) names.set(widget, widget.label);
  const label = from ? say("planned.from", { name: names.get(widget) ?? widget.name, node: SHORT[from.comfyClass] ?? from.title }) : names.get(widget);
  if (widget.label !== label) widget.label = label;
  if (Boolean(widget.disabled) !== Boolean(from)) widget.disabled = Boolean(from);
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/** Grey the widgets that Memory Plan sets. */
function showPlanned(node) {
  const plan = behind(node, PLANNED);
  for (const name of SET_BY_PLAN[node.comfyClass]) grey(widgetOf(node, name), plan);
}

/** Take over what Memory Plan can read from the nodes that use it. */
function readIntoPlan(plan) {
  for (const [kind, read] of Object.entries(READ_BY_PLAN)) {
    const [user] = users(plan, kind);
    for (const name of read) {
      const [own, theirs] = [widgetOf(plan, name), user && widgetOf(user, name)];
      if (own && theirs && own.value !== theirs.value) own.value = theirs.value;
      grey(own, theirs && user);
    }
  }
}

/** Bring a graph and the subgraphs in it up to date. */
export function updateAll(graph = root()) {
  for (const node of graph?.nodes ?? []) {
    if (node.comfyClass in SET_BY_PLAN) showPlanned(node);
    if (node.comfyClass === PLAN) readIntoPlan(node);
    if (node.subgraph) updateAll(node.subgraph);
  }
  app.canvas?.setDirty(true, true);
}

/** Update soon, once even if asked several times: links are changed one after the other. */
function updateSoon() {
  waiting ??= setTimeout(() => {
    waiting = null;
    updateAll();
  }, 50);
}

function follow(node) {
  const { onConnectionsChange } = node;
  node.onConnectionsChange = function () {
    onConnectionsChange?.apply(this, arguments);
    updateSoon();
  };
  for (const widget of node.widgets ?? []) {
    const { callback, beforeQueued } = widget;
    widget.callback = function () {
      const returned = callback?.apply(this, arguments);
      updateSoon();
      return returned;
    };
    if (node.comfyClass !== PLAN) continue;
    widget.beforeQueued = function () {
      beforeQueued?.apply(this, arguments);
      readIntoPlan(node); // whatever changed the other nodes' values
    };
  }
}

const extension = {
  name: "BlockSkip.PlannedInputs",
  nodeCreated(node) {
    if (isOurs(node.comfyClass)) follow(node);
  },
  afterConfigureGraph: updateSoon,
};

register(extension);
