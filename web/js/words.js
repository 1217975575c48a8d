// The page's texts in English and Chinese. Independent of ComfyUI, which does not translate what packs draw themselves.

const ENGLISH = {
  "error.title": "BlockSkip: {node}",
  "error.help": "Help: what to do",
  "cancel.title": "BlockSkip: training cancelled",
  "cancel.resumes": "Cancelled at step {step} of {steps}. Checkpoint saved as {file}; queue again to resume.",
  "cancel.saved": "Cancelled at step {step} of {steps}. Checkpoint saved as {file}.",
  "cancel.nothing": "Cancelled before the first step; nothing was saved.",
  "done.saved": "Saved as {file}.",
  "settings.more": "More settings",
  "settings.fewer": "Fewer settings",
  "planned.from": "{name} (from {node})",
  "plan.empty": "Queue to see whether the run will fit. Nothing is loaded.",
  "plan.fits": "Needs {needed} as set, you have {available}: fits.",
  "plan.needs": "Needs {needed} as set, you have {available}.",
  "plan.runs": "This run uses {changes}: {needed}, fits.",
  "plan.would": "With `settings` connected the run uses {changes}: {needed}, fits.",
  "plan.set": "as set",
  "plan.run": "as run",
  "plan.available": "{available} available ({place})",
  "plan.skipped": "not run",
  "plan.choosing blocks": "choosing blocks",
  "plan.precomputing": "precomputing",
  "plan.training": "training",
  "help.close": "Close",
  "help.missing": "The help page could not be loaded.",
  "chart.none": "No run yet",
  "chart.empty": "Loss, samples, time left and memory appear here during training.",
  "chart.label": "Loss of {count} training steps",
  "chart.failed": "Stopped: {node}",
  "chart.progress": "{phase} {done} of {total}",
  "chart.step": "step {step} of {steps}",
  "chart.left": "{time} left",
  "chart.summary": "Open summary",
  "phase.starting": "Starting",
  "phase.preparing": "Preparing",
  "phase.selecting": "Selecting blocks",
  "phase.precomputing": "Precomputing",
  "phase.sampling": "Sampling",
  "phase.training": "Training",
  "phase.done": "Done",
  "phase.cancelled": "Cancelled",
  "phase.failed": "Stopped by an error",
  "phase.lost": "The server stopped",
  "plot.loss": "loss",
  "plot.smoothed": "smoothed",
  "plot.rate": "learning rate",
  "plot.likeness": "likeness",
  "plot.best": "{x} at step {step}",
  "plot.step": "step {step}",
  "figure.loss": "loss {x}",
  "figure.smoothed": "smoothed {x}",
  "figure.rate": "lr {x}",
  "figure.pace": "{x} s per step",
  "figure.memory": "memory {x} now",
  "figure.peak": "peak {x}",
  "time.seconds": "{s} s",
  "time.minutes": "{m} min {s} s",
  "time.hours": "{h} h {m} min",
  "sample.now": "Sample now",
  "sample.asked": "Samples after this step",
  "sample.title": "BlockSkip: no sample",
  "sample.refused": "This run has ended, or Sample While Training is not connected.",
  "samples.open": "Click to enlarge and compare",
  "samples.likeness": "Likeness of the sample and the training pictures, of at most 1",
  "samples.slider": "Left of the slider: the first sample",
  "samples.caption": "Left: step {before}. Right: step {after}. Arrow keys show the other samples.",
};

