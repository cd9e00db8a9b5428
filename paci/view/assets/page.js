"use strict";
// Draws the timelines of one page on canvases that share a time axis.
// An event is [worker, stage, micro-batch, kind, start, duration, version, version of the partner].
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const GUTTER = 92, AXIS = 26, PAD = 4;
const longest = Math.max(...data.traces.map((t) => t.span), 1e-12);
const view = { start: 0, end: longest };
let lit = null; // {trace, stage, microBatch}: what is under the pointer, or pinned
let pinned = false;

function rowHeight(workers) { return workers <= 8 ? 30 : workers <= 24 ? 20 : workers <= 40 ? 13 : 8; }

function duration(seconds) {
  for (const [unit, name] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]]) {
    if (Math.abs(seconds) >= unit) return `${+(seconds / unit).toPrecision(4)} ${name}`;
  }
  return "0 s";
}

const panels = data.traces.map((trace, index) => {
  const canvas = document.getElementById(`canvas-${index}`);
  const rows = Array.from({ length: trace.workers }, () => []);
  for (const event of trace.events) rows[event[0]].push(event);
  const panel = { trace, canvas, rows, height: rowHeight(trace.workers), index };
  canvas.style.height = `${trace.workers * panel.height + AXIS + PAD}px`;
  return panel;
});

// The first event of a row that ends after `time`; events of a row do not overlap.
function firstAfter(row, time) {
  let low = 0, high = row.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (row[middle][4] + row[middle][5] <= time) low = middle + 1; else high = middle;
  }
  return low;
}

function shade(colour, share) {
  const parts = [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
  return `rgb(${parts.map((c) => Math.round(c + (255 - c) * share)).join(",")})`;
}

function ticks(span, most) {
  const least = span / Math.max(most, 1), power = 10 ** Math.floor(Math.log10(least));
  const step = power * [1, 2, 5, 10].find((f) => f * power >= least * (1 - 1e-9));
  const found = [];
  for (let k = Math.ceil(view.start / step - 1e-9); k * step <= view.end * (1 + 1e-9); k++) found.push(k * step);
  return found;
}

function draw(panel) {
  const { trace, canvas, rows, height } = panel;
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  const tall = trace.workers * height + AXIS + PAD;
  if (canvas.width !== Math.round(width * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tall * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, tall);
  const scale = (width - GUTTER) / (view.end - view.start);
  const bar = Math.max(height - (height > 12 ? 5 : 2), 3);
  const bottom = trace.workers * height + PAD;
  pen.textBaseline = "middle";
  rows.forEach((row, worker) => {
    const y = PAD + worker * height;
    pen.fillStyle = "#f4f5f7";
    pen.fillRect(GUTTER, y, width - GUTTER, bar);
    if (height >= 12 || worker % 4 === 0) {
      pen.fillStyle = "#5b6470";
      pen.font = `${Math.min(12.5, Math.max(height, 11))}px Helvetica, Arial, sans-serif`;
      pen.textAlign = "right";
      pen.fillText(trace.labels[worker], GUTTER - 9, y + bar / 2);
    }
  });
  pen.font = "12px Helvetica, Arial, sans-serif";
  pen.textAlign = "center";
  for (const at of ticks(view.end - view.start, (width - GUTTER) / 95)) {
    const x = GUTTER + (at - view.start) * scale;
    pen.fillStyle = "rgba(60, 70, 80, .16)";
    pen.fillRect(Math.round(x), PAD, 1, bottom - PAD);
    pen.fillStyle = "#5b6470";
    if (x < width - 18) pen.fillText(duration(at), Math.max(x, GUTTER + 12), bottom + 12);
  }
  pen.save();
  pen.beginPath();
  pen.rect(GUTTER, 0, width - GUTTER, bottom + PAD);
  pen.clip();
  rows.forEach((row, worker) => {
    const y = PAD + worker * height, stages = trace.stages[worker];
    for (let k = firstAfter(row, view.start); k < row.length && row[k][4] < view.end; k++) {
      const [, stage, microBatch, kind, start, took] = row[k];
      const x = GUTTER + (start - view.start) * scale, wide = took * scale;
      const isUpdate = kind === data.update;
      const share = stages.length > 1 ? 0.5 * stages.indexOf(stage) / (stages.length - 1) : 0;
      const on = lit && lit.trace === panel.index && lit.microBatch === microBatch && !isUpdate;
      pen.globalAlpha = lit && lit.trace === panel.index && !on && !isUpdate ? 0.32 : 1;
      pen.fillStyle = shade(data.kinds[kind].colour, isUpdate ? 0 : share);
      if (isUpdate) {
        pen.fillRect(x, y - 2, Math.max(wide, 1.6), bar + 4);
        continue;
      }
      pen.fillRect(x, y, Math.max(wide - Math.min(1, 0.15 * wide), 0.4), bar);
      if (on && lit.stage === stage) {
        pen.strokeStyle = "#111"; pen.lineWidth = 1.5;
        pen.strokeRect(x + 0.75, y + 0.75, Math.max(wide - 2.5, 1), bar - 1.5);
      }
      const text = String(microBatch);
      if (bar >= 9 && wide > 7 * text.length + 4) {
        pen.fillStyle = "#111";
        pen.font = `${Math.min(12, bar)}px Helvetica, Arial, sans-serif`;
        pen.fillText(text, x + wide / 2, y + bar / 2 + 0.5);
      }
    }
  });
  pen.restore();
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; panels.forEach(draw); });
}

