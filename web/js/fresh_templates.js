// Gives a workflow that is opened from a template an id of its own.
//
// The server keeps the last run of each node by the workflow's id. Two workflows from one template would share it, and show each
// other's runs. Saved workflows keep the id that they are saved with.

import { app } from "../../../scripts/app.js";
import { isOurs } from "./graph_nodes.js";
import { register } from "./register.js";

/** A template's graph with a new id, if it has nodes of ours. */
export function fresh(graph) {
  if (!graph?.id || !graph.nodes?.some?.(({ type }) => isOurs(type))) return graph;
  return { ...graph, id: window.LiteGraph.uuidv4() }; // not crypto.randomUUID, which a page without https does not have
}

const extension = {
  name: "BlockSkip.FreshTemplates",
  setup() {
    const { loadGraphData } = app;
    app.loadGraphData = function (graph, clean, restoreView, workflow, options, ...more) {
      const opened = options?.openSource === "template" ? fresh(graph) : graph;
      return loadGraphData.call(this, opened, clean, restoreView, workflow, options, ...more);
    };
  },
};

register(extension);
