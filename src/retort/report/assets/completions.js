// The browser of completions. All that a model or a data set wrote goes in as text, never as HTML.
const shown = read("completions");
const filters = document.getElementById("completions-controls");
const list = document.getElementById("completions-list");
const matching = document.getElementById("completions-status");
const pager = document.getElementById("completions-pager");
const PER_PAGE = 12;
let found = shown.model.map((_, i) => i);
let first = 0;

// Choosing and ordering

function wanted() {
  const data = new FormData(filters);
  const number = (name) => (data.get(name) === "" ? null : Number(data.get(name)));
  return {
    model: number("model"),
    problem: number("problem"),
    verdict: data.get("verdict"),
    text: data.get("text").trim().toLowerCase(),
    sort: data.get("sort"),
  };
}

function matches(i, wish) {
  return (wish.model === null || shown.model[i] === wish.model)
    && (wish.problem === null || shown.problem[i] === wish.problem)
    && (wish.verdict === "" || shown.verdict[i] === wish.verdict)
    && (wish.text === "" || searched(i).includes(wish.text));
}

function searched(i) {
  const { question, id } = shown.problems[shown.problem[i]];
  return [id, question, shown.answer[i] ?? "", ...shown.steps[i]].join("\n").toLowerCase();
}

function order(sort) {
  const [key, scorer] = sort.split(":");
  const score = (i) => shown.scores[scorer][i]?.at(-1) ?? -1;
  const together = (i, j) => // the models' completions of a problem beside one another
    shown.problem[i] - shown.problem[j] || shown.sample[i] - shown.sample[j] || i - j;
  const by = {
    problem: together,
    long: (i, j) => shown.tokens[j] - shown.tokens[i],
    short: (i, j) => shown.tokens[i] - shown.tokens[j],
    high: (i, j) => score(j) - score(i),
    low: (i, j) => score(i) - score(j),
  };
  return by[key];
}

function choose() {
  const wish = wanted();
  found = shown.model.map((_, i) => i).filter((i) => matches(i, wish)).sort(order(wish.sort));
  turn(0);
}

// Showing

function turn(to) {
  first = to;
  const some = found.slice(first, first + PER_PAGE);
  list.replaceChildren(...some.map(entry));
  const range = `${first + 1} to ${first + some.length} of `;
  matching.textContent = `${some.length ? range : ""}${found.length} completions that match`;
  const [back, on] = pager.querySelectorAll("button");
  back.disabled = first === 0;
  on.disabled = first + PER_PAGE >= found.length;
}

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content); // strings become text nodes
  return element;
}

function entry(i) {
  const problem = shown.problems[shown.problem[i]];
  const answer = shown.answer[i] === null ? "no answer" : `answered ${shown.answer[i]}`;
  const summary = make("summary", "",
    make("span", `badge ${shown.verdict[i].replace(" ", "-")}`, shown.verdict[i]), " ",
    make("b", "", shown.models[shown.model[i]]), " ",
    make("span", "note", `${problem.id}, sample ${shown.sample[i]}: ${answer}`));
  const details = make("details", "", summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(body(i, problem));
  });
  return make("li", "", details);
}

function body(i, problem) {
  return make("div", "completion",
    fact("Question", make("div", "text", problem.question)),
    fact("Right answer", make("div", "text", problem.answer)),
    fact("Completion", steps(i)),
    make("p", "note", facts(i)));
}

function fact(title, content) {
  return make("section", "", make("h3", "", title), content);
}

function steps(i) {
  const rows = shown.steps[i].map((text, step) =>
    make("li", "", make("div", "text", text), ...badges(i, step)));
  return make("ol", "steps", ...rows);
}

// A model of steps gives each its score; one that judges the whole gives one, shown with the facts.
function badges(i, step) {
  return Object.entries(shown.scores)
    .filter(([, scores]) => scores[i]?.length > 1 || shown.steps[i].length === 1)
    .filter(([, scores]) => scores[i]?.[step] !== undefined)
    .map(([scorer, scores]) => make("span", "score", `${scorer} ${scores[i][step].toFixed(3)}`));
}

function facts(i) {
  const whole = Object.entries(shown.scores)
    .filter(([, scores]) => scores[i]?.length === 1 && shown.steps[i].length > 1)
    .map(([scorer, scores]) => `score by ${scorer} ${scores[i][0].toFixed(3)}`);
  const end = shown.cut[i] ? "cut off at the length limit" : "ended by itself";
  const answer = shown.answer[i] === null ? "no answer found" : `found answer: ${shown.answer[i]}`;
  const verdict = `${shown.right[i] ? "right" : "wrong"} (${shown.method[i]})`;
  return [answer, verdict, `${shown.tokens[i]} tokens`, end, ...whole].join(" · ");
}

filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("input", choose);
pager.addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  turn(first + PER_PAGE * (event.target.value === "on" ? 1 : -1));
  matching.focus();
});
filters.reset();
choose();
