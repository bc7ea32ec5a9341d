// The main figure. Its form is the state: what is drawn, said and shared is read from it.
const told = read("explorer");
const form = document.getElementById("explorer-controls");
const places = ["explorer-cost", "explorer-k"].map((id) => document.getElementById(id));
const tableOfFigure = document.getElementById("explorer-table");
const K = told.axes.find((axis) => axis.name === "k");
const THIN = "\u202f"; // a narrow space that does not break
let drawn = []; // the two views, once they are there

// What is chosen

function chosen() {
  const data = new FormData(form); // without what is disabled
  return {
    rule: told.rules.find((rule) => rule.name === data.get("rule")),
    axis: told.axes.find((axis) => axis.name === data.get("axis")),
    log: data.has("log"),
    prefill: data.has("prefill"),
    scoring: data.has("scoring"),
    models: told.models.filter((_, i) => data.has(`model-${i}`)),
  };
}

function allow() {
  const { rule, axis } = chosen();
  const timed = axis.unit !== "count";
  const judged = told.models.filter((model) => rule.name in model.rules);
  const scored = rule.scorer !== null && judged.every((model) => rule.scorer in model.scoring);
  form.elements.prefill.disabled = !timed;
  if (form.elements.scoring) form.elements.scoring.disabled = !timed || !scored;
}

// What it costs

function cost(model, axis, base, k, view) {
  if (axis.unit === "count") return base;
  const prefill = view.prefill ? model.prefill : 0;
  const scoring = view.scoring ? k * model.scoring[view.rule.scorer] : 0;
  const seconds = base + prefill + scoring;
  return axis.unit === "money" ? (1000 * seconds * model.price) / 3600 : seconds;
}

function record(model, axis, view, k, base, [value, low, high]) {
  const x = cost(model, axis, base, k, view);
  const interval = `${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)}${THIN}%`;
  const takes = amount(x, axis);
  return { model: model.name, k, x, value, low, high, interval, takes, key: `${k} ${model.name}` };
}

function points(view, axis) {
  return view.models.flatMap((model) =>
    (model.rules[view.rule.name] ?? []).map((accuracy, i) =>
      record(model, axis, view, model.k[i], model.costs[axis.name][i], accuracy)));
}

function stops(view, axis) {
  return view.models.flatMap((model) =>
    (model.stops[view.rule.name] ?? [])
      .filter((stop) => axis.name in stop.costs)
      .map((stop) => ({
        ...record(model, axis, view, stop.k, stop.costs[axis.name], stop.accuracy),
        stop: stop.stop,
      })));
}

function crossings(view, axis) {
  const shown = new Set(view.models.map((model) => model.name));
  const plain = axis.name === "seconds" && !view.prefill && !view.scoring;
  if (!plain || !shown.has(told.reference)) return [];
  const narrow = places[0].clientWidth < 480;
  return told.crossings[view.rule.name]
    .filter((each) => shown.has(each.model))
    .map((each) => (narrow ? { ...each, label: each.brief } : each));
}

// In words

function amount(x, axis) {
  if (axis.unit === "time") return duration(x);
  if (axis.unit === "money") return x.toPrecision(3);
  return axis.name === "k" ? String(Number(x.toFixed(1))) : quantity(x);
}

function duration(s) {
  if (s < 0.01) return `${Number((1000 * s).toPrecision(2))}${THIN}ms`;
  if (s < 0.9995) return `${(1000 * s).toFixed(0)}${THIN}ms`;
  if (s < 9.95) return `${s.toFixed(1)}${THIN}s`;
  if (s < 59.5) return `${s.toFixed(0)}${THIN}s`;
  return s < 3599.5 ? `${(s / 60).toFixed(1)}${THIN}min` : `${(s / 3600).toFixed(1)}${THIN}h`;
}

function quantity(x) {
  const units = ["", "k", "M", "B", "T", "· 10¹⁵", "· 10¹⁸"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(x) / 3)));
  const shown = Number((x / 1000 ** power).toPrecision(3));
  return power ? `${shown}${THIN}${units[power]}` : String(shown);
}

function percent(share) {
  return `${(100 * share).toFixed(1)}${THIN}%`;
}

function sentence(view, found) {
  const last = view.models.map((model) => found.findLast((each) => each.model === model.name));
  const ends = last.filter(Boolean).map((each) =>
    `${each.model} ${percent(each.value)} with k = ${each.k}` +
    (view.axis === K ? "" : ` (${each.takes})`));
  const what = `${view.rule.title}, the ${view.rule.meaning}, against ${view.axis.label}.`;
  const hollow = stops(view, view.axis).length ? " Hollow marks: voting that stops early." : "";
  return `${what} At the end: ${ends.join(", ") || "no model is chosen"}.${hollow}`;
}

