// Greys widgets whose values come from another of our nodes, and says from which.
//
// With Memory Plan's `settings` connected, Precompute Residuals and the trainer use its values for some of their widgets; and
// Memory Plan uses the two nodes' values for what it would otherwise ask a second time.

import { app } from "../../../scripts/app.js";
import { allNodes, isOurs, root } from "./graph_nodes.js";
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
  [TRAINER]: ["rank", "targets", "quantize_frozen", "optimizer", "ema"],
  [PRECOMPUTE]: ["draws", "chunk_size", "back_residual", "residual_format", "frames", "reference_size", "reference_part"],
};

const SHORT = { [PLAN]: "Memory Plan", [TRAINER]: "Dynamic Patch Trainer", [PRECOMPUTE]: "Precompute Residuals" };

const OFF = [2, 4]; // the modes of muted and bypassed nodes, which no prompt contains
const OUTSIDE = -10; // the id at the other end of a link that comes into a subgraph
const DEEPEST = 64; // hops from node to node

const names = new WeakMap(); // widget -> its label without our addition
let loading = false; // a graph, whose links and modes are set one after the other
let waiting = null;

const isOff = (node) => OFF.includes(node.mode);

/** Every node of the open workflow that is neither muted nor bypassed, nor in a subgraph that is. */
function* activeNodes(graph = root(), depth = 0) {
  for (const node of graph?.nodes ?? []) {
    if (isOff(node)) continue;
    yield node;
    if (node.subgraph && depth < DEEPEST) yield* activeNodes(node.subgraph, depth + 1);
  }
}

const linkOf = (graph, id) => (id === null || id === undefined ? null : graph?.getLink?.(id) ?? graph?.links?.[id] ?? null);

/**
 * The node at the other end of an input, through reroutes and the borders of subgraphs; null if nothing is sent from there.
 *
 * The nodes in a subgraph that is used several times are the same ones, so the first use with a connection counts.
 */
function behind(node, input, hops = 0) {
  const slot = node.inputs?.find(({ name }) => name === input);
  return origin(node.graph, slot?.link, hops);
}

/** The node that a link of a graph comes from. */
function origin(graph, id, hops) {
  const wire = linkOf(graph, id);
  if (!wire || hops > DEEPEST) return null;
  if (Number(wire.origin_id) === OUTSIDE) return fromOutside(graph, wire.origin_slot, hops + 1);
  const from = graph.getNodeById(wire.origin_id);
  if (!from || isOff(from)) return null;
  if (from.type === "Reroute") return origin(graph, from.inputs?.[0]?.link, hops + 1);
  if (from.subgraph) return origin(from.subgraph, from.subgraph.outputs?.[wire.origin_slot]?.linkIds?.[0], hops + 1);
  return from;
}

/** What is connected to an input of a subgraph where it is used. */
function fromOutside(subgraph, slot, hops) {
  for (const user of activeNodes()) {
    const found = user.subgraph === subgraph && origin(user.graph, user.inputs?.[slot]?.link, hops);
    if (found) return found;
  }
  return null;
}

/** The active nodes of a kind that use a Memory Plan. */
function users(plan, kind) {
  return [...activeNodes()].filter((node) => node.comfyClass === kind && behind(node, PLANNED) === plan);
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

/** Whether a widget's value comes over a link, which the page does not know. */
function isLinked(node, name) {
  const slot = node.inputs?.find(({ widget }) => widget?.name === name);
  return slot?.link !== null && slot?.link !== undefined;
}

/** Grey the widgets that Memory Plan sets. */
function showPlanned(node) {
  const plan = behind(node, PLANNED);
  for (const name of SET_BY_PLAN[node.comfyClass]) grey(widgetOf(node, name), plan);
}

/** Take over what Memory Plan can read from the nodes that use it; what comes over a link is left to the user. */
function readIntoPlan(plan) {
  for (const [kind, read] of Object.entries(READ_BY_PLAN)) {
    const [user] = users(plan, kind);
    for (const name of read) {
      const known = user && ![user, plan].some((node) => isLinked(node, name));
      const [own, theirs] = [widgetOf(plan, name), known && widgetOf(user, name)];
      if (own && theirs && own.value !== theirs.value) own.value = theirs.value;
      grey(own, theirs && user);
    }
  }
}

/** Bring the open workflow and the subgraphs in it up to date. */
export function updateAll() {
  for (const [, node] of allNodes()) {
    if (node.comfyClass in SET_BY_PLAN) showPlanned(node);
    if (node.comfyClass === PLAN) readIntoPlan(node);
  }
  app.canvas?.setDirty(true, true);
}

/**
 * Update at once: what follows from a change belongs to the same step of undo, which the frontend takes after the event.
 *
 * Taken later it would be a step by itself, and undoing that one would only bring it back.
 */
function update() {
  if (!loading) updateAll();
}

/** Update once more, after a change of several links; if the first update saw them all there is nothing left to change. */
function updateSoon() {
  waiting ??= setTimeout(() => {
    waiting = null;
    update();
  }, 50);
}

/** Update when a node is muted, bypassed or neither again: the frontend only sets its property. */
function followMode(node) {
  let value = node.mode;
  const { get = () => value, set = (mode) => (value = mode) } = Object.getOwnPropertyDescriptor(node, "mode") ?? {};
  Object.defineProperty(node, "mode", {
    configurable: true,
    enumerable: true,
    get,
    set(mode) {
      const before = get.call(node);
      set.call(node, mode);
      if (mode !== before && node.graph) update();
    },
  });
}

function followLinks(node) {
  const { onConnectionsChange } = node;
  node.onConnectionsChange = function () {
    onConnectionsChange?.apply(this, arguments);
    update();
    updateSoon();
  };
}

function followWidgets(node) {
  for (const widget of node.widgets ?? []) {
    const { callback, beforeQueued } = widget;
    widget.callback = function () {
      const returned = callback?.apply(this, arguments);
      update();
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
    if (isOurs(node.comfyClass)) followWidgets(node);
    else if (!node.subgraph) return;
    followLinks(node); // also of subgraphs, which may have our nodes in them
    followMode(node);
  },
  beforeConfigureGraph() {
    loading = true;
  },
  afterConfigureGraph() {
    loading = false;
    update();
  },
};

register(extension);
