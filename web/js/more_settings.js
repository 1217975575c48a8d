// Folds the advanced inputs of our nodes away behind a button, as Nodes 2.0 does by itself for every node.
//
// The state is the node's own `showAdvanced`, which the frontend uses for Nodes 2.0 and saves with the workflow. Values and
// their order stay as they are: hidden widgets are saved and queued like the others.

import { app } from "../../../scripts/app.js";
import { isOurs } from "./graph_nodes.js";
import { register } from "./register.js";
import { say } from "./words.js";

const SHOW_ALL = "Comfy.Node.AlwaysShowAdvancedWidgets";
const BUTTON = "more_settings";

const showsAll = () => Boolean(app.extensionManager?.setting?.get(SHOW_ALL));

function isLinked(node, widget) {
  return node.inputs?.some((input) => input.widget?.name === widget.name && input.link !== null && input.link !== undefined);
}

/** The widgets that are folded away, each with the one that the page adds to a seed. */
export function advancedWidgets(node) {
  const advanced = (node.widgets ?? []).filter(({ options }) => options?.advanced);
  return advanced.flatMap((widget) => [widget, ...(widget.linkedWidgets ?? [])]);
}

function fold(node) {
  const advanced = advancedWidgets(node);
  if (!advanced.length) return;
  const before = node.computeSize()[1];
  for (const widget of advanced) {
    const hides = () => !node.showAdvanced && !showsAll() && !isLinked(node, widget);
    Object.defineProperty(widget, "hidden", { configurable: true, get: hides, set: () => {} });
  }
  addButton(node);
  resize(node, before);
}

function addButton(node) {
  const button = node.addWidget("button", BUTTON, null, () => toggle(node), { serialize: false, canvasOnly: true });
  button.serialize = false; // keeps it out of saved workflows, which identify values by position
  Object.defineProperty(button, "label", { get: () => say(node.showAdvanced ? "settings.fewer" : "settings.more"), set: () => {} });
  Object.defineProperty(button, "hidden", { get: showsAll, set: () => {} });
  const { widgets } = node;
  const first = widgets.findIndex((widget) => widget.serialize === false); // ours is below all values, above a chart
  widgets.splice(first, 0, ...widgets.splice(widgets.indexOf(button), 1));
}

/** Show or hide the advanced inputs of a node; what the node is taller than it must be stays. */
export function toggle(node) {
  const before = node.computeSize()[1];
  node.graph?.beforeChange?.(node);
  node.showAdvanced = !node.showAdvanced;
  resize(node, before);
  node.graph?.afterChange?.(node);
  node.setDirtyCanvas(true, true);
}

function resize(node, before) {
  const now = node.computeSize()[1];
  node.setSize([node.size[0], Math.max(now, node.size[1] + now - before)]);
}

const extension = {
  name: "BlockSkip.MoreSettings",
  nodeCreated(node) {
    if (isOurs(node.comfyClass)) fold(node);
  },
};

register(extension);