function timeAt(canvas, clientX) {
  const box = canvas.getBoundingClientRect();
  return view.start + (clientX - box.left - GUTTER) / (box.width - GUTTER) * (view.end - view.start);
}

function eventAt(panel, clientX, clientY) {
  const box = panel.canvas.getBoundingClientRect();
  const worker = Math.floor((clientY - box.top - PAD) / panel.height);
  if (worker < 0 || worker >= panel.rows.length || clientX < box.left + GUTTER) return null;
  const row = panel.rows[worker], time = timeAt(panel.canvas, clientX);
  let k = firstAfter(row, time);
  while (k < row.length && row[k][3] === data.update && row[k][5] === 0) k++;
  return k < row.length && row[k][4] <= time ? row[k] : null;
}

function tell(event) {
  const [worker, stage, microBatch, kind, start, took, version, other] = event;
  const known = data.kinds[kind], rows = [["worker", worker], ["stage", stage]];
  rows.push([kind === data.update ? "last micro-batch" : "micro-batch", microBatch]);
  if (known.role === "forward" || known.role === "backward") {
    const [forward, backward] = known.role === "forward" ? [version, other] : [other, version];
    rows.push(["version at forward", forward ?? "not shown"], ["version at backward", backward ?? "not shown"]);
    if (forward !== null && backward !== null) rows.push(["drift", backward - forward]);
  } else rows.push(["version", version]);
  rows.push(["start", duration(start)], ["duration", duration(took)]);
  const body = rows.map(([name, value]) => `<tr><td>${name}</td><td>${value}</td></tr>`).join("");
  return `<b>${known.name}</b><table>${body}</table>`;
}

function show(panel, mouse) {
  const event = eventAt(panel, mouse.clientX, mouse.clientY);
  lit = event && { trace: panel.index, stage: event[1], microBatch: event[2] };
  tip.style.display = event ? "block" : "none";
  if (event) {
    tip.innerHTML = tell(event);
    const box = tip.getBoundingClientRect();
    const left = mouse.clientX + 16 + box.width > innerWidth ? mouse.clientX - box.width - 12 : mouse.clientX + 16;
    const top = Math.min(mouse.clientY + 14, innerHeight - box.height - 8);
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${Math.max(top, 4)}px`;
  }
  redraw();
  return event;
}

function zoom(factor, around) {
  const span = Math.min(Math.max((view.end - view.start) * factor, longest * 1e-6), longest);
  const share = (around - view.start) / (view.end - view.start);
  move(around - share * span, span);
}

function move(start, span) {
  view.start = Math.min(Math.max(start, 0), longest - span);
  view.end = view.start + span;
  redraw();
}

let grabbed = null;
for (const panel of panels) {
  const { canvas } = panel;
  canvas.addEventListener("wheel", (mouse) => {
    mouse.preventDefault();
    const span = view.end - view.start;
    if (Math.abs(mouse.deltaX) > Math.abs(mouse.deltaY)) move(view.start + mouse.deltaX / canvas.clientWidth * span, span);
    else zoom(Math.exp(mouse.deltaY * 0.0015), timeAt(canvas, mouse.clientX));
  }, { passive: false });
  canvas.addEventListener("mousedown", (mouse) => { grabbed = { x: mouse.clientX, start: view.start, canvas, moved: false }; });
  canvas.addEventListener("mousemove", (mouse) => { if (!pinned && !grabbed?.moved) show(panel, mouse); });
  canvas.addEventListener("mouseleave", () => { if (!pinned) { lit = null; tip.style.display = "none"; redraw(); } });
  canvas.addEventListener("dblclick", () => move(0, longest));
  canvas.addEventListener("click", (mouse) => {
    if (grabbed?.moved) return;
    pinned = false;
    pinned = show(panel, mouse) !== null;
    tip.classList.toggle("pinned", pinned);
  });
}
addEventListener("mousemove", (mouse) => {
  if (!grabbed || mouse.buttons === 0) return;
  const pixels = mouse.clientX - grabbed.x;
  if (Math.abs(pixels) < 4 && !grabbed.moved) return;
  grabbed.moved = true;
  grabbed.canvas.classList.add("dragging");
  const span = view.end - view.start;
  move(grabbed.start - pixels / (grabbed.canvas.clientWidth - GUTTER) * span, span);
});
addEventListener("mouseup", () => { grabbed?.canvas.classList.remove("dragging"); setTimeout(() => { grabbed = null; }); });
addEventListener("keydown", (key) => {
  const span = view.end - view.start, middle = view.start + span / 2;
  if (key.key === "+" || key.key === "=") zoom(0.6, middle);
  else if (key.key === "-") zoom(1 / 0.6, middle);
  else if (key.key === "0") move(0, longest);
  else if (key.key === "ArrowRight") move(view.start + span * 0.2, span);
  else if (key.key === "ArrowLeft") move(view.start - span * 0.2, span);
  else if (key.key === "Escape") { pinned = false; lit = null; tip.style.display = "none"; tip.classList.remove("pinned"); redraw(); }
});
document.getElementById("closer").addEventListener("click", () => zoom(0.5, (view.start + view.end) / 2));
document.getElementById("wider").addEventListener("click", () => zoom(2, (view.start + view.end) / 2));
document.getElementById("whole").addEventListener("click", () => move(0, longest));
addEventListener("resize", redraw);
// A long run opens where single actions can be told apart.
if (data.open && data.open < longest) move(0, data.open);
panels.forEach(draw);
window.paciView = view; // for those who drive the page by script
document.body.dataset.ready = "yes";
