// Trains in ComfyUI's real frontend, in a headless Chromium, and takes the pictures that the README is made of.
//
//   node devtools/train_for_picture.mjs SERVER WIDGETS.json DIR [--minutes 60]
//
// The server needs the demo's nodes, models and pictures; WIDGETS.json has values by kind of node and widget. Written are the
// trainer's node after two thirds of the steps (`training.png`) and when it is done (`done.png`), and what Compare Pictures shows
// (`before.png`, `after.png`). `make_picture.py` runs this, and puts them together.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { NotChecked, openTemplate, setWidgets } from "./browser.mjs";
import { pageCheck } from "./page_check.mjs";

const TEMPLATE = "BlockSkip 0 - Try it without a GPU";
const WIDTH = 400; // of the trainer's node
const frame = pageCheck("train_for_picture", {
  needs: "the server's address, a file of widgets and a folder", least: 3, further: { minutes: { type: "string", default: "60" } },
});

async function main(page, [file, folder]) {
  const deadline = Date.now() + 60_000 * Number(frame.options.minutes);
  await openTemplate(page, "blockskip_demo_nodes", TEMPLATE);
  await setWidgets(page, JSON.parse(readFileSync(file, "utf8")));
  const steps = await page.evaluate(show, WIDTH);
  await page.evaluate(() => {
    window.app.api.addEventListener("execution_error", ({ detail }) => (window.failed = detail.exception_message));
    window.app.queuePrompt(0, 1);
  });
  await watch(page, folder, steps, deadline);
  await node(page, join(folder, "done.png"));
  await page.waitForFunction(() => document.querySelector(".blockskip-comparison")?.dataset.pairs === "1", null, { timeout: 300_000 });
  const [after, before] = await page.locator(".blockskip-comparison img").evaluateAll((all) => all.map((one) => one.src));
  for (const [name, address] of Object.entries({ before, after })) {
    writeFileSync(join(folder, `${name}.png`), Buffer.from(await (await fetch(address)).arrayBuffer()));
  }
}

/** Bring the trainer into view, and return its number of steps. */
function show(width) {
  const { canvas, rootGraph } = window.app;
  window.trainer = rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora");
  window.trainer.setSize([width, window.trainer.computeSize()[1] + 60]);
  Object.assign(canvas.ds, { scale: 1, offset: [-window.trainer.pos[0] + 200, -window.trainer.pos[1] + 220] });
  canvas.setDirty(true, true);
  return window.trainer.widgets.find((one) => one.name === "steps").value;
}

/** Wait until the node is done; take a picture of it on the way. */
async function watch(page, folder, steps, deadline) {
  for (let taken = false; ; await page.waitForTimeout(10_000)) {
    const [head, failed] = await page.evaluate(() => [document.querySelector(".blockskip-head")?.textContent ?? "", window.failed]);
    if (failed) throw new NotChecked(`the run failed: ${failed}`);
    if (head.startsWith("Done")) return;
    if (Date.now() > deadline) throw new NotChecked(`time is up at ${head}`);
    const step = Number(head.match(/step (\d+)/)?.[1] ?? 0);
    if (taken || step < (2 * steps) / 3) continue;
    await node(page, join(folder, "training.png"));
    taken = true;
  }
}

/** Take a picture of the trainer's node. */
async function node(page, path) {
  const clip = await page.evaluate(() => {
    const { canvas } = window.app;
    const [x, y] = canvas.convertOffsetToCanvas([window.trainer.pos[0], window.trainer.pos[1] - 30]);
    const box = canvas.canvas.getBoundingClientRect();
    return { x: box.x + x, y: box.y + y, width: window.trainer.size[0], height: window.trainer.size[1] + 30 };
  });
  await page.screenshot({ path, clip, timeout: 120_000 });
}

await frame.run({ width: 900, height: 1400 }, main, { listens: false });