const CHINESE = {
  "error.title": "BlockSkip 出错：{node}",
  "error.help": "帮助：如何处理",
  "cancel.title": "BlockSkip：训练已取消",
  "cancel.resumes": "已在第 {step} 步（共 {steps} 步）取消。检查点已保存为 {file}；再次加入队列即可继续。",
  "cancel.saved": "已在第 {step} 步（共 {steps} 步）取消。检查点已保存为 {file}。",
  "cancel.nothing": "在第一步之前已取消；没有保存任何内容。",
  "done.saved": "已保存为 {file}。",
  "settings.more": "更多设置",
  "settings.fewer": "收起设置",
  "planned.from": "{name}（来自 {node}）",
  "plan.empty": "运行后即可看到这次训练是否放得下。不会加载任何东西。",
  "plan.fits": "按当前设置需要 {needed}，可用 {available}：放得下。",
  "plan.needs": "按当前设置需要 {needed}，可用 {available}。",
  "plan.runs": "这次训练使用 {changes}：需要 {needed}，放得下。",
  "plan.would": "连接 `settings` 后，训练使用 {changes}：需要 {needed}，放得下。",
  "plan.set": "按设置",
  "plan.run": "实际",
  "plan.available": "可用 {available}（{place}）",
  "plan.skipped": "不运行",
  "plan.choosing blocks": "选择块",
  "plan.precomputing": "预计算",
  "plan.training": "训练",
  "help.close": "关闭",
  "help.missing": "无法加载帮助页面。",
  "chart.none": "尚未运行",
  "chart.empty": "训练时，损失、样图、剩余时间和显存会显示在这里。",
  "chart.label": "{count} 个训练步的损失",
  "chart.failed": "已停止：{node}",
  "chart.progress": "{phase} 已完成 {done} / {total}",
  "chart.step": "第 {step} 步，共 {steps} 步",
  "chart.left": "剩余 {time}",
  "chart.summary": "打开总结",
  "phase.starting": "启动中",
  "phase.preparing": "准备中",
  "phase.selecting": "选择块",
  "phase.precomputing": "预计算",
  "phase.sampling": "采样",
  "phase.training": "训练中",
  "phase.done": "已完成",
  "phase.cancelled": "已取消",
  "phase.failed": "因错误停止",
  "phase.lost": "服务器已停止",
  "plot.loss": "损失",
  "plot.smoothed": "平滑",
  "plot.rate": "学习率",
  "plot.likeness": "相似度",
  "plot.best": "第 {step} 步 {x}",
  "plot.step": "第 {step} 步",
  "figure.loss": "损失 {x}",
  "figure.smoothed": "平滑 {x}",
  "figure.rate": "学习率 {x}",
  "figure.pace": "每步 {x} 秒",
  "figure.memory": "当前显存 {x}",
  "figure.peak": "峰值 {x}",
  "time.seconds": "{s} 秒",
  "time.minutes": "{m} 分 {s} 秒",
  "time.hours": "{h} 小时 {m} 分",
  "sample.now": "立即采样",
  "sample.asked": "本步之后采样",
  "sample.title": "BlockSkip：没有样图",
  "sample.refused": "这次训练已结束，或没有连接 Sample While Training。",
  "samples.open": "点击放大并对比",
  "samples.likeness": "样图与训练图片的相似度，最高为 1",
  "samples.slider": "滑块左侧：第一张样图",
  "samples.caption": "左：第 {before} 步。右：第 {after} 步。方向键切换其他样图。",
};

/** The server's names for parts of the work, in Chinese. */
const CHINESE_WORK = {
  "encoding crops": "编码裁剪图",
  "encoding references": "编码参考图",
  "measuring blocks, sampler step": "测量块，采样步",
  "layers quantised": "已量化的层",
  "counting memory": "计算显存",
  "fitting the linear back residual": "拟合线性后段残差",
  "waiting for another process that computes the same residuals": "等待另一个进程计算相同的残差",
  "waiting for another process that measures the same blocks": "等待另一个进程测量相同的块",
  "waiting for another process that trains the same run": "等待另一个进程完成相同的训练",
};

export const LANGUAGES = { en: ENGLISH, zh: CHINESE };

let spoken = "en";

/** Use the language of a locale such as "zh" or "zh-TW"; others than Chinese get English. */
export function speak(locale) {
  spoken = /^zh\b/.test(locale ?? "") ? "zh" : "en";
}

/** Bytes in a readable unit. */
export function bytes(count) {
  return count < 2 ** 30 ? `${(count / 2 ** 20).toFixed(count < 2 ** 24 ? 1 : 0)} MiB` : `${(count / 2 ** 30).toFixed(1)} GiB`;
}

/** A part of the work in the current language. */
export function work(name) {
  return (spoken === "zh" && CHINESE_WORK[name]) || name;
}

/** The text of a key in the current language, with `{name}` replaced by values. */
export function say(key, values = {}) {
  return LANGUAGES[spoken][key].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}
