// Checks in ComfyUI's real frontend, in a headless Chromium, that our nodes show few inputs and fold the others away.
//
//   node devtools/check_settings.mjs SERVER [--vue] [--screenshots DIR]
//
// Checked are, for each of our nodes: folded inputs when it is created, all inputs after the button is pressed, no gaps, the
// same saved values in both states, and that a reloaded graph remembers the state. And the widgets that Memory Plan's output
// `settings` overrides: greyed, and named after it.
// The exit status is 1 if something is wrong, 2 if it could not be checked.

import { pageCheck } from "./page_check.mjs";

const MOST_OF_TRAINER = 10;
const frame = pageCheck("settings", { needs: "the server's address", least: 1 });
const { options, problems, picture } = frame;

async function main(page) {
  const kinds = await page.evaluate(() =>
    Object.keys(window.LiteGraph.registered_node_types).filter((type) => type.startsWith("BlockSkip_")),
  );
  if (kinds.length < 8) problems.push(`only ${kinds.length} nodes`);
  for (const kind of kinds) await checkNode(page, kind);
  await checkPlanned(page);
}

async function checkNode(page, kind) {
  await page.evaluate((type) => {
    const { app, LiteGraph } = window;
    app.rootGraph.clear();
    window.lastId = (window.lastId ?? 100) + 1; // the frontend remembers a widget's state by its node's id
    app.rootGraph.add(Object.assign(LiteGraph.createNode(type), { pos: [60, 60], id: window.lastId }));
    Object.assign(app.canvas.ds, { scale: 1, offset: [40, 40] });
    app.canvas.setDirty(true, true);
  }, kind);
  await page.waitForTimeout(500);
  const folded = await page.evaluate(state);
  await picture(page, `${kind}-folded`);
  if (!folded.advanced.length) return;
  const most = kind === "BlockSkip_TrainLora" ? MOST_OF_TRAINER : 14;
  const visible = await shown(page);
  if (visible.length > most) problems.push(`${kind}: ${visible.length} widgets are visible: ${visible}`);
  const leaked = folded.advanced.filter((name) => visible.includes(name));
  if (leaked.length) problems.push(`${kind}: not folded: ${leaked}`);
  checkGaps(kind, folded);

  await press(page);
  const unfolded = await page.evaluate(state);
  const missing = folded.advanced.filter((name) => !unfolded.visible.includes(name));
  if (!options.vue && missing.length) problems.push(`${kind}: still hidden: ${missing}`);
  const rows = await shown(page);
  if (rows.length <= visible.length) problems.push(`${kind}: the button shows nothing`);
  if (JSON.stringify(folded.values) !== JSON.stringify(unfolded.values)) problems.push(`${kind}: saved values changed`);
  if (folded.values.length !== folded.saved || folded.values.includes("more_settings")) problems.push(`${kind}: a value too many`);
  checkGaps(kind, unfolded);
  await picture(page, `${kind}-unfolded`);

  const again = await page.evaluate(async () => {
    await window.app.loadGraphData(window.app.rootGraph.serialize());
    return window.app.rootGraph.nodes[0].showAdvanced;
  });
  if (!again) problems.push(`${kind}: a reloaded workflow has forgotten that its inputs were shown`);
  await page.waitForTimeout(300);
  await press(page);
  const back = await page.evaluate(state);
  if (!options.vue && back.height !== folded.height) problems.push(`${kind}: ${folded.height} px became ${back.height} px`);
}

function state() {
  const [node] = window.app.rootGraph.nodes;
  const widgets = node.widgets ?? []; // a node may have none
  const drawn = widgets.filter((widget) => node.isWidgetVisible(widget));
  return {
    advanced: widgets.filter(({ options }) => options?.advanced).map(({ name }) => name),
    visible: drawn.map(({ name }) => name),
    rows: drawn.map(({ name, y, computedHeight, element }) => [name, y, element ? null : computedHeight ?? 20]),
    values: node.serialize().widgets_values,
    saved: widgets.filter(({ serialize }) => serialize !== false).length,
    height: node.size[1],
  };
}

/** The names of the widgets that a user sees, without the chart. */
async function shown(page) {
  if (!options.vue) return (await page.evaluate(state)).visible.filter((name) => name !== "loss_chart");
  const rows = page.locator('[data-testid="node-widget"]:visible');
  return rows.evaluateAll((all) => all.filter((row) => !row.querySelector(".blockskip-chart")).map((row) => row.innerText.split("\n")[0]));
}

