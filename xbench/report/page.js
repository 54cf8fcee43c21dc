"use strict";

// --- tables: sort, filter ---

function order(cell) {
  const text = cell.dataset.order === undefined ? cell.textContent.trim() : cell.dataset.order;
  return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
}

function sortBy(table, at, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("heading"));
    rows.sort((one, other) => {
      const [a, b] = [order(one.cells[at]), order(other.cells[at])];
      if (a === null || b === null) return (a === null) - (b === null); // unknown comes last
      return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    });
    body.append(...rows);
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const worse = () => (head.textContent.includes("higher is better") ? "descending" : "ascending");
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const now = was === null ? worse() : was === "ascending" ? "descending" : "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", now);
      sortBy(table, at, now);
    });
  });
}

function applyFilter(section) {
  const words = section.querySelector(".filter").value.toLowerCase();
  const box = section.querySelector(".controls");
  const controls = section.querySelector(".control-rows");
  if (controls) controls.hidden = !box.checked;
  const rows = [...section.querySelectorAll(".ranking tr[data-method]")];
  for (const row of rows) row.hidden = !row.dataset.method.toLowerCase().includes(words);
  const seen = rows.filter((row) => !row.hidden && !row.parentElement.hidden).length;
  section.querySelector(".count").textContent = seen === rows.length ? "" : `${seen} of ${rows.length} rows`;
}

const filtered = [...document.querySelectorAll("section")].filter((section) => section.querySelector(".filter"));
for (const section of filtered) {
  section.querySelector(".tools").addEventListener("input", () => applyFilter(section));
}
for (const form of document.querySelectorAll("form")) {
  form.addEventListener("submit", (event) => event.preventDefault());
}

// --- a link to a cell shows it, whatever is hidden ---

function showTarget() {
  let target = null;
  try {
    target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  } catch {
    return; // no text that any cell could be called
  }
  if (!target || !target.matches("td")) return;
  const section = target.closest("section");
  if (target.closest("[hidden]")) {
    section.querySelector(".filter").value = "";
    const box = section.querySelector(".controls");
    if (box) box.checked = true;
    applyFilter(section);
  }
  target.scrollIntoView({ block: "center", inline: "center" });
}
addEventListener("hashchange", showTarget);
showTarget();

// --- two methods, image by image ---

const groups = JSON.parse(document.getElementById("scatter-data").textContent);
const tools = document.getElementById("scatter-tools").elements;
const SIDE = 340, LEFT = 58, BOTTOM = 44, TOP = 12;

function node(name, facts, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(facts)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function fill(select, names, chosen) {
  select.replaceChildren(...names.map((name, at) => new Option(name, at, false, at === chosen)));
}

function choose() {
  const group = groups[tools.group.value];
  fill(tools.metric, group.metrics, 0);
  fill(tools.across, group.methods, 0);
  fill(tools.up, group.methods, Math.min(1, group.methods.length - 1));
  draw();
}

function short(value) {
  return String(Number(value.toPrecision(3)));
}

function draw() {
  const group = groups[tools.group.value];
  const figure = document.getElementById("scatter-figure");
  const note = document.getElementById("scatter-note");
  const values = group.values[tools.metric.value];
  if (!values) { figure.replaceChildren(); note.textContent = "There are no scores."; return; }
  const [across, up] = [values[tools.across.value], values[tools.up.value]];
  const points = across.map((x, at) => [x, up[at], group.images[at]]).filter(([x, y]) => x !== null && y !== null);
  const all = points.flatMap(([x, y]) => [x, y]);
  let [low, high] = all.length ? [Math.min(...all), Math.max(...all)] : [0, 1];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const inner = SIDE - 8;
  const at = (value) => 4 + (inner - 8) * (value - low) / (high - low);
  const names = [group.methods[tools.across.value], group.methods[tools.up.value]];
  const svg = node("svg", {
    viewBox: `0 0 ${SIDE + LEFT} ${SIDE + BOTTOM + TOP}`, width: SIDE + LEFT, height: SIDE + BOTTOM + TOP, role: "img",
    "aria-label": `Scores of ${names[0]} and ${names[1]} on ${points.length} images`,
  });
  const plot = node("g", { transform: `translate(${LEFT}, ${TOP})` });
  plot.append(node("path", { class: "axis", d: `M0 0V${inner}H${inner}` }));
  plot.append(node("line", { class: "equal", x1: at(low), y1: inner - at(low), x2: at(high), y2: inner - at(high) }));
  for (const tick of [low, (low + high) / 2, high]) {
    plot.append(node("text", { x: at(tick), y: inner + 16, "text-anchor": "middle" }, short(tick)));
    plot.append(node("text", { x: -6, y: inner - at(tick) + 4, "text-anchor": "end" }, short(tick)));
  }
  plot.append(node("text", { x: inner / 2, y: inner + 36, "text-anchor": "middle" }, names[0]));
  plot.append(node("text", { transform: `translate(${14 - LEFT}, ${inner / 2}) rotate(-90)`, "text-anchor": "middle" }, names[1]));
  for (const [x, y, image] of points) {
    const dot = node("circle", { cx: at(x), cy: inner - at(y), r: 3.5 });
    dot.append(node("title", {}, `${image}: ${x} and ${y}`));
    plot.append(dot);
  }
  svg.append(plot);
  figure.replaceChildren(svg);
  const above = points.filter(([x, y]) => y > x).length;
  const equal = points.filter(([x, y]) => y === x).length;
  note.textContent = `${points.length} images: ${names[1]} has the larger score on ${above}, ${names[0]} on ${points.length - above - equal}, equal on ${equal}.`;
}

if (groups.length) {
  tools.group.addEventListener("change", choose);
  for (const name of ["metric", "across", "up"]) tools[name].addEventListener("change", draw);
  choose();
}
