// Puts the slider with both pictures on Compare Pictures; the node's output names the files. See nodes/compare.py.

import { api } from "../../../scripts/api.js";
import { openDialog } from "./dialog.js";
import { addElement, displayBox, showOutputs } from "./node_display.js";
import { FITTED, LARGE, PictureSlider } from "./picture_slider.js";
import { say } from "./words.js";

const NODE = "BlockSkip_Compare";
const HEIGHT = 300;
const MOST_PAIRS = 1000;

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
    this.element = displayBox("blockskip-comparison", HEIGHT, 4);
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

showOutputs({
  name: "BlockSkip.CompareNode",
  nodeClass: NODE,
  add(node) {
    const comparison = new Comparison();
    addElement(node, comparison.element, { name: "comparison", type: "blockskip_comparison", height: HEIGHT, width: 320 });
    return (output) => comparison.take(readPairs(output));
  },
});
