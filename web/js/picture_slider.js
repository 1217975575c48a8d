// Two pictures on each other: left of a slider one shows, right of it the other. Independent of ComfyUI.

import { say } from "./words.js";

/** As large as the window allows, for a dialog. */
export const LARGE = {
  element: "",
  room: "",
  stage: "display:inline-block",
  picture: "display:block;max-width:88vw;max-height:72vh;min-width:min(512px,80vw)",
};
/** Within the room that the element has. */
export const FITTED = {
  element: "display:flex;flex-direction:column;flex:1 1 auto;min-height:0",
  room: "flex:1 1 auto;min-height:0;container-type:size;display:grid;place-items:center",
  stage: "width:min(100cqw,calc(100cqh * var(--ratio,1)));aspect-ratio:var(--ratio,1)",
  picture: "display:block;width:100%;height:100%",
};

/** A stage with both pictures, and a slider below it; `looks` is LARGE or FITTED. */
export class PictureSlider {
  constructor(looks) {
    this.element = made("div", looks.element);
    const room = made("div", looks.room);
    this.stage = made("div", `position:relative;line-height:0;cursor:ew-resize;touch-action:none;overflow:hidden;${looks.stage}`);
    this.after = made("img", looks.picture);
    this.before = made("img", "position:absolute;inset:0;width:100%;height:100%;object-fit:contain");
    this.edge = made("div", "position:absolute;inset:0 auto;width:2px;margin-left:-1px;background:#fff;box-shadow:0 0 3px #000");
    for (const image of [this.after, this.before]) image.draggable = false;
    this.after.onload = () => this.stage.style.setProperty("--ratio", this.after.naturalWidth / this.after.naturalHeight);
    this.slider = made("input", "display:block;width:100%;margin:6px 0 0;flex:none");
    Object.assign(this.slider, { type: "range", min: 0, max: 100, step: "any", value: 50, title: say("slider.title") });
    this.slider.oninput = () => this.uncover();
    this.slider.onpointerdown = (event) => event.stopPropagation(); // or the node would be dragged too
    this.stage.onpointerdown = this.stage.onpointermove = (event) => this.drag(event);
    this.stage.append(this.after, this.before, this.edge);
    room.append(this.stage);
    this.element.append(room, this.slider);
    this.uncover();
  }

  /** Show the pictures at two addresses; the slider stays where it is. */
  show(before, after) {
    this.before.src = before;
    this.after.src = after;
  }

  drag(event) {
    if (event.type === "pointerdown") event.stopPropagation();
    if (!(event.buttons & 1)) return;
    if (event.type === "pointerdown") this.stage.setPointerCapture(event.pointerId);
    const { left, width } = this.stage.getBoundingClientRect();
    this.slider.value = (100 * (event.clientX - left)) / width;
    this.uncover();
  }

  uncover() {
    const { value } = this.slider;
    this.before.style.clipPath = `inset(0 ${100 - Number(value)}% 0 0)`;
    this.edge.style.left = `${value}%`;
  }
}

function made(tag, style) {
  const element = document.createElement(tag);
  element.style.cssText = style;
  return element;
}