// The figure

function ticks(values, axis) {
  if (axis === K) return [...new Set(values)].sort((a, b) => a - b);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) return [low];
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const steps = last - first <= 4 ? [1, 2, 5] : [1];
  const powers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  return powers.flatMap((power) => steps.map((step) => Number(`${step}e${power}`)));
}

function across(view, axis, found) {
  const values = found.map((each) => each.x);
  const log = view.log && values.length > 0 && Math.min(...values) > 0;
  const base = axis === K ? 2 : 10;
  const marks = log ? { values: ticks(values, axis) } : { tickCount: 6 };
  const format = axis === K ? "d" : axis.unit === "count" ? "~s" : ".3~r";
  return {
    field: "x",
    type: "quantitative",
    title: axis.label + (log ? " (log scale)" : ""),
    scale: { ...(log ? { type: "log", base } : { zero: true }), nice: false, padding: 12 },
    axis: { ...marks, format, labelOverlap: true },
  };
}

function figure(view, axis) {
  const found = points(view, axis);
  const datasets = {
    "live-points": found,
    "live-stops": stops(view, axis),
    "live-crossings": crossings(view, axis),
  };
  const layer = told.spec.layer.filter((each) => datasets[each.data.name].length); // Vega warns of none
  const description = `${view.rule.title} against ${axis.label}; the numbers are in the table below.`;
  return { ...told.spec, description, layer, datasets, encoding: { x: across(view, axis, found) } };
}

async function show() {
  allow();
  const view = chosen();
  const axes = view.axis === K ? [K] : [view.axis, K];
  places[1].hidden = axes.length < 2;
  places[0].parentElement.classList.toggle("single", axes.length < 2);
  document.getElementById("explorer-status").textContent = sentence(view, points(view, view.axis));
  fill(view);
  share();
  for (const place of places) place.replaceChildren();
  if (view.models.length === 0) return;
  const figures = axes.map((axis, i) => embed(places[i], figure(view, axis)));
  drawn = (await Promise.all(figures)).map((result) => result.view);
  for (const one of drawn) one.addEventListener("mouseover", lightUp);
}

function lightUp(_, item) {
  const key = item?.datum?.key ?? "";
  for (const one of drawn) one.signal("hovered", key).run();
}

// The figure as a table

function fill(view) {
  if (!tableOfFigure.open) return;
  const head = ["Model", "k", view.axis.label, view.rule.title, `95${THIN}% interval`];
  const rows = points(view, view.axis).map((each) =>
    [each.model, each.k, each.takes, percent(each.value), each.interval]);
  const table = document.createElement("table");
  table.className = "plain";
  table.createTHead().append(line("th", head));
  table.createTBody().append(...rows.map((cells) => line("td", cells)));
  tableOfFigure.querySelector(".scrolled").replaceChildren(table);
}

function line(tag, cells) {
  const row = document.createElement("tr");
  row.append(...cells.map((text) => {
    const cell = document.createElement(tag);
    cell.textContent = text;
    return cell;
  }));
  return row;
}

// Its state in the address: what differs from the page as it opens

function boxes() {
  return [...form.querySelectorAll("input[type=checkbox]")];
}

function share() {
  const state = new URLSearchParams();
  for (const menu of form.querySelectorAll("select"))
    if (menu.selectedIndex > 0) state.set(menu.name, menu.value);
  for (const box of boxes())
    if (box.checked !== box.defaultChecked) state.set(box.name, box.checked ? "1" : "0");
  const was = location.hash.includes("=");
  if (was || state.size) history.replaceState(null, "", `#${state}`);
}

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const menu of form.querySelectorAll("select")) {
    const known = [...menu.options].some((option) => option.value === state.get(menu.name));
    menu.value = known ? state.get(menu.name) : menu.options[0].value;
  }
  for (const box of boxes())
    box.checked = state.has(box.name) ? state.get(box.name) === "1" : box.defaultChecked;
}

function colour() {
  const colours = (scheme.matches ? dark : light).range.category;
  for (const symbol of document.querySelectorAll(".symbol"))
    symbol.style.fill = colours[symbol.dataset.model % colours.length];
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", show);
tableOfFigure.addEventListener("toggle", () => fill(chosen()));
scheme.addEventListener("change", () => { colour(); show(); });
window.addEventListener("hashchange", () => {
  if (location.hash && !location.hash.includes("=")) return; // a link to a section
  restore();
  show();
});
restore();
colour();
show();