function checkGaps(kind, { rows }) {
  if (options.vue) return;
  for (let place = 1; place < rows.length; place += 1) {
    const [[name, top, height], [next, below]] = [rows[place - 1], rows[place]];
    if (height !== null && below - top - height > 12) problems.push(`${kind}: a gap between ${name} and ${next}`);
  }
}

/** Press the button that folds, or the one of Nodes 2.0. */
async function press(page) {
  if (options.vue) await page.getByText(/(Show|Hide) advanced inputs/).first().dispatchEvent("click");
  else {
    const at = await page.evaluate(() => {
      const { canvas, rootGraph } = window.app;
      const [node] = rootGraph.nodes;
      const button = node.widgets.find(({ name }) => name === "more_settings");
      if (!button) return null;
      const room = canvas.canvas.getBoundingClientRect();
      Object.assign(canvas.ds, { offset: [40 - node.pos[0], 200 - node.pos[1] - button.y] });
      canvas.draw(true, true);
      const { scale, offset } = canvas.ds;
      return [0, 1].map((axis) => {
        const place = node.pos[axis] + (axis ? button.y + 10 : node.size[0] / 2);
        return (place + offset[axis]) * scale + (axis ? room.y : room.x);
      });
    });
    if (!at) return void problems.push("there is no button");
    await page.mouse.click(...at);
  }
  await page.waitForTimeout(400);
}

async function checkPlanned(page) {
  await page.evaluate(() => {
    const { app, LiteGraph } = window;
    app.rootGraph.clear();
    const add = (type, pos) => {
      window.lastId += 1;
      const node = Object.assign(LiteGraph.createNode(type), { pos, id: window.lastId });
      app.rootGraph.add(node);
      return node;
    };
    window.made = {
      plan: add("BlockSkip_MemoryPlan", [40, 60]),
      precompute: add("BlockSkip_PrecomputeResiduals", [480, 60]),
      trainer: add("BlockSkip_TrainLora", [920, 60]),
    };
    const { plan, precompute, trainer } = window.made;
    const output = plan.outputs.findIndex(({ name }) => name === "settings");
    for (const node of [precompute, trainer]) {
      plan.connect(output, node, node.inputs.findIndex(({ name }) => name === "memory_settings"));
    }
    trainer.widgets.find(({ name }) => name === "rank").value = 48;
    precompute.widgets.find(({ name }) => name === "draws").value = 123;
    Object.assign(app.canvas.ds, { scale: 0.8, offset: [80, 80] });
    app.canvas.setDirty(true, true);
  });
  await page.waitForTimeout(600);
  await picture(page, "planned");
  const connected = await page.evaluate(planned);
  const wanted = { batch_size: true, patch_min: true, storage: true, quantize_kept: true, rank: true, draws: true };
  for (const [name, label] of Object.entries(connected.labels)) {
    if (!(name in wanted) || !/\(from .+\)/.test(label)) problems.push(`${name} is disabled and says ${label}`);
    delete wanted[name];
  }
  if (Object.keys(wanted).length) problems.push(`still editable: ${Object.keys(wanted)}`);
  if (connected.rank !== 48 || connected.draws !== 123) problems.push(`the plan has ${JSON.stringify(connected)}`);
  await page.evaluate(() => {
    for (const node of [window.made.trainer, window.made.precompute]) {
      node.disconnectInput(node.inputs.findIndex(({ name }) => name === "memory_settings"));
    }
  });
  await page.waitForTimeout(300);
  const apart = await page.evaluate(planned);
  if (Object.keys(apart.labels).length) problems.push(`still grey after disconnecting: ${Object.keys(apart.labels)}`);
}

function planned() {
  const { plan, precompute, trainer } = window.made;
  const checked = { batch_size: trainer, quantize_kept: trainer, patch_min: precompute, storage: precompute, rank: plan, draws: plan };
  const labels = {};
  for (const [name, node] of Object.entries(checked)) {
    const widget = node.widgets.find((one) => one.name === name);
    if (widget.disabled) labels[name] = widget.label;
  }
  const value = (name) => plan.widgets.find((one) => one.name === name).value;
  return { labels, rank: value("rank"), draws: value("draws") };
}

await frame.run({ width: 1300, height: 1000 }, main);
