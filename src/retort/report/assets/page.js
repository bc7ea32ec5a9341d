// Bundled with vega-embed, which defines vegaEmbed.
const { specs, light, dark, nameWidth } = JSON.parse(document.getElementById("figures").textContent);
const scheme = window.matchMedia("(prefers-color-scheme: dark)");

function config(width) {
  const chosen = scheme.matches ? dark : light;
  const columns = Math.max(1, Math.floor((width - 60) / nameWidth)); // 60: the vertical axis
  return { ...chosen, legend: { ...chosen.legend, columns } };
}

function draw() {
  for (const [id, spec] of Object.entries(specs)) {
    const place = document.getElementById(id);
    vegaEmbed(place, spec, {
      actions: false,
      ast: true, // interprets expressions, so the page can forbid eval
      config: config(place.clientWidth),
      renderer: "svg",
      tooltip: { theme: scheme.matches ? "dark" : "light" },
    });
  }
}

draw();
scheme.addEventListener("change", draw);
