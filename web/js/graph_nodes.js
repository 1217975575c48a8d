// Finds nodes of the open workflow by the ids that the server uses.

import { app } from "../../../scripts/app.js";

const DEEPEST = 32; // subgraphs in subgraphs
const OURS = /^BlockSkip_/;

/** The open workflow. */
export const root = () => app.rootGraph ?? app.graph;

/** Whether a node's class is one of this pack. */
export const isOurs = (type) => typeof type === "string" && OURS.test(type);

/** The node with an execution id such as "5", or "2:1" for node 1 inside subgraph node 2. */
export function nodeOfExecution(id) {
  let [graph, node] = [root(), null];
  for (const part of String(id).split(":").slice(0, DEEPEST)) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

/** The node with an output's key: "5", or "<id of the subgraph's definition>:1". */
export function nodeOfLocator(key) {
  const [definition, id] = key.includes(":") ? key.split(":") : [null, key];
  const graph = definition === null ? root() : root()?.subgraphs?.get(definition);
  return graph?.getNodeById(Number(id)) ?? graph?.getNodeById(id);
}

/** Every node of the open workflow with its execution id, including those inside subgraphs. */
export function* allNodes(graph = root(), prefix = "", depth = 0) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    const id = `${prefix}${node.id}`;
    yield [id, node];
    if (node.subgraph && depth < DEEPEST) yield* allNodes(node.subgraph, `${id}:`, depth + 1);
  }
}
