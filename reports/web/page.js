"use strict";
// The tables are in the page; this sorts and filters them, shows details, and lays other layers over the texts.
// What is chosen stands in the address behind #, as in #model=tiny-llama&sort=Counted%2C+%25&down=1.
document.documentElement.classList.add("scripted");
const content = (id) => JSON.parse(document.getElementById(id).textContent);

// The leaderboard.
const table = document.querySelector("#board table");
const heads = [...table.tHead.rows[0].cells];
const rows = [...table.tBodies[0].rows];
const form = document.querySelector("#board form");

let state = new URLSearchParams();

function choose(changes) {
  for (const [name, value] of Object.entries(changes)) {
    if (value) state.set(name, value);
    else state.delete(name);
  }
  history.replaceState(null, "", `#${state}`);
  update();
}

// Numbers by value and texts by letter; what was not measured comes last either way.
const letters = new Intl.Collator("en", { numeric: true });

function sorted(column, sign) {
  const text = heads[column].classList.contains("text");
  const value = (cell) => (text ? cell.textContent : Number(cell.dataset.value ?? NaN));
  const keys = new Map(rows.map((row) => [row, value(row.cells[column])]));
  return rows.toSorted((one, other) => {
    const [a, b] = [keys.get(one), keys.get(other)];
    return text ? sign * letters.compare(a, b) : Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0;
  });
}

function order() {
  const column = heads.findIndex((head) => head.dataset.key === state.get("sort"));
  const sign = state.get("down") ? -1 : 1;
  heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : sign > 0 ? "ascending" : "descending"));
  table.tBodies[0].append(...(column < 0 ? rows : sorted(column, sign)));
}

// Of a task, rows with a number and those that failed are shown.
function filter() {
  const wanted = ["model", "method", "ratio"].filter((name) => state.get(name));
  const task = state.get("task");
  const numbers = heads.flatMap((head, i) => (head.dataset.task === task ? [i] : []));
  const blank = (row) => row.lastElementChild.textContent === "done" && !numbers.some((i) => row.cells[i].dataset.value);
  for (const row of rows) row.hidden = wanted.some((name) => row.dataset[name] !== state.get(name)) || (task && blank(row));
  const off = heads.flatMap((head, i) => (task && head.dataset.task && head.dataset.task !== task ? [i + 1] : []));
  document.getElementById("columns").textContent = off.map((n) => `#board tr > :nth-child(${n}) { display: none; }`).join("\n");
  document.getElementById("count").value = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
}

function update() {
  for (const select of form.querySelectorAll("select")) select.value = state.get(select.name) ?? "";
  order();
  filter();
}

form.addEventListener("change", ({ target }) => choose({ [target.name]: target.value }));
form.addEventListener("reset", (event) => {
  event.preventDefault();
  choose({ model: "", method: "", ratio: "", task: "", sort: "", down: "" });
});
table.tHead.addEventListener("click", ({ target }) => {
  const head = target.closest("button") && target.closest("th");
  if (!head) return;
  choose({ sort: head.dataset.key, down: head.getAttribute("aria-sort") === "ascending" ? "1" : "" });
});

// Links within the page have no = in their address, and leave what is chosen as it is.
function arrive() {
  if (location.hash.includes("=")) state = new URLSearchParams(location.hash.slice(1));
  update();
}
window.addEventListener("hashchange", arrive);
arrive();

// Where a row's numbers come from.
const dialog = document.querySelector("dialog");
const details = content("details");

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function list(lines) {
  const made = document.createElement("dl");
  for (const [what, text] of lines.map((n) => details.lines[n])) made.append(element("dt", what), element("dd", text));
  return made;
}

rows.forEach((row, i) => {
  row.querySelector(".more").addEventListener("click", ({ target }) => {
    document.getElementById("who").textContent = `${row.dataset.model}, ${target.textContent}, ${row.dataset.ratio} %`;
    document.getElementById("lines").replaceChildren(...details.rows[i].map(list));
    dialog.showModal();
  });
});

// Commands. Pages opened as a file or over plain HTTP may lack navigator.clipboard; what is selected can always be copied.
document.addEventListener("click", ({ target }) => {
  if (!target.matches(".copy")) return;
  getSelection().selectAllChildren(target.previousElementSibling);
  if (document.execCommand("copy")) target.textContent = "Copied";
});

// Texts in the colours of their experts.
const routes = document.getElementById("texts") ? content("routes") : [];
const look = (expert) => `e${expert % 8} p${Math.min(Math.floor(expert / 8), 3)}`;

function say({ layer, experts, probabilities }, t) {
  const parts = experts[t].map((expert, k) => `expert ${expert} (${probabilities[t][k].toFixed(4)})`);
  return `layer ${layer}: ${parts.join(", ")}`;
}

function paint(tokens, layer) {
  tokens.classList.toggle("numbered", layer.of > 8);
  [...tokens.children].forEach((token, t) => {
    const expert = layer.experts[t][0];
    Object.assign(token, { className: look(expert), title: say(layer, t), tabIndex: -1 });
    token.dataset.expert = expert;
  });
}

function legend(place, of) {
  place.replaceChildren("experts");
  for (let expert = 0; expert < of; expert++) {
    const swatch = element("span", expert);
    swatch.className = look(expert);
    place.append(" ", swatch);
  }
}

document.querySelectorAll(".routes").forEach((place, model) => {
  const texts = [...place.querySelectorAll(".tokens")];
  const select = place.querySelector("select");
  if (!select) return;
  const show = () => {
    texts.forEach((tokens, i) => paint(tokens, routes[model][i][select.value]));
    legend(place.querySelector(".legend"), routes[model][0][select.value].of);
    place.querySelector(".told").value = "";
  };
  const tell = ({ target }) => {
    if (target.title) place.querySelector(".told").value = `“${target.textContent}”, ${target.title}`;
  };
  const step = (event) => {
    const forward = { ArrowRight: true, ArrowLeft: false }[event.key];
    const text = event.target.closest(".tokens");
    if (forward === undefined || !text) return;
    event.preventDefault();
    const token = event.target === text ? null : event.target;
    const next = forward ? (token ? token.nextElementSibling : text.firstElementChild) : token?.previousElementSibling;
    next?.focus();
  };
  select.addEventListener("change", show);
  for (const kind of ["pointerover", "click", "focusin"]) place.addEventListener(kind, tell);
  place.addEventListener("keydown", step);
  show();
});
