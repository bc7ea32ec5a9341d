// Bundled with vega-embed, which defines vegaEmbed.
const { specs, light, dark, nameWidth } = read("figures");
const scheme = window.matchMedia("(prefers-color-scheme: dark)");

function read(name) {
  return JSON.parse(document.getElementById(`data-${name}`).textContent);
}

function config(width) {
  const chosen = scheme.matches ? dark : light;
  const columns = Math.max(1, Math.floor((width - 60) / nameWidth)); // 60: the vertical axis
  return { ...chosen, legend: { ...chosen.legend, columns } };
}

function embed(place, spec) {
  return vegaEmbed(place, spec, {
    actions: false,
    ast: true, // interprets expressions, so the page can forbid eval
    config: config(place.clientWidth),
    renderer: "svg",
    tooltip: { theme: scheme.matches ? "dark" : "light" },
  });
}

function draw() {
  for (const [id, spec] of Object.entries(specs)) embed(document.getElementById(id), spec);
}

draw();
scheme.addEventListener("change", draw);
