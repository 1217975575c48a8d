// Puts an element of ours on a node, and shows the node's outputs in it.

import { nodeOfLocator } from "./graph_nodes.js";
import { register } from "./register.js";

/** A box for figures or pictures, `height` px high at least, in the colours of the page's inputs. */
export function displayBox(className, height, gap) {
  const box = document.createElement("div");
  box.className = className;
  box.style.cssText =
    `min-height:${height}px;height:100%;width:100%;box-sizing:border-box;padding:6px 8px;display:flex;flex-direction:column;` +
    `gap:${gap}px;overflow:hidden;border-radius:4px;font:11px/1.35 system-ui,sans-serif;color:var(--input-text,#ddd);` +
    "background:var(--comfy-input-bg,#222);border:1px solid var(--border-color,#4e4e4e)";
  return box;
}

/** Put an element on a node, as a widget with this name and type, and make the node as large as it needs. */
export function addElement(node, element, { name, type, height, width = 0 }) {
  const widget = node.addDOMWidget(name, type, element, {
    serialize: false, // keeps it out of the prompt
    hideOnZoom: false,
    hideInPanel: true, // one element cannot be in the node and in the side panel
    getMinHeight: () => height,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // keeps it out of saved workflows, which identify values by position
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1])]);
}

/** Call `take` with every output of a run of the node. */
export function onOutput(node, take) {
  const { onExecuted } = node;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    take(output);
  };
}

/** Show outputs on all nodes of a class: `add(node)` puts something there and returns what takes the node's output. */
export function showOutputs({ name, nodeClass, add }) {
  const shown = new WeakMap(); // node -> what takes its output
  register({
    name,
    nodeCreated(node) {
      if (node.comfyClass !== nodeClass) return;
      const take = add(node);
      shown.set(node, take);
      onOutput(node, take);
    },
    onNodeOutputsUpdated(outputs) {
      for (const [key, output] of Object.entries(outputs ?? {})) shown.get(nodeOfLocator(key) ?? {})?.(output);
    },
  });
}
