// The pictures sampled during a training, as a strip of small ones; a click compares one with the first of its prompt.

import { openDialog } from "./dialog.js";
import { ALIKE } from "./loss_plot.js";
import { LARGE, PictureSlider } from "./picture_slider.js";
import { likenessByStep, mostAlike } from "./run_data.js";
import { say } from "./words.js";

const SIDE = 56; // px of the small pictures

/** A row of pictures; `address(sample)` is the URL of one. */
export class SampleStrip {
  constructor(address) {
    this.address = address;
    this.shown = "";
    this.element = document.createElement("div");
    this.element.className = "blockskip-samples";
    this.element.style.cssText = "flex:none;display:flex;gap:4px;overflow-x:auto;pointer-events:auto;scrollbar-width:thin";
  }

  /** Show these pictures; nothing happens if they are shown already. */
  show(samples) {
    const wanted = JSON.stringify(samples);
    if (wanted === this.shown) return;
    this.shown = wanted;
    this.element.style.display = samples.length ? "flex" : "none";
    const best = mostAlike(likenessByStep(samples))?.[0];
    this.element.replaceChildren(...samples.map((sample) => this.thumbnail(sample, samples, sample.step === best)));
    this.element.scrollLeft = this.element.scrollWidth; // the newest
  }

  thumbnail(sample, samples, isBest) {
    const button = document.createElement("button");
    button.title = say("samples.open");
    button.style.cssText = "all:unset;cursor:pointer;flex:none;text-align:center;font-size:10px;line-height:1.3";
    const frame = isBest ? `outline:2px solid ${ALIKE};outline-offset:-2px;` : "";
    const style = `width:${SIDE}px;height:${SIDE}px;object-fit:cover;display:block;border-radius:3px;${frame}`;
    button.append(picture(this.address(sample), style), String(sample.step));
    if (sample.likeness !== null) button.append(alike(sample.likeness, isBest));
    button.onclick = () => compare(sample, samples, this.address);
    return button;
  }
}

function alike(likeness, isBest) {
  const value = document.createElement("span");
  value.className = "blockskip-likeness";
  value.title = say("samples.likeness");
  value.textContent = ` · ${likeness.toFixed(2)}`;
  value.style.cssText = `color:${ALIKE};font-weight:${isBest ? 700 : 400}`;
  return value;
}

function picture(source, style) {
  const image = new Image();
  image.src = source;
  image.style.cssText = style;
  image.draggable = false;
  return image;
}

/** Open a large view of a sample with a slider that uncovers the first sample of the same prompt. */
function compare(sample, samples, address) {
  const row = samples.filter(({ prompt }) => prompt === sample.prompt);
  const view = new ComparedSamples(row, row.indexOf(sample), address);
  const onKey = ({ key, target }) => {
    if (target.type === "range") return; // its own keys
    if (key === "ArrowRight") view.move(1);
    if (key === "ArrowLeft") view.move(-1);
  };
  openDialog("blockskip-compare", view.element, { style: "max-width:94vw", onKey });
}

class ComparedSamples {
  constructor(row, place, address) {
    Object.assign(this, { row, place, address });
    this.element = document.createElement("div");
    this.caption = document.createElement("div");
    this.pictures = new PictureSlider(LARGE);
    this.element.append(this.caption, this.pictures.element);
    this.move(0);
  }

  /** Show the sample so many places further. */
  move(by) {
    this.place = Math.min(this.row.length - 1, Math.max(0, this.place + by));
    const [before, after] = [this.row[0], this.row[this.place]];
    this.pictures.show(this.address(before), this.address(after));
    this.caption.textContent = say("samples.caption", { before: before.step, after: after.step });
  }
}
