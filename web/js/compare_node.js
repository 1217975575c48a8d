// Puts the slider with both pictures on Compare Pictures; the node's output names the files. See nodes/compare.py.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { openDialog } from "./dialog.js";
import { nodeOfLocator } from "./graph_nodes.js";
import { FITTED, LARGE, PictureSlider } from "./picture_slider.js";
import { say } from "./words.js";

const NODE = "BlockSkip_Compare";
const HEIGHT = 300;
const MOST_PAIRS = 1000;

const shown = new WeakMap(); // node -> what takes its output

/** The pairs of files in a node's output, each `[before, after]`; null if there are none. */
export function readPairs(output) {
  const [before, after] = [output?.blockskip_before, output?.blockskip_after].map(readFiles);
  const count = Math.min(before.length, after.length);
  return count ? before.slice(0, count).map((file, index) => [file, after[index]]) : null;
}

function readFiles(files) {
  const isFile = (file) => file && ["filename", "subfolder", "type"].every((name) => typeof file[name] === "string");
  return Array.isArray(files) ? files.slice(0, MOST_PAIRS).filter(isFile) : [];
}

const address = ({ filename, subfolder, type }) => api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);

class Comparison {
  constructor() {
    this.pairs = [];
    this.place = 0;
    this.element = document.createElement("div");
    this.element.className = "blockskip-comparison";
    this.element.style.cssText =
      `min-height:${HEIGHT}px;height:100%;width:100%;box-sizing:border-box;padding:6px 8px;display:flex;flex-direction:column;` +
      "gap:4px;overflow:hidden;border-radius:4px;font:11px/1.35 system-ui,sans-serif;color:var(--input-text,#ddd);" +
      "background:var(--comfy-input-bg,#222);border:1px solid var(--border-color,#4e4e4e)";
    this.slider = new PictureSlider(FITTED);
    this.row = document.createElement("div");
    this.row.style.cssText = "display:flex;gap:8px;align-items:baseline;flex:none";
    this.told = document.createElement("span");
    this.told.style.cssText = "flex:1 1 auto;color:var(--descrip-text,#999)";
    this.back = button("◀", () => this.move(-1));
    this.forth = button("▶", () => this.move(1));
    this.large = button("", () => this.enlarge());
    this.row.append(this.told, this.back, this.forth, this.large);
    this.element.append(this.slider.element, this.row);
    this.draw();
  }

  /** Show these pairs; nothing happens if there are none. */
  take(pairs) {
    if (!pairs) return;
    this.pairs = pairs;
    this.move(0);
  }

  move(by) {
    this.place = Math.min(this.pairs.length - 1, Math.max(0, this.place + by));
    this.draw();
  }

  draw() {
    const { pairs, place } = this;
    const pair = pairs[place];
    this.element.dataset.pairs = pairs.length;
    this.slider.element.style.visibility = pair ? "" : "hidden";
    for (const arrow of [this.back, this.forth]) arrow.style.display = pairs.length > 1 ? "" : "none";
    this.large.style.display = pair ? "" : "none";
    this.large.textContent = say("compare.enlarge");
    const number = pairs.length > 1 ? say("compare.pair", { number: place + 1, count: pairs.length }) : "";
    this.told.textContent = pair ? [say("compare.sides"), number].filter(Boolean).join(" ") : say("compare.empty");
    if (pair) this.slider.show(...pair.map(address));
  }

  enlarge() {
    const large = new PictureSlider(LARGE);
    large.show(...this.pairs[this.place].map(address));
    openDialog("blockskip-compare", large.element, { style: "max-width:94vw" });
  }
}

function button(words, act) {
  const made = document.createElement("button");
  made.textContent = words;
  made.style.cssText = "all:unset;cursor:pointer;flex:none;text-decoration:underline";
  made.onclick = act;
  return made;
}

function addComparison(node) {
  const comparison = new Comparison();
  const widget = node.addDOMWidget("comparison", "blockskip_comparison", comparison.element, {
    serialize: false, // keeps it out of the prompt
    hideOnZoom: false,
    hideInPanel: true, // one element cannot be in the node and in the side panel
    getMinHeight: () => HEIGHT,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // keeps it out of saved workflows, which identify values by position
  node.setSize([Math.max(node.size[0], 320), Math.max(node.size[1], node.computeSize()[1])]);
  shown.set(node, (output) => comparison.take(readPairs(output)));
  const { onExecuted } = node;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    comparison.take(readPairs(output));
  };
}

const extension = {
  name: "BlockSkip.CompareNode",
  nodeCreated(node) {
    if (node.comfyClass === NODE) addComparison(node);
  },
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs ?? {})) shown.get(nodeOfLocator(key) ?? {})?.(output);
  },
};

// If the pack is installed twice, the other copy has registered it; the frontend refuses duplicate names.
if (!app.extensions?.some(({ name }) => name === extension.name)) app.registerExtension(extension);
