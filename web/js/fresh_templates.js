// Gives a workflow that is opened from one of our templates an id of its own.
//
// The server keeps the last run of each node by the workflow's id. Two workflows from one template would share it, and show each
// other's runs. A template is marked, and what is opened from it is not, so that a saved workflow keeps its id.

import { register } from "./register.js";

const MARK = "blockskipTemplate"; // in `extra`, written by devtools/make_workflows.py

const extension = {
  name: "BlockSkip.FreshTemplates",
  beforeConfigureGraph(graph) {
    if (!graph?.extra?.[MARK]) return;
    delete graph.extra[MARK];
    graph.id = window.LiteGraph.uuidv4(); // not crypto.randomUUID, which a page without https does not have
  },
};

register(extension);
