// Checks in ComfyUI's real frontend, in a headless Chromium, that our nodes show few inputs and fold the others away.
//
//   node devtools/check_settings.mjs SERVER [--vue] [--screenshots DIR]
//
// Checked are, for each of our nodes: folded inputs when it is created, all inputs after the button is pressed, no gaps, the
// same saved values in both states, and that a reloaded graph remembers the state. And the widgets that Memory Plan's output
// `settings` overrides: greyed, and named after it, unless it is muted or bypassed; and what it reads from the nodes that use
// it: of the node that runs, also in a subgraph, in the same step of undo, and not what comes over a link.
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
  for (const check of [checkOff, checkUndo, checkTwoTrainers, checkLinked, checkSubgraphs]) {
    await connect(page);
    await check(page);
  }
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

/** Memory Plan, connected to the two nodes that use it. */
async function connect(page) {
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
    window.widget = (node, name) => node.widgets.find((one) => one.name === name);
    window.soon = () => new Promise((resolve) => setTimeout(resolve, 200));
    const output = plan.outputs.findIndex(({ name }) => name === "settings");
    for (const node of [precompute, trainer]) {
      plan.connect(output, node, node.inputs.findIndex(({ name }) => name === "memory_settings"));
    }
    Object.assign(app.canvas.ds, { scale: 0.8, offset: [80, 80] });
    app.canvas.setDirty(true, true);
  });
  await page.waitForTimeout(300);
}

async function checkPlanned(page) {
  await connect(page);
  await page.evaluate(() => {
    const { precompute, trainer } = window.made;
    Object.assign(window.widget(trainer, "rank"), { value: 48 }).callback(48);
    Object.assign(window.widget(precompute, "draws"), { value: 123 }).callback(123);
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

/** A plan that is not sent sets nothing, and says so at once. */
async function checkOff(page) {
  for (const mode of [4, 2, 0]) {
    const labels = await page.evaluate((to) => {
      window.made.plan.mode = to;
      const { precompute, trainer } = window.made;
      return [[trainer, "batch_size"], [precompute, "patch_min"]].map(([node, name]) => window.widget(node, name)).map((one) => one.label ?? one.name);
    }, mode);
    const told = labels.filter((label) => label.includes("(from "));
    if (told.length !== (mode ? 0 : 2)) problems.push(`with a plan of mode ${mode} the widgets are called ${labels}`);
    if (options.vue) await checkDrawn(page, mode);
  }
}

async function checkDrawn(page, mode) {
  await page.waitForTimeout(400);
  const row = page.locator('[data-testid="node-widget"]:visible', { hasText: "patch_min (from" });
  if ((await row.count()) !== (mode ? 0 : 1)) problems.push(`with a plan of mode ${mode} ${await row.count()} rows say where patch_min is from`);
}

/** What the plan reads is in the same step of undo as what is changed. */
async function checkUndo(page) {
  const steps = await page.evaluate(async () => {
    const { changeTracker } = window.app.extensionManager.workflow.activeWorkflow;
    const { plan, trainer } = window.made;
    const changes = [
      () => ((window.widget(trainer, "rank").value = 33), window.widget(trainer, "rank").callback(33)),
      () => (plan.mode = 4),
      () => (window.widget(trainer, "rank").value = 44), // which the plan reads when it is back
      () => (plan.mode = 0),
    ];
    const added = [];
    for (const change of changes) {
      changeTracker.captureCanvasState();
      const before = changeTracker.undoQueue.length;
      change();
      changeTracker.captureCanvasState(); // as the frontend does after each event
      await window.soon();
      changeTracker.captureCanvasState();
      added.push(changeTracker.undoQueue.length - before);
    }
    return [...added, window.widget(plan, "rank").value];
  });
  if (String(steps) !== "1,1,1,1,44") problems.push(`steps of undo, and the plan's rank: ${steps}`);
}

/** Of two trainers the one that runs counts. */
async function checkTwoTrainers(page) {
  const ranks = await page.evaluate(() => {
    const { plan, trainer } = window.made;
    const other = window.LiteGraph.createNode("BlockSkip_TrainLora");
    window.app.rootGraph.add(other);
    const input = other.inputs.findIndex(({ name }) => name === "memory_settings");
    plan.connect(plan.outputs.findIndex(({ name }) => name === "settings"), other, input);
    window.widget(trainer, "rank").value = 32;
    window.widget(other, "rank").value = 64;
    const read = [2, 0].map((mode) => {
      trainer.mode = mode;
      return window.widget(plan, "rank").value;
    });
    trainer.mode = other.mode = 4;
    return [...read, Boolean(window.widget(plan, "rank").disabled)];
  });
  if (String(ranks) !== "64,32,false") problems.push(`two trainers: the plan's rank with one, both and none: ${ranks}`);
}

/** A rank that comes over a link is not in the trainer's widget. */
async function checkLinked(page) {
  const found = await page.evaluate(() => {
    const { plan, trainer } = window.made;
    Object.assign(window.widget(trainer, "rank"), { value: 48 }).callback(48);
    const number = window.LiteGraph.createNode("PrimitiveInt");
    window.app.rootGraph.add(number);
    number.connect(0, trainer, trainer.inputs.findIndex(({ name }) => name === "rank"));
    const own = window.widget(plan, "rank");
    own.value = 128;
    window.widget(trainer, "targets").callback();
    return [own.value, Boolean(own.disabled), own.label ?? own.name];
  });
  if (String(found) !== "128,false,rank") problems.push(`a linked rank: the plan has ${found}`);
}

/** The plan, and then the trainer too, in subgraphs of their own. */
async function checkSubgraphs(page) {
  const found = await page.evaluate(async () => {
    const { app, made, widget, soon } = window;
    const inside = (kind) => app.rootGraph.nodes.flatMap((node) => node.subgraph?.nodes ?? []).find(({ comfyClass }) => comfyClass === kind);
    const seen = [];
    const look = async (plan, trainer, rank) => {
      await soon();
      Object.assign(widget(trainer, "rank"), { value: rank }).callback(rank);
      seen.push(widget(plan, "rank").value, Boolean(widget(trainer, "batch_size").disabled));
    };
    app.rootGraph.convertToSubgraph(new Set([made.plan]));
    await look(inside("BlockSkip_MemoryPlan"), made.trainer, 96);
    app.rootGraph.convertToSubgraph(new Set([made.trainer]));
    await look(inside("BlockSkip_MemoryPlan"), inside("BlockSkip_TrainLora"), 24);
    const { output } = await app.graphToPrompt();
    for (const { class_type: kind, inputs } of Object.values(output)) if (kind !== "BlockSkip_PrecomputeResiduals") seen.push(inputs.rank);
    app.rootGraph.nodes.find(({ subgraph }) => subgraph?.nodes.some(({ comfyClass }) => comfyClass === "BlockSkip_MemoryPlan")).mode = 4;
    seen.push(Boolean(widget(inside("BlockSkip_TrainLora"), "batch_size").disabled));
    return seen;
  });
  if (String(found) !== "96,true,24,true,24,24,false") problems.push(`in subgraphs: ${found}`);
}

await frame.run({ width: 1300, height: 1000 }, main);
